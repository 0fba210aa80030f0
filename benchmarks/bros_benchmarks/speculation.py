"""`make bench-speculation`: what guessing the next tokens brings, and what it costs where the guesses are wrong.

Two servers of the same random weights, one that guesses and one that does not, take turns with three kinds of text:
greedy; drawn from the four likeliest tokens, where many guesses are wrong; and drawn from all tokens, which never
repeats itself, so that there is nothing to guess from.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import random
import statistics
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, Final

import aiohttp
import msgspec
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from bros_benchmarks.checkpoint import SMOLLM2_135M, make_checkpoint
from bros_benchmarks.client import stream_tokens
from bros_benchmarks.load import send_all
from bros_benchmarks.prompts import prompt_of
from bros_benchmarks.server_under_test import ServerUnderTest

_NUM_PROMPT_TOKENS: Final = 128
_NUM_NEW_TOKENS: Final = 128
_TEXTS: Final[dict[str, dict[str, Any]]] = {
    "greedy": {},
    "drawn from four": {"do_sample": True, "seed": 1, "top_k": 4},
    "drawn from all": {"do_sample": True, "seed": 1},
}
_OUTCOMES: Final = ("accepted", "rejected")


async def _generate(
    parameters: dict[str, Any],
    session: aiohttp.ClientSession,
    url: str,
    prompt: list[int],
    num_new_tokens: int,
    on_token: Callable[[], None],
) -> None:
    wishes = {"max_new_tokens": num_new_tokens, "ignore_eos": True} | parameters
    body = msgspec.json.encode({"inputs": prompt_of(prompt), "parameters": wishes})
    await stream_tokens(session, url, body, on_token)


def tokens_per_s(server: ServerUnderTest, prompts: list[list[int]], parameters: dict[str, Any]) -> float:
    """All prompts at once."""
    return asyncio.run(send_all(server.url, prompts, _NUM_NEW_TOKENS, partial(_generate, parameters))).tokens_per_s


def guesses(server: ServerUnderTest) -> tuple[float, float]:
    """Right and wrong ones so far."""
    metrics = server.metrics()
    accepted, rejected = (metrics.get(f'bros_speculative_tokens_total{{outcome="{name}"}}', 0.0) for name in _OUTCOMES)
    return accepted, rejected


def main() -> None:
    """Run the rounds and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--speculate", type=int, default=4)
    parser.add_argument("--clients", type=int, nargs="+", default=(1, 4, 16))
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--folder", type=Path, default=Path("benchmarks/results"))
    options = parser.parse_args()
    model = make_checkpoint(SMOLLM2_135M, options.folder)
    plain, guessing = (
        ServerUnderTest(
            model,
            options.threads,
            options.folder / f"speculation-{number}.log",
            "--speculate",
            str(number),
            "--disable-prefix-caching",
        )
        for number in (0, options.speculate)
    )
    table = Table("text", "clients", "tok/s", "guessing: tok/s", "ratio", "guesses a token", "of them right")
    try:
        with Progress() as progress:
            for text, num_clients in progress.track(
                [(text, num_clients) for text in _TEXTS for num_clients in options.clients], description="loads"
            ):
                table.add_row(
                    text, str(num_clients), *_measure(plain, guessing, _TEXTS[text], num_clients, options.rounds)
                )
    finally:
        for server in (plain, guessing):
            server.stop()
    Console(width=140).print(table)


def _measure(
    plain: ServerUnderTest, guessing: ServerUnderTest, parameters: dict[str, Any], num_clients: int, num_rounds: int
) -> tuple[str, ...]:
    """The cells of a row: medians of the rounds but for the first, which warms up."""
    speeds: list[tuple[float, float]] = []
    right, wrong = guesses(guessing)
    for number in range(num_rounds + 1):
        generator = random.Random(number)
        prompts = [generator.choices(range(1, 1000), k=_NUM_PROMPT_TOKENS) for _ in range(num_clients)]
        speeds.append((tokens_per_s(plain, prompts, parameters), tokens_per_s(guessing, prompts, parameters)))
    right, wrong = (now - before for now, before in zip(guesses(guessing), (right, wrong), strict=True))
    of_plain, of_guessing = (statistics.median(column) for column in zip(*speeds[1:], strict=True))
    ratio = statistics.median(fast / slow for slow, fast in speeds[1:])
    num_tokens = (num_rounds + 1) * num_clients * _NUM_NEW_TOKENS
    share = f"{right / (right + wrong):.0%}" if right + wrong else "–"
    return f"{of_plain:.0f}", f"{of_guessing:.0f}", f"{ratio:.2f}", f"{(right + wrong) / num_tokens:.2f}", share


if __name__ == "__main__":
    main()
