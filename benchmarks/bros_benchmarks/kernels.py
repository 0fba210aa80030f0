"""What steps take with each of a CPU's kernels, in turn: `python -m bros_benchmarks.kernels`, or `make bench-kernels`.

Ranks with SmolLM2-135M's shape and random weights, with PyTorch's kernels, with the C kernels, and with those and int8
weights, run the same made-up steps, one after the other.
"""

from __future__ import annotations

import argparse
import os
import statistics
from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any, Final

import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table

from bros_benchmarks.rank_process import become_rank, rank_options
from bros_shard.options import ShardOptions
from bros_shard.rehearsal import Rehearsal, chunk, decodes
from bros_shard.worker import Worker

#: Options of each rank, by what the table calls it.
_RANKS: Final[dict[str, dict[str, Any]]] = {
    "torch": {"kernels": "torch"},
    "cpu": {"kernels": "cpu"},
    "cpu, int8": {"kernels": "cpu", "quantize": "int8"},
}
#: By what the table calls them.
SCENES: Final = {
    "1 decode, context 128": decodes(1, 128),
    "4 decodes, context 128": decodes(4, 128),
    "16 decodes, context 512": decodes(16, 512),
    "32 decodes, context 160": decodes(32, 160),
    "64 decodes, context 512": decodes(64, 512),
    "prompt of 512": chunk(0, 512),
    "chunk of 256 after 768": chunk(768, 256),
    "20 decodes, context 300, and a prompt of 200": decodes(20, 300) + chunk(0, 200),
}


def measure(options: ShardOptions, names: Sequence[str], num_rounds: int) -> dict[str, dict[str, list[float]]]:
    """Seconds of each scene on each rank, by round; one more round warms up."""
    seconds: dict[str, dict[str, list[float]]] = {title: {name: [] for name in names} for title in SCENES}
    workers = {name: Worker(replace(options, **_RANKS[name])) for name in names}
    for number in track(range(num_rounds + 1), "rounds", console=Console(stderr=True)):
        for title, scene in SCENES.items():
            for name, worker in workers.items():
                # As `select_kernels` sets it where a process has one of them.
                torch.set_num_threads(options.num_threads if name == "torch" else 1)
                worker.cache.touch(scene.num_blocks(worker.cache.block_size))
                rehearsal = Rehearsal(worker.execute, worker.num_blocks, worker.cache.block_size)
                taken_s = rehearsal.measure(scene)
                if number > 0:
                    seconds[title][name].append(taken_s)
    return seconds


def print_table(seconds: dict[str, dict[str, list[float]]]) -> None:
    """Shortest and median times, and the median of the rounds' ratios."""
    names = list(next(iter(seconds.values())))
    ratios = list(pairwise(names))
    headings = [f"{name}: {what}" for name in names for what in ("ms, shortest / median", "tokens/s")]
    table = Table("step", *headings, *(f"{a} / {b}" for a, b in ratios))
    for title, times in seconds.items():
        num_tokens = sum(num_tokens for _, num_tokens in SCENES[title].sequences)
        columns = []
        for name in names:
            shortest_s, median_s = min(times[name]), statistics.median(times[name])
            columns += [f"{1e3 * shortest_s:.1f} / {1e3 * median_s:.1f}", f"{num_tokens / median_s:.0f}"]
        columns += [
            f"{statistics.median(x / y for x, y in zip(times[a], times[b], strict=True)):.2f}" for a, b in ratios
        ]
        table.add_row(title, *columns)
    Console(width=180).print(table)


def main() -> None:
    """Measure, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16")
    parser.add_argument("--ranks", nargs="+", choices=list(_RANKS), default=list(_RANKS), help="which are compared")
    parser.add_argument("--folder", type=Path, default=Path("benchmarks/results"))
    arguments = parser.parse_args()
    options = replace(rank_options(arguments.folder, arguments.threads), host_memory_bytes=-1, dtype=arguments.dtype)
    become_rank("bros_benchmarks.kernels", options)
    print_table(measure(options, arguments.ranks, arguments.rounds))


if __name__ == "__main__":
    main()
