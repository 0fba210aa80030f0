"""`make bench`: this server against `transformers` `generate`, same weights, dtype and threads, in turn.

The machine may be shared and its speed may drift, so the two run alternately and the ratios are taken within each
round. Prompts are ragged, 64 to 192 tokens; `generate` gets them as one left-padded batch, and one after the other.
They are the same in each round, so the server's prefix cache is off.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import random
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
import transformers
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from bros_benchmarks.checkpoint import SMOLLM2_135M, make_checkpoint
from bros_benchmarks.load import Load, send_all
from bros_benchmarks.server_under_test import ServerUnderTest

NUM_NEW_TOKENS = 64
CONCURRENCIES = (1, 8, 32)


@dataclass(frozen=True, slots=True)
class Round:
    """One turn of everyone at one concurrency."""

    server: Load
    batched_tokens_per_s: float
    serial_tokens_per_s: float
    #: Share of the busy time in which the rank waited for its next plan.
    idle_share: float


class Baseline:
    """`transformers` `generate`, greedy, in this process."""

    def __init__(self, model: Path) -> None:
        self._model = transformers.AutoModelForCausalLM.from_pretrained(model, dtype="auto").eval()

    def generate(self, prompts: list[list[int]]) -> float:
        """Seconds for one left-padded batch."""
        width = max(map(len, prompts))
        ids = torch.tensor([[0] * (width - len(prompt)) + prompt for prompt in prompts])
        mask = torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts])
        start_s = time.perf_counter()
        with torch.inference_mode():
            output = self._model.generate(
                input_ids=ids,
                attention_mask=mask,
                max_new_tokens=NUM_NEW_TOKENS,
                min_new_tokens=NUM_NEW_TOKENS,
                do_sample=False,
                pad_token_id=0,
            )
        seconds = time.perf_counter() - start_s
        assert output.shape[1] == width + NUM_NEW_TOKENS
        return seconds


def make_prompts(num_prompts: int) -> list[list[int]]:
    """Ragged prompts, the same in every run."""
    rng = random.Random(num_prompts)
    lengths = [128] if num_prompts == 1 else [rng.randint(64, 192) for _ in range(num_prompts)]
    return [[rng.randrange(1, SMOLLM2_135M.vocab_size) for _ in range(length)] for length in lengths]


def run_round(server: ServerUnderTest, baseline: Baseline, concurrency: int) -> Round:
    """One turn each, on the same prompts."""
    prompts = make_prompts(concurrency)
    busy_s, idle_s = server.busy_and_idle_s()
    load = asyncio.run(send_all(server.url, prompts, NUM_NEW_TOKENS))
    busy_s, idle_s = (after - before for after, before in zip(server.busy_and_idle_s(), (busy_s, idle_s), strict=True))
    num_tokens = concurrency * NUM_NEW_TOKENS
    batched_s = baseline.generate(prompts)
    # Serial generation does not depend on how many wait: a few prompts tell its speed.
    few = prompts[:4]
    serial_s = sum(baseline.generate([prompt]) for prompt in few) / len(few) * concurrency
    return Round(load, num_tokens / batched_s, num_tokens / serial_s, idle_s / (busy_s + idle_s))


def print_table(rounds: dict[int, list[Round]]) -> None:
    """Medians over the rounds; ratios are medians of the ratios within each round."""
    columns = ("clients", "bros tok/s", "batched", "serial", "ratio batched", "ratio serial")
    table = Table(*columns, "TTFT p50/p99 ms", "TPOT p50/p99 ms", "rank idle")
    for concurrency, turns in rounds.items():
        table.add_row(str(concurrency), *_row(turns))
    Console(width=140).print(table)


def _row(turns: list[Round]) -> list[str]:
    def median(value: Callable[[Round], float]) -> float:
        return statistics.median(map(value, turns))

    return [
        f"{median(lambda turn: turn.server.tokens_per_s):.1f}",
        f"{median(lambda turn: turn.batched_tokens_per_s):.1f}",
        f"{median(lambda turn: turn.serial_tokens_per_s):.1f}",
        f"{median(lambda turn: turn.server.tokens_per_s / turn.batched_tokens_per_s):.2f}x",
        f"{median(lambda turn: turn.server.tokens_per_s / turn.serial_tokens_per_s):.2f}x",
        f"{median(lambda turn: turn.server.ttft_ms(50)):.0f} / {median(lambda turn: turn.server.ttft_ms(99)):.0f}",
        f"{median(lambda turn: turn.server.tpot_ms(50)):.0f} / {median(lambda turn: turn.server.tpot_ms(99)):.0f}",
        f"{100 * median(lambda turn: turn.idle_share):.1f} %",
    ]


def main() -> None:
    """Run the rounds and print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--folder", type=Path, default=Path("benchmarks/results"))
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    transformers.logging.set_verbosity_error()
    model = make_checkpoint(SMOLLM2_135M, options.folder)
    baseline = Baseline(model)
    server = ServerUnderTest(model, options.threads, options.folder / "serving.log", "--disable-prefix-caching")
    rounds: dict[int, list[Round]] = {concurrency: [] for concurrency in CONCURRENCIES}
    try:
        with Progress() as progress:
            task = progress.add_task("rounds", total=len(CONCURRENCIES) * (options.rounds + 1))
            for number in range(options.rounds + 1):
                for concurrency in CONCURRENCIES:
                    turn = run_round(server, baseline, concurrency)
                    if number > 0:  # the first warms both up
                        rounds[concurrency].append(turn)
                    progress.advance(task)
    finally:
        server.stop()
    print_table(rounds)


if __name__ == "__main__":
    main()
