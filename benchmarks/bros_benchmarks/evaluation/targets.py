"""Latency targets scaled to a server: a multiple of what it needs for a request when it has nothing else to do."""

from __future__ import annotations

import asyncio
import math
import random
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np

from bros_benchmarks.evaluation.bound import Slopes
from bros_benchmarks.load import Load, send_all

#: Prompts whose time to the first token is measured on the idle server, each so often, and once before that counts.
_PROMPT_LENGTHS: Final = (8, 32, 64, 128, 256, 384, 512)
_NUM_REPEATS: Final = 7
#: The decode step that the target for later tokens is a multiple of holds so many sequences.
_NUM_DECODES: Final = 32
_DECODE_PROMPT_TOKENS: Final = 64
_DECODE_TOKENS: Final = 48


@dataclass(frozen=True, slots=True)
class UnloadedLatency:
    """What an idle server needs, in seconds."""

    #: Median time to the first token: a line over the tokens of the prompt.
    ttft_fixed_s: float
    ttft_token_s: float
    #: Median time of a step that decodes 32 sequences and does nothing else.
    decode_step_s: float

    @property
    def slopes(self) -> Slopes:
        """What a token adds to a step, in prefill and in decode; attention is in both."""
        decode_s = max(0.0, self.decode_step_s - self.ttft_fixed_s) / _NUM_DECODES
        return Slopes(self.ttft_token_s, 0.0, decode_s, 0.0)

    def targets(self, num_prompt_tokens: int, scale: float) -> tuple[float, float]:
        """(TTFT, TPOT) targets in seconds: whole milliseconds, rounded up."""
        ttft_s = self.ttft_fixed_s + self.ttft_token_s * num_prompt_tokens
        return math.ceil(1000 * scale * ttft_s) / 1000, math.ceil(1000 * scale * self.decode_step_s) / 1000


@dataclass(frozen=True, slots=True)
class ScaledTargets:
    """Targets for a workload: `scale` times the unloaded latency."""

    latency: UnloadedLatency
    scale: float

    def __call__(self, num_prompt_tokens: int) -> tuple[float | None, float | None]:
        """(TTFT, TPOT) of a prompt of that many tokens."""
        return self.latency.targets(num_prompt_tokens, self.scale)


async def measure(url: str, seed: int = 0) -> UnloadedLatency:
    """Ask an idle server, one request at a time, then 32 at once. Takes about half a minute on a CPU."""
    generator = random.Random(f"{seed}/targets")
    await send_all(url, _prompts(_NUM_DECODES, _DECODE_PROMPT_TOKENS, generator), _DECODE_TOKENS)  # warms up
    ttfts: dict[int, list[float]] = {length: [] for length in _PROMPT_LENGTHS}
    for _ in range(_NUM_REPEATS):  # lengths take turns: the machine may drift
        for length in _PROMPT_LENGTHS:
            load = await send_all(url, _prompts(1, length, generator), 1)
            ttfts[length].append(load.timelines[0].ttft_s)
            await asyncio.sleep(0)
    fixed_s, token_s = fit_line(_PROMPT_LENGTHS, [statistics.median(ttfts[length]) for length in _PROMPT_LENGTHS])
    load = await send_all(url, _prompts(_NUM_DECODES, _DECODE_PROMPT_TOKENS, generator), _DECODE_TOKENS)
    return UnloadedLatency(fixed_s, token_s, decode_step_s(load))


def fit_line(lengths: Sequence[int], seconds: Sequence[float]) -> tuple[float, float]:
    """(intercept, slope) of the line with the least relative errors, neither below 0."""
    x, y = np.asarray(lengths, dtype=float), np.asarray(seconds)
    slope, intercept = np.polyfit(x, y, 1, w=1 / y)
    if intercept < 0:
        return 0.0, float(np.median(y / x))
    return (float(intercept), float(slope)) if slope > 0 else (float(np.median(y)), 0.0)


def decode_step_s(load: Load) -> float:
    """Median gap between tokens while every request decodes: after the last first token, before the first last one."""
    start_s = max(timeline.token_s[0] for timeline in load.timelines)
    stop_s = min(timeline.token_s[-1] for timeline in load.timelines)
    gaps = [
        after - before
        for timeline in load.timelines
        for before, after in zip(timeline.token_s, timeline.token_s[1:], strict=False)
        if start_s <= before and after <= stop_s
    ]
    if not gaps:
        raise RuntimeError("the requests never decoded all together")
    return float(statistics.median(gaps))


def _prompts(num_prompts: int, length: int, generator: random.Random) -> list[list[int]]:
    return [generator.choices(range(1, 1000), k=length) for _ in range(num_prompts)]
