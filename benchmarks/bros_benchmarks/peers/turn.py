"""One turn of one engine: started, warmed up, measured, ended."""

from __future__ import annotations

import random
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from bros_benchmarks.checkpoint import SMOLLM2_135M
from bros_benchmarks.load import Load
from bros_benchmarks.peers.engine import Engine
from bros_benchmarks.peers.other_load import OtherLoad

NUM_PROMPT_TOKENS: Final = 128
NUM_NEW_TOKENS: Final = 64
NUM_LONG_PROMPT_TOKENS: Final = 1024
_NUM_LONG_PROMPTS: Final = 3


@dataclass(frozen=True, slots=True)
class Turn:
    """What an engine did in a round."""

    #: A second, of one long prompt on an idle engine: its tokens by the time to the first new one, median of several.
    prefill_tokens_per_s: float
    #: By the number of clients.
    loads: dict[int, Load]
    #: Of the cores' time, what others took meanwhile.
    other_load: float


def take_turn(
    engine: Engine,
    model: Path,
    num_threads: int,
    clients: Sequence[int],
    log: Path,
    advance: Callable[[], None] = lambda: None,
) -> Turn:
    """The same prompts in every turn of every engine. `advance` is called once started, and after each load.

    Raises:
        EngineError: it did not start, or failed on the way.
    """
    with engine.start(model, num_threads, log) as send:
        generator = random.Random(0)
        # Every size once, briefly: engines that compile or reserve for a size do it now.
        for num_clients in clients:
            send(_prompts(num_clients, NUM_PROMPT_TOKENS, generator), 4)
        send(_prompts(1, NUM_LONG_PROMPT_TOKENS, generator), 1)
        advance()
        other_load = OtherLoad()
        times_s = [
            send(_prompts(1, NUM_LONG_PROMPT_TOKENS, generator), 1).timelines[0].ttft_s
            for _ in range(_NUM_LONG_PROMPTS)
        ]
        loads = {}
        for num_clients in clients:
            loads[num_clients] = send(_prompts(num_clients, NUM_PROMPT_TOKENS, generator), NUM_NEW_TOKENS)
            advance()
        return Turn(NUM_LONG_PROMPT_TOKENS / statistics.median(times_s), loads, other_load.share())


def _prompts(num_prompts: int, num_tokens: int, generator: random.Random) -> list[list[int]]:
    return [generator.choices(range(1, SMOLLM2_135M.vocab_size), k=num_tokens) for _ in range(num_prompts)]
