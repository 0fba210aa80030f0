"""A benchmark whose own process is a CPU rank: its options, and its environment."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Final

from bros_benchmarks.checkpoint import SMOLLM2_135M, make_checkpoint
from bros_router.supervisor import rank_environment
from bros_shard.options import ShardOptions

MAX_BATCH_TOKENS: Final = 512
#: Tells that this process has a rank's environment.
_IS_CHILD: Final = "BROS_BENCHMARK_CHILD"


def rank_options(folder: Path, num_threads: int) -> ShardOptions:
    """A rank with SmolLM2-135M's shape and random weights, whose checkpoint is kept in `folder`."""
    return ShardOptions(
        endpoint="",
        rendezvous="",
        model_path=str(make_checkpoint(SMOLLM2_135M, folder)),
        model_id=SMOLLM2_135M.name,
        device="cpu",
        kv_memory_bytes=2 * 2**30,
        max_batch_tokens=MAX_BATCH_TOKENS,
        num_threads=num_threads,
    )


def become_rank(module: str, options: ShardOptions) -> None:
    """Start `module` anew with the same arguments in a rank's environment, unless this process has it: how memory is
    allocated is settled when a process starts."""
    if _IS_CHILD not in os.environ:
        environment = rank_environment(options, options.num_threads) | {_IS_CHILD: "1"}
        os.execve(sys.executable, [sys.executable, "-m", module, *sys.argv[1:]], environment)
