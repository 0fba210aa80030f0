"""Made-up steps: they size memory, warm up what is built on first use, and measure how long steps take."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from statistics import fmean
from typing import Any, Final

from bros_shard.block_layout import num_blocks_for
from bros_shard.protocol import HostCopy, NewSequence, SamplingParams, SequenceStep, StepPlan, StepShape

#: A step is timed this often, after one that does not count; the mean stands. The shortest would flatter: 5 to 15 %
#: less than what real steps take.
_NUM_TIMED_RUNS: Final = 2
#: Changes whenever the grids or how they are timed do: what was measured otherwise is measured again.
GRID_VERSION: Final = 1


@dataclass(frozen=True)
class Scene:
    """A made-up step."""

    #: Of each sequence: tokens in the cache, and tokens that it brings.
    sequences: tuple[tuple[int, int], ...]
    #: Tokens copied to the host pool.
    num_copied_tokens: int = 0

    def __add__(self, other: Scene) -> Scene:
        """Both in one step."""
        return Scene(self.sequences + other.sequences, self.num_copied_tokens + other.num_copied_tokens)

    def shape(self) -> StepShape:
        """What the step's time depends on."""
        shape = StepShape(num_copied_tokens=self.num_copied_tokens)
        for num_past_tokens, num_tokens in self.sequences:
            shape = shape.with_sequence(num_past_tokens, num_tokens)
        return shape

    def clipped(self, max_length: int, max_batch_tokens: int, num_host_slots: int = 0) -> Scene:
        """The scene, made small enough for a model's longest sequence (and the token it samples), a step's limit, and
        a host pool.
        """
        sequences = []
        room = max_batch_tokens
        for num_past_tokens, num_tokens in self.sequences:
            num_tokens = min(num_tokens, room, max_length - 1)
            if num_tokens == 0:
                break
            sequences.append((min(num_past_tokens, max_length - 1 - num_tokens), num_tokens))
            room -= num_tokens
        return Scene(tuple(sequences), min(self.num_copied_tokens, num_host_slots))

    def num_blocks(self, block_size: int) -> int:
        """Blocks that all its sequences fill."""
        return sum(num_blocks_for(sum(sequence), block_size) for sequence in self.sequences)


def decodes(num_sequences: int, mean_context_tokens: int) -> Scene:
    """Sequences that bring a token each. Their contexts are ragged, as those of requests are: 1/4 to 7/4 of the mean.

    Where all are of one length, attention is up to a third faster than with the ragged ones that a server meets.
    """
    if num_sequences == 1:
        return Scene(((mean_context_tokens - 1, 1),))
    contexts = (
        round(mean_context_tokens * (0.25 + 1.5 * index / (num_sequences - 1))) for index in range(num_sequences)
    )
    return Scene(tuple((max(0, context - 1), 1) for context in contexts))


def chunk(num_past_tokens: int, num_tokens: int, num_sequences: int = 1) -> Scene:
    """Sequences that prefill."""
    return Scene(((num_past_tokens, num_tokens),) * num_sequences)


def copies(num_tokens: int) -> Scene:
    """Tokens copied to the host pool beside one decoding sequence."""
    return Scene(((63, 1),), num_tokens)


#: Spans all that a step's time depends on, most telling scenes first: a slow device does not come to the end.
_QUICK: Final = (
    decodes(1, 64),
    chunk(0, 64),
    decodes(16, 128),
    chunk(0, 256),
    decodes(64, 128),
    decodes(4, 128),
    decodes(16, 512),
    chunk(448, 64),
    decodes(16, 256) + chunk(0, 64),
    chunk(0, 16),
    copies(1024),
    decodes(8, 128),
    decodes(32, 512),
    decodes(1, 512),
)
#: Beside the quick grid's: more sizes, longer contexts and pasts, and more mixtures, coarse before fine.
_FULL: Final = (
    decodes(8, 1024),
    decodes(32, 256),
    chunk(512, 256),
    decodes(4, 256) + chunk(0, 256),
    decodes(32, 256) + chunk(0, 64),
    decodes(16, 256) + chunk(512, 128),
    chunk(0, 128),
    chunk(0, 32),
    decodes(2, 128),
    decodes(24, 128),
    decodes(48, 256),
    decodes(128, 128),
    decodes(1, 1024),
    decodes(16, 1024),
    chunk(0, 8),
    chunk(0, 16, 4),
    chunk(0, 128, 4),
    chunk(1536, 64),
    decodes(48, 512) + chunk(0, 128),
    decodes(16, 256) + chunk(0, 496),
    decodes(32, 256) + chunk(256, 256),
    decodes(4, 512) + chunk(512, 64),
    copies(256),
    copies(4096),
    decodes(4, 1024),
    decodes(12, 256),
    decodes(96, 128),
    decodes(64, 512),
    decodes(32, 1024),
    chunk(0, 2),
    chunk(0, 48),
    chunk(0, 96),
    chunk(0, 192),
    chunk(0, 384),
    chunk(512, 16),
    chunk(512, 512),
    chunk(1536, 256),
    chunk(0, 16, 16),
    chunk(128, 32, 4),
    decodes(4, 256) + chunk(0, 16),
    decodes(16, 256) + chunk(0, 16),
    decodes(32, 256) + chunk(0, 16),
    decodes(48, 512) + chunk(0, 32),
    decodes(8, 512) + chunk(1024, 32),
    decodes(48, 256) + chunk(0, 448),
    decodes(256, 128),
)


def profiled_scenes(grid: str, max_length: int, max_batch_tokens: int, num_host_slots: int) -> list[Scene]:
    """The scenes of a grid, `quick` or `full`, that differ once they fit."""
    scenes = list(_QUICK) if grid == "quick" else [*_QUICK, *_FULL]
    # A large step, so that not the first real one touches all the memory that it needs.
    scenes.insert(len(_QUICK), largest_scenes(max_batch_tokens, max_length)[0])
    return list(dict.fromkeys(scene.clipped(max_length, max_batch_tokens, num_host_slots) for scene in scenes))


def largest_scenes(max_batch_tokens: int, max_length: int) -> list[Scene]:
    """The steps that need the most scratch memory: one with the longest chunks, one that samples every token."""
    num_tokens = min(max_batch_tokens, max_length - 1)
    return [chunk(0, num_tokens, max_batch_tokens // num_tokens), chunk(0, 1, max_batch_tokens)]


class Rehearsal:
    """Plays scenes on a worker that has no sequences of its own yet."""

    def __init__(self, execute: Callable[[StepPlan], Any], num_blocks: int, block_size: int) -> None:
        self._execute = execute
        self._num_blocks = num_blocks
        self._block_size = block_size

    def measure(self, scene: Scene) -> float:
        """Seconds that the scene's step takes once everything it needs is warm."""
        return fmean([self.play(scene) for _ in range(1 + _NUM_TIMED_RUNS)][1:])

    def play(self, scene: Scene) -> float:
        """Run the scene's step once. Returns the seconds that it took."""
        # The past is not computed: what the cache holds makes no difference to the time.
        new = [
            NewSequence(sequence_id, [0] * sum(sequence), sum(sequence) + 1, SamplingParams())
            for sequence_id, sequence in enumerate(scene.sequences)
        ]
        self._execute(StepPlan(0, 0, new_sequences=new))
        plan = StepPlan(0, 0, sequences=list(self._steps(scene)), copies_out=list(self._copies(scene)))
        started_s = time.perf_counter()
        self._execute(plan)
        seconds = time.perf_counter() - started_s
        self._execute(StepPlan(0, 0, releases=list(range(len(scene.sequences)))))
        return seconds

    def _steps(self, scene: Scene) -> Iterable[SequenceStep]:
        first_block = 0
        for sequence_id, (num_past_tokens, num_tokens) in enumerate(scene.sequences):
            width = num_blocks_for(num_past_tokens + num_tokens, self._block_size)
            # Where the region is small, sequences share blocks: they overwrite each other, which costs the same.
            entries = [block % self._num_blocks for block in range(first_block, first_block + width)]
            yield SequenceStep(sequence_id, num_past_tokens, num_tokens, 0, entries)
            first_block += width

    def _copies(self, scene: Scene) -> Iterable[HostCopy]:
        for host_block, first in enumerate(range(0, scene.num_copied_tokens, self._block_size)):
            num_tokens = min(self._block_size, scene.num_copied_tokens - first)
            # Reversed, as the blocks of best-effort sequences are, which are those that are copied.
            yield HostCopy(~(host_block % self._num_blocks), host_block, num_tokens)
