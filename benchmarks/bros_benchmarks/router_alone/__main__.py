"""`make bench-router`: what the router costs, with a rank that takes no time.

Streamed tokens a second with many clients at once, and the processor time that one takes, which says what a core could
do however busy the machine is; requests of one token a second; and how long a request of one token takes when
there is no other: HTTP, validation, tokenising, planning, two hops over ZeroMQ, detokenising. The router has a core to
itself; the rank and the clients share the others. The time of a request includes the client's own, which that of
`/health` shows.
"""

from __future__ import annotations

import argparse
import asyncio
import random
import statistics
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Final

import aiohttp
import psutil
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from bros_benchmarks.client import encode_body
from bros_benchmarks.load import send_all
from bros_benchmarks.prompts import prompt_of
from bros_benchmarks.router_alone.cores import leave_cores_of
from bros_benchmarks.server_under_test import ServerUnderTest
from bros_router.model_source import demo_model_path

_NUM_PROMPT_WORDS: Final = 64
_NUM_STREAMED_TOKENS: Final = 256
_NUM_REQUESTS: Final = 500
_JSON: Final = {"Content-Type": "application/json"}


def prompts(generator: random.Random, count: int) -> list[list[int]]:
    """Prompts that share nothing."""
    return [generator.choices(range(300, 4000), k=_NUM_PROMPT_WORDS) for _ in range(count)]


async def _each_ms(ask: Callable[[], Awaitable[None]]) -> list[float]:
    """How long each of many requests takes, one after the other."""
    taken_ms = []
    for _ in range(_NUM_REQUESTS):
        start_s = time.perf_counter()
        await ask()
        taken_ms.append(1000 * (time.perf_counter() - start_s))
    return taken_ms


async def alone_ms(url: str, generator: random.Random) -> tuple[list[float], list[float]]:
    """Milliseconds of `/health`, and of requests of one token, over one connection."""
    async with aiohttp.ClientSession() as session:

        async def health() -> None:
            async with session.get(f"{url}/health") as reply:
                await reply.read()

        async def generate() -> None:
            (prompt,) = prompts(generator, 1)
            body = encode_body(prompt_of(prompt), 1)
            async with session.post(f"{url}/generate", data=body, headers=_JSON) as reply:
                assert reply.status == 200
                await reply.read()

        return await _each_ms(health), await _each_ms(generate)


def processor_s(process: psutil.Process) -> float:
    """Processor time of a process so far, its own and the system's for it."""
    times = process.cpu_times()
    return float(times.user + times.system)


def percentiles(values: list[float]) -> str:
    """Median and 99th percentile."""
    ordered = sorted(values)
    return f"{statistics.median(ordered):.2f} / {ordered[len(ordered) * 99 // 100]:.2f}"


def main() -> None:
    """Run the rounds and print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--clients", type=int, nargs="+", default=(1, 16, 64, 256))
    parser.add_argument("--folder", type=Path, default=Path("benchmarks/results"))
    options = parser.parse_args()
    options.folder.mkdir(parents=True, exist_ok=True)
    generator = random.Random(0)
    streams: dict[int, list[tuple[float, float, float]]] = {count: [] for count in options.clients}
    program = ("-m", "bros_benchmarks.router_alone.server")
    flags = ("--disable-prefix-caching", "--max-concurrent-requests", "1024")
    with ServerUnderTest(demo_model_path(), 1, options.folder / "router.log", *flags, program=program) as server:
        leave_cores_of(server.pid)
        router = psutil.Process(server.pid)
        health_ms, request_ms = asyncio.run(alone_ms(server.url, generator))
        with Progress() as progress:
            for _ in progress.track(range(options.rounds), description="rounds"):
                for count, taken in streams.items():
                    begin_s = processor_s(router)
                    load = asyncio.run(send_all(server.url, prompts(generator, count), _NUM_STREAMED_TOKENS))
                    us_per_token = 1e6 * (processor_s(router) - begin_s) / (count * _NUM_STREAMED_TOKENS)
                    short = asyncio.run(send_all(server.url, prompts(generator, count), 1))
                    taken.append((load.tokens_per_s, us_per_token, short.tokens_per_s))
    console = Console(width=140)
    table = Table("clients", "streamed tokens/s", "processor time of the router, µs a token", "requests of one token/s")
    for count, taken in streams.items():
        table.add_row(str(count), *(f"{statistics.median(column):,.0f}" for column in zip(*taken, strict=True)))
    console.print(table)
    console.print(
        f"one request at a time, ms, p50 / p99: /health {percentiles(health_ms)}, /generate {percentiles(request_ms)}"
    )


if __name__ == "__main__":
    main()
