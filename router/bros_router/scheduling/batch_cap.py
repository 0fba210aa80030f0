"""How many sequences a step may hold, learned from how steps go."""

from __future__ import annotations

from enum import Enum
from typing import Final

#: Where the cap starts, and falls back to (BROS paper).
BASE: Final = 128
#: Steps in a row that no target held back before the cap grows. Our choice: the paper gives none.
_NUM_CLEAN_STEPS: Final = 8
_INCREMENT: Final = 16
_SMALLEST: Final = 8


class CapControl(str, Enum):
    """How the cap moves."""

    OFF = "off"  # it stays at its maximum
    RESET = "reset"  # the BROS paper's: doubles, and falls to the base when a target binds
    AIMD = "aimd"  # grows by steps, halves when a step is predicted too long, falls to the base on a miss


class BatchCap:
    """The most sequences of a step. The time budget is the hard limit; this is a safety against errors of the model."""

    def __init__(self, control: CapControl, maximum: int) -> None:
        self._control = control
        self._maximum = maximum
        self._base = min(BASE, maximum)
        self._num_clean_steps = 0
        self.value = maximum if control is CapControl.OFF else self._base

    def note_step(self, *, is_bound: bool, is_too_long: bool) -> None:
        """A step was composed.

        Args:
            is_bound: a target of a real-time sequence left work out.
            is_too_long: it is predicted to miss such a target.
        """
        if self._control is CapControl.OFF:
            return
        self._num_clean_steps = 0 if is_bound or is_too_long else self._num_clean_steps + 1
        if is_too_long and self._control is CapControl.AIMD:
            self.value = max(min(_SMALLEST, self._maximum), self.value // 2)
        elif is_bound and self._control is CapControl.RESET:
            self.value = self._base
        elif self._num_clean_steps == _NUM_CLEAN_STEPS:
            self._num_clean_steps = 0
            grown = self.value * 2 if self._control is CapControl.RESET else self.value + _INCREMENT
            self.value = min(self._maximum, grown)

    def note_miss(self) -> None:
        """A real-time sequence missed its targets."""
        if self._control is CapControl.AIMD:
            self.value = min(self.value, self._base)
