"""What steps take with each of a CPU's kernels, in turn: `python -m bros_benchmarks.kernels`, or `make bench-kernels`.

Two ranks with SmolLM2-135M's shape and random weights, one with PyTorch's kernels and one with the C kernels, run the
same made-up steps, one after the other.
"""

from __future__ import annotations

import argparse
import os
import statistics
from dataclasses import replace
from pathlib import Path
from typing import Final

import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table

from bros_benchmarks.rank_process import become_rank, rank_options
from bros_shard.options import ShardOptions
from bros_shard.rehearsal import Rehearsal, chunk, decodes
from bros_shard.worker import Worker

_NAMES: Final = ("torch", "cpu")
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


def measure(options: ShardOptions, num_rounds: int) -> dict[str, dict[str, list[float]]]:
    """Seconds of each scene with each kernels, by round; one more round warms up."""
    seconds: dict[str, dict[str, list[float]]] = {title: {name: [] for name in _NAMES} for title in SCENES}
    workers = {name: Worker(replace(options, kernels=name)) for name in _NAMES}
    threads = {"torch": options.num_threads, "cpu": 1}  # as `select_kernels` sets it where a process has one of them
    for number in track(range(num_rounds + 1), "rounds", console=Console(stderr=True)):
        for title, scene in SCENES.items():
            for name, worker in workers.items():
                torch.set_num_threads(threads[name])
                worker.cache.touch(scene.num_blocks(worker.cache.block_size))
                rehearsal = Rehearsal(worker.execute, worker.num_blocks, worker.cache.block_size)
                taken_s = rehearsal.measure(scene)
                if number > 0:
                    seconds[title][name].append(taken_s)
    return seconds


def print_table(seconds: dict[str, dict[str, list[float]]]) -> None:
    """Shortest and median times, and the median of the rounds' ratios."""
    table = Table("step", *(f"{name} ms, shortest / median" for name in _NAMES), "torch / cpu", "tokens/s, cpu")
    for title, times in seconds.items():
        num_tokens = sum(num_tokens for _, num_tokens in SCENES[title].sequences)
        columns = [f"{1e3 * min(times[name]):.1f} / {1e3 * statistics.median(times[name]):.1f}" for name in _NAMES]
        ratio = statistics.median(a / b for a, b in zip(*times.values(), strict=True))
        table.add_row(title, *columns, f"{ratio:.2f}", f"{num_tokens / statistics.median(times['cpu']):.0f}")
    Console(width=140).print(table)


def main() -> None:
    """Measure, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--folder", type=Path, default=Path("benchmarks/results"))
    arguments = parser.parse_args()
    options = replace(rank_options(arguments.folder, arguments.threads), host_memory_bytes=-1)
    become_rank("bros_benchmarks.kernels", options)
    print_table(measure(options, arguments.rounds))


if __name__ == "__main__":
    main()
