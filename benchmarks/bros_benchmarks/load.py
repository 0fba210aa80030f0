"""Sends streaming requests all at once and records when each token came."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import TypeAlias

import aiohttp
import numpy as np

from bros_benchmarks.client import encode_body, open_session, stream_tokens
from bros_benchmarks.prompts import prompt_of

#: Sends one prompt, asks for so many new tokens, and calls back as each comes; returns after the last.
Request: TypeAlias = Callable[[aiohttp.ClientSession, str, list[int], int, Callable[[], None]], Awaitable[None]]


@dataclass(frozen=True, slots=True)
class Timeline:
    """One request: when it was sent and when each of its tokens came, in seconds of `time.perf_counter`."""

    sent_s: float
    token_s: list[float]

    @property
    def ttft_s(self) -> float:
        """Time to the first token."""
        return self.token_s[0] - self.sent_s

    @property
    def tpot_s(self) -> float:
        """Mean time of each later token."""
        return (self.token_s[-1] - self.token_s[0]) / max(1, len(self.token_s) - 1)


@dataclass(frozen=True, slots=True)
class Load:
    """What a round of requests, all sent at once, took."""

    timelines: list[Timeline]
    seconds: float

    @property
    def tokens_per_s(self) -> float:
        """Output tokens a second, prefill included."""
        return sum(len(timeline.token_s) for timeline in self.timelines) / self.seconds

    def ttft_ms(self, percent: float) -> float:
        """A percentile over the requests."""
        return 1000 * float(np.percentile([timeline.ttft_s for timeline in self.timelines], percent))

    def tpot_ms(self, percent: float) -> float:
        """A percentile over the requests."""
        return 1000 * float(np.percentile([timeline.tpot_s for timeline in self.timelines], percent))


async def generate(
    session: aiohttp.ClientSession, url: str, prompt: list[int], num_new_tokens: int, on_token: Callable[[], None]
) -> None:
    """A request in TGI's dialect."""
    await stream_tokens(session, url, encode_body(prompt_of(prompt), num_new_tokens), on_token)


async def send_all(url: str, prompts: list[list[int]], num_new_tokens: int, request: Request = generate) -> Load:
    """Send every prompt at the same time and wait for the last token of each.

    Raises:
        RuntimeError: a reply was shorter or longer than asked for.
    """
    async with open_session() as session:
        start_s = time.perf_counter()
        timelines = await asyncio.gather(
            *(_stream(session, url, prompt, num_new_tokens, request) for prompt in prompts)
        )
        return Load(timelines, time.perf_counter() - start_s)


async def _stream(
    session: aiohttp.ClientSession, url: str, prompt: list[int], num_new_tokens: int, request: Request
) -> Timeline:
    timeline = Timeline(time.perf_counter(), [])
    await request(session, url, prompt, num_new_tokens, lambda: timeline.token_s.append(time.perf_counter()))
    if len(timeline.token_s) != num_new_tokens:
        raise RuntimeError(f"{len(timeline.token_s)} of {num_new_tokens} tokens came")
    return timeline
