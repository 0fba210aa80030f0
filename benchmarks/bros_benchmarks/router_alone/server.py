"""`python -m bros_benchmarks.router_alone.server serve ...`: the server, on one core, with a stub for a rank."""

from __future__ import annotations

import sys
from functools import partial

import bros_router.rank_group
from bros_benchmarks.router_alone.cores import take_one_core
from bros_router.__main__ import main
from bros_router.supervisor import RankProcesses

if __name__ == "__main__":
    take_one_core()
    stub = (sys.executable, "-m", "bros_benchmarks.router_alone.stub_rank")
    setattr(bros_router.rank_group, "RankProcesses", partial(RankProcesses, program=stub))  # noqa: B010
    main()
