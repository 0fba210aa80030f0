"""`make bench-prefix`: the time to the first token of prompts that begin as earlier ones did, with and without cache.

Two servers, one with `--disable-prefix-caching`, take turns: a prompt of a long prefix and a short suffix, then the
same prefix with another suffix, every time with a prefix that is new to both. And a conversation: each prompt is the
one before and some more.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import random
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Final

from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from bros_benchmarks.checkpoint import SMOLLM2_135M, make_checkpoint
from bros_benchmarks.load import send_all
from bros_benchmarks.server_under_test import ServerUnderTest

_NUM_PREFIX_TOKENS: Final = 2000
_NUM_SUFFIX_TOKENS: Final = 64
_NUM_TURNS: Final = 6
_NUM_TURN_TOKENS: Final = 200


def ttft_ms(server: ServerUnderTest, prompt: list[int]) -> float:
    """One request of one token on an idle server."""
    return asyncio.run(send_all(server.url, [prompt], 1)).ttft_ms(50)


def random_tokens(generator: random.Random, num_tokens: int) -> list[int]:
    """Tokens that share nothing with others."""
    return generator.choices(range(1, 1000), k=num_tokens)


def first_and_second(server: ServerUnderTest, seed: int) -> tuple[float, float]:
    """TTFT in ms of a prompt, and of another with the same prefix."""
    generator = random.Random(seed)
    prefix = random_tokens(generator, _NUM_PREFIX_TOKENS)
    first, second = (ttft_ms(server, prefix + random_tokens(generator, _NUM_SUFFIX_TOKENS)) for _ in range(2))
    return first, second


def conversation(server: ServerUnderTest, seed: int) -> list[float]:
    """TTFT in ms of each turn."""
    generator = random.Random(seed)
    said: list[int] = []
    turns = []
    for _ in range(_NUM_TURNS):
        said += random_tokens(generator, _NUM_TURN_TOKENS)
        turns.append(ttft_ms(server, said))
    return turns


def medians(rounds: Sequence[Sequence[float]]) -> list[float]:
    """Of each column."""
    return [statistics.median(column) for column in zip(*rounds, strict=True)]


def main() -> None:
    """Run the rounds and print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--folder", type=Path, default=Path("benchmarks/results"))
    options = parser.parse_args()
    model = make_checkpoint(SMOLLM2_135M, options.folder)
    flags = {"with cache": (), "without": ("--disable-prefix-caching",)}
    servers = {
        name: ServerUnderTest(model, options.threads, options.folder / f"prefix-{index}.log", *extra)
        for index, (name, extra) in enumerate(flags.items())
    }
    pairs: dict[str, list[tuple[float, float]]] = {name: [] for name in servers}
    turns: dict[str, list[list[float]]] = {name: [] for name in servers}
    try:
        with Progress() as progress:
            for number in progress.track(range(options.rounds + 1), description="rounds"):
                for name, server in servers.items():
                    pair, talk = first_and_second(server, number), conversation(server, 1000 + number)
                    if number > 0:  # the first warms both up
                        pairs[name].append(pair)
                        turns[name].append(talk)
    finally:
        for server in servers.values():
            server.stop()
    console = Console(width=140)
    table = Table("prefix cache", f"TTFT ms, {_NUM_PREFIX_TOKENS} + {_NUM_SUFFIX_TOKENS} tokens", "second", "ratio")
    for name, rounds in pairs.items():
        first, second = medians(rounds)
        ratio = statistics.median(first / second for first, second in rounds)
        table.add_row(name, f"{first:.0f}", f"{second:.0f}", f"{ratio:.1f}x")
    console.print(table)
    lengths = [f"{_NUM_TURN_TOKENS * (turn + 1)}" for turn in range(_NUM_TURNS)]
    table = Table("TTFT ms by tokens of a conversation", *lengths)
    for name, rounds_of_turns in turns.items():
        table.add_row(name, *(f"{value:.0f}" for value in medians(rounds_of_turns)))
    console.print(table)


if __name__ == "__main__":
    main()
