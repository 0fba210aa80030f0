"""Says, from the share of the budget spent, how long the rows are and how fast to learn."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

#: Learning rate: a linear rise, a plateau, then a linear fall to zero (warmup-stable-decay, Hu et al. 2024,
#: arXiv:2404.06395, section 4.2). Unlike a cosine, the fall may begin at any moment, so a run can be cut short.
WARMUP_STEPS: Final = 60
DECAY_FROM: Final = 0.6
#: (from this share of the budget on, row length). Short rows first: they are twice as fast as long ones.
ROW_LENGTHS: Final = ((0.0, 256), (0.6, 512), (0.85, 2048))


@dataclass
class Budget:
    """Either wall-clock seconds or a number of steps; a run with steps is repeatable to the bit."""

    seconds: float | None
    steps: int | None

    def progress(self, elapsed_s: float, step: int) -> float:
        """Share of the budget spent, from 0 to 1."""
        if self.steps is not None:
            return min(1.0, step / self.steps)
        assert self.seconds is not None, "a budget has one of its two limits"
        return min(1.0, elapsed_s / self.seconds)

    def cut_short(self, elapsed_s: float, step: int) -> None:
        """Shrink the budget so that the decay begins now."""
        if self.progress(elapsed_s, step) >= DECAY_FROM:
            return
        if self.steps is not None:
            self.steps = round(step / DECAY_FROM)
        else:
            self.seconds = elapsed_s / DECAY_FROM


def learning_rate_factor(progress: float, step: int) -> float:
    """What the peak learning rates are multiplied by at this step, counted from 0."""
    warmup = min(1.0, (step + 1) / WARMUP_STEPS)
    decay = min(1.0, (1.0 - progress) / (1.0 - DECAY_FROM))
    return warmup * decay


def row_length(progress: float) -> int:
    return next(length for start, length in reversed(ROW_LENGTHS) if progress >= start)
