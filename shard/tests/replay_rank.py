"""A rank in a process of its own: runs recorded plans and, as rank 0, writes what they gave. Not a test.

Usage: replay_rank.py PLANS RESULTS OPTIONS...
PLANS is a JSON list of hexadecimal frames; RESULTS becomes a JSON object from sequence id to token ids.
"""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path

from bros_shard import worker as worker_module
from bros_shard.options import ShardOptions
from bros_shard.protocol import StepPlan, decode_from_router
from bros_shard.worker import Worker


def main() -> None:
    plans_path, results_path, *arguments = sys.argv[1:]
    options = ShardOptions.from_argv(arguments)
    # However busy the machine is, warming up is never cut short, and what was measured before is believed.
    worker_module._MEASURING_BUDGET_S = {options.profile_grid: math.inf}
    worker_module._PLAYING_BUDGET_S = worker_module._LARGEST_CHANGE = math.inf
    worker = Worker(options)
    worker.warm_up()
    worker.cache.region.fill_(float("nan"))
    outputs: dict[int, list[int]] = {}
    for frame in json.loads(Path(plans_path).read_text()):
        plan = decode_from_router(bytes.fromhex(frame))
        assert isinstance(plan, StepPlan)
        for result in worker.execute(plan).sequences:
            if result.token_id is not None:
                outputs.setdefault(result.sequence_id, []).append(result.token_id)
    if options.rank == 0:
        Path(results_path).write_text(json.dumps(outputs))
    else:
        assert outputs == {}, "only rank 0 answers"


if __name__ == "__main__":
    main()
