"""Ranks that run recorded plans, each in a process of its own, without the seconds that its imports take. Not a test.

This process imports what a rank needs and forks one for each rank of a job. A job is a line on stdin, a JSON object:

    environment  the environment variables of the ranks
    plans        file of a JSON list of hexadecimal frames
    results      file that rank 0 writes: a JSON object from sequence id to token ids
    timeout_s    a rank that takes longer ends, and says where it was
    ranks        for each rank its options (`argv`), and the `file` of what it writes to stdout and stderr

The answer is a line on stdout, a JSON list of exit statuses, negative where a signal ended the rank.
"""

from __future__ import annotations

import faulthandler
import json
import math
import os
import sys
from pathlib import Path
from typing import Any

from bros_shard import worker as worker_module
from bros_shard.options import ShardOptions
from bros_shard.protocol import StepPlan, decode_from_router
from bros_shard.worker import Worker


def main() -> None:
    # A fork has no thread but the one that forked, and waits forever for what another held.
    assert len(os.listdir("/proc/self/task")) == 1, "a library started threads"
    for line in sys.stdin:
        job = json.loads(line)
        pids = []
        for rank in job["ranks"]:
            pid = os.fork()
            if pid == 0:
                _run_rank(job, **rank)
                return  # and end as any other process does
            pids.append(pid)
        statuses = [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in pids]
        print(json.dumps(statuses), flush=True)


def _run_rank(job: dict[str, Any], argv: list[str], file: str) -> None:
    output = os.open(file, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    os.dup2(output, 1)
    os.dup2(output, 2)
    faulthandler.dump_traceback_later(job["timeout_s"], exit=True)
    os.environ.clear()
    os.environ.update(job["environment"])
    outputs = _replay(ShardOptions.from_argv(argv), json.loads(Path(job["plans"]).read_text()))
    if outputs is not None:
        Path(job["results"]).write_text(json.dumps(outputs))


def _replay(options: ShardOptions, frames: list[str]) -> dict[int, list[int]] | None:
    """Run the plans. Returns the tokens of each sequence on rank 0, and None on the others."""
    # However busy the machine is, warming up is never cut short, and what was measured before is believed.
    worker_module._MEASURING_BUDGET_S = {options.profile_grid: math.inf}
    worker_module._PLAYING_BUDGET_S = worker_module._LARGEST_CHANGE = math.inf
    worker = Worker(options)
    worker.warm_up()
    worker.cache.region.fill_(float("nan"))
    outputs: dict[int, list[int]] = {}
    for frame in frames:
        plan = decode_from_router(bytes.fromhex(frame))
        assert isinstance(plan, StepPlan)
        for result in worker.execute(plan).sequences:
            if result.tokens:
                outputs.setdefault(result.sequence_id, []).extend(token.token_id for token in result.tokens)
    if options.rank == 0:
        return outputs
    assert outputs == {}, "only rank 0 answers"
    return None


if __name__ == "__main__":
    main()
