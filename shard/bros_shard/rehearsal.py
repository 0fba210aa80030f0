"""Made-up steps: they size memory, warm up what is built on first use, and measure how long steps take."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final

from bros_shard.block_layout import num_blocks_for
from bros_shard.protocol import NewSequence, SamplingParams, SequenceStep, StepPlan, StepShape

#: A step is timed this often, after one that does not count; the shortest time stands.
_NUM_TIMED_RUNS: Final = 2


@dataclass(frozen=True)
class Scene:
    """A step of like sequences: each has `num_past_tokens` in the cache and brings `num_tokens`."""

    num_sequences: int
    num_past_tokens: int
    num_tokens: int

    def shape(self) -> StepShape:
        """What the step's time depends on."""
        total = self.num_sequences * self.num_tokens
        if self.num_tokens == 1:
            return StepShape(0, self.num_sequences, 0.0, self.num_sequences * (self.num_past_tokens + 1))
        return StepShape(total, 0, total * (self.num_past_tokens + self.num_tokens / 2), 0)

    def clipped(self, max_length: int, max_batch_tokens: int) -> Scene:
        """The scene, made small enough for a model's longest sequence (and the token it samples) and a step's limit."""
        num_sequences = min(self.num_sequences, max_batch_tokens)
        num_tokens = min(self.num_tokens, max_batch_tokens // num_sequences, max_length - 1)
        return Scene(num_sequences, min(self.num_past_tokens, max_length - 1 - num_tokens), num_tokens)


#: From cheap to expensive: decodes over batch size and context, chunks over size and past.
PROFILED_SCENES: Final = (
    Scene(1, 63, 1),
    Scene(1, 511, 1),
    Scene(4, 127, 1),
    Scene(1, 0, 16),
    Scene(16, 127, 1),
    Scene(1, 0, 64),
    Scene(1, 448, 64),
    Scene(16, 511, 1),
    Scene(64, 127, 1),
    Scene(1, 0, 256),
)


def largest_scenes(max_batch_tokens: int, max_length: int) -> list[Scene]:
    """The steps that need the most scratch memory: one with the longest chunks, one that samples every token."""
    chunk = min(max_batch_tokens, max_length - 1)
    return [Scene(max_batch_tokens // chunk, 0, chunk), Scene(max_batch_tokens, 0, 1)]


class Rehearsal:
    """Plays scenes on a worker that has no sequences of its own yet."""

    def __init__(self, execute: Callable[[StepPlan], Any], num_blocks: int, block_size: int) -> None:
        self._execute = execute
        self._num_blocks = num_blocks
        self._block_size = block_size

    def run(self, scene: Scene) -> float:
        """Seconds that the scene's step takes."""
        return min([self._run_once(scene) for _ in range(1 + _NUM_TIMED_RUNS)][1:])

    def _run_once(self, scene: Scene) -> float:
        # The past is not computed: what the cache holds makes no difference to the time.
        num_total = scene.num_past_tokens + scene.num_tokens
        new = [
            NewSequence(sequence_id, [0] * num_total, num_total + 1, SamplingParams())
            for sequence_id in range(scene.num_sequences)
        ]
        self._execute(StepPlan(0, 0, new_sequences=new))
        width = num_blocks_for(num_total, self._block_size)
        steps = [
            SequenceStep(
                sequence_id,
                scene.num_past_tokens,
                scene.num_tokens,
                0,
                # Where the region is small, sequences share blocks: they overwrite each other, which costs the same.
                [block_id % self._num_blocks for block_id in range(sequence_id * width, (sequence_id + 1) * width)],
            )
            for sequence_id in range(scene.num_sequences)
        ]
        started_s = time.perf_counter()
        self._execute(StepPlan(0, 0, sequences=steps))
        seconds = time.perf_counter() - started_s
        self._execute(StepPlan(0, 0, releases=list(range(scene.num_sequences))))
        return seconds
