"""How well the latency model predicts the steps of a CPU rank: `python -m bros_benchmarks.step_times`.

A rank with SmolLM2-135M's shape measures both grids, then runs steps such as a server's: a batch that grows and
shrinks, and chunks of prompts beside it. Errors are those of the second half of these steps.
"""

from __future__ import annotations

import argparse
import os
import random
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import TypeAlias

import numpy as np
from rich.console import Console
from rich.progress import track
from rich.table import Table

from bros_benchmarks.rank_process import MAX_BATCH_TOKENS, become_rank, rank_options
from bros_router.scheduling.latency_model import LatencyModel
from bros_shard.options import ShardOptions
from bros_shard.protocol import HostCopy, StepShape
from bros_shard.rehearsal import Rehearsal, Scene, chunk
from bros_shard.worker import Worker

#: A step's shape, and the seconds it took.
Step: TypeAlias = tuple[StepShape, float]

MAX_DECODES = 48
CHUNK_SIZES = (16, 32, 48, 64, 96, 128, 192, 256, 384, 512)


def walk(num_steps: int, rng: random.Random) -> Iterator[Scene]:
    """Steps as a server plans them, one after the other."""
    contexts = [rng.randrange(20, 600) for _ in range(8)]
    for _ in range(num_steps):
        if rng.random() < 0.02:  # a burst, or its end
            contexts = [rng.randrange(20, 1000) for _ in range(rng.randint(1, MAX_DECODES))]
        change = rng.choice((0, 0, 0, 0, 1, 1, -1, -1))
        if change > 0 and len(contexts) < MAX_DECODES:
            contexts.append(rng.randrange(20, 600))
        if change < 0 and len(contexts) > 1:
            contexts.pop(rng.randrange(len(contexts)))
        contexts = [context + 1 if context < 1023 else 30 for context in contexts]
        step = Scene(tuple((context, 1) for context in contexts))
        if rng.random() < 0.35:
            num_tokens = min(rng.choice(CHUNK_SIZES), MAX_BATCH_TOKENS - len(contexts))
            step += chunk(rng.choice((0, 0, 0, 128, 512)), num_tokens)
        yield step


def measure_grid(options: ShardOptions, grid: str) -> tuple[Worker, list[Step], float]:
    """A rank that has just warmed up, what it measured, and the seconds that took."""
    worker = Worker(replace(options, profile_grid=grid))
    started_s = time.perf_counter()
    points = worker.warm_up()
    return worker, points, time.perf_counter() - started_s


def run_walk(worker: Worker, num_steps: int) -> tuple[list[Step], list[float]]:
    """The walk's steps; of those of the second half, also how long they took when run once more."""
    rehearsal = Rehearsal(worker.execute, worker.num_blocks, worker.cache.block_size)
    scenes = list(walk(num_steps, random.Random(0)))
    worker.cache.touch(max(scene.num_blocks(worker.cache.block_size) for scene in scenes))
    steps, again = [], []
    for index, scene in enumerate(track(scenes, "steps", console=Console(stderr=True))):
        steps.append((scene.shape(), rehearsal.play(scene)))
        if index >= num_steps // 2:
            again.append(rehearsal.play(scene))
    return steps, again


def errors(predictions_s: list[float], actual_s: list[float]) -> list[str]:
    """Mean absolute percentage error, its median, the bias, and the 95th percentile of actual / predicted."""
    ratios = np.array(predictions_s) / np.array(actual_s)
    return [
        f"{100 * np.abs(ratios - 1).mean():.1f} %",
        f"{100 * np.median(np.abs(ratios - 1)):.1f} %",
        f"{100 * (ratios.mean() - 1):+.1f} %",
        f"{np.percentile(1 / ratios, 95):.2f}",
    ]


def predict(model: LatencyModel, steps: list[Step], is_learning: bool) -> list[float]:
    """Predictions of steps, each made before its step is observed, where the model observes at all."""
    predictions_s = []
    for shape, seconds in steps:
        predictions_s.append(model.predict_s(shape))
        if is_learning:
            model.observe(shape, seconds)
    return predictions_s


def error_table(quick: list[Step], full: list[Step], steps: list[Step], again: list[float]) -> Table:
    """Errors in the second half of the steps, by what the model knows."""
    first, second = steps[: len(steps) // 2], steps[len(steps) // 2 :]
    actual_s = [seconds for _, seconds in second]
    table = Table("the model knows", "error", "median", "bias", "p95 actual / predicted")
    for name, points in (("nothing", []), ("quick grid", quick), ("full grid", full)):
        if points:
            table.add_row(name, *errors(predict(LatencyModel(points), second, is_learning=False), actual_s))
        model = LatencyModel(points)
        predict(model, first, is_learning=True)
        table.add_row(f"{name}, and the first half", *errors(predict(model, second, is_learning=False), actual_s))
        model = LatencyModel(points)
        predict(model, first, is_learning=True)
        table.add_row(f"{name}, and all steps before", *errors(predict(model, second, is_learning=True), actual_s))
    table.add_row("how long the same step took just before", *errors(actual_s, again))
    return table


def cost_us(call: Callable[[StepShape], object], steps: list[Step]) -> float:
    """CPU time of a call of the model."""
    started_s = time.process_time()
    for _ in range(20):
        for shape, _ in steps:
            call(shape)
    return (time.process_time() - started_s) / 20 / len(steps) * 1e6


def cost_table(points: list[Step], steps: list[Step]) -> Table:
    """What the model costs the router."""
    model = LatencyModel(points)
    table = Table("call", "us")
    table.add_row("predict", f"{cost_us(model.predict_s, steps):.2f}")
    table.add_row(
        "largest chunk of 512", f"{cost_us(lambda shape: model.largest_chunk(shape, 0, 512, 0.2), steps):.1f}"
    )
    table.add_row("observe", f"{cost_us(lambda shape: model.observe(shape, 0.1), steps):.1f}")
    return table


def copy_table(worker: Worker) -> Table:
    """Bandwidth between region and host pool, 16 blocks at a time."""
    pool = worker.cache.host_pool
    num_blocks = min(64, worker.cache.num_host_blocks)
    worker.cache.touch(num_blocks)
    table = Table("copy", "GB/s", "us a token")
    for name, run in (("out", pool.copy_out), ("in", pool.copy_in)):
        for direction in ("forward", "reversed"):
            blocks = [block if direction == "forward" else ~block for block in range(num_blocks)]
            copies = [HostCopy(entry, block, worker.cache.block_size) for block, entry in enumerate(blocks)]
            seconds = []
            for _ in range(5):
                started_s = time.perf_counter()
                for start in range(0, num_blocks, 16):
                    run(copies[start : start + 16])
                seconds.append(time.perf_counter() - started_s)
            best_s = min(seconds[1:])
            per_token_us = best_s / num_blocks / worker.cache.block_size * 1e6
            table.add_row(
                f"{name}, {direction} blocks",
                f"{num_blocks * worker.block_bytes / best_s / 1e9:.1f}",
                f"{per_token_us:.2f}",
            )
    return table


def main() -> None:
    """Measure, and print the tables."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=240)
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--folder", type=Path, default=Path("benchmarks/results"))
    arguments = parser.parse_args()
    options = rank_options(arguments.folder, arguments.threads)
    become_rank("bros_benchmarks.step_times", options)
    console = Console(width=120)
    with tempfile.TemporaryDirectory() as folder:
        os.environ["XDG_CACHE_HOME"] = folder  # nothing is known from before
        _, quick, quick_s = measure_grid(options, "quick")
        worker, full, full_s = measure_grid(options, "full")
    console.print(
        f"quick grid: {len(quick)} points in {quick_s:.1f} s, full grid: {len(full)} points in {full_s:.1f} s"
    )
    steps, again = run_walk(worker, arguments.steps)
    console.print(error_table(quick, full, steps, again))
    console.print(cost_table(full, steps))
    console.print(copy_table(worker))


if __name__ == "__main__":
    main()
