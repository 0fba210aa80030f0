"""Which share of real-time sequences met their targets lately."""

from __future__ import annotations

from collections import deque
from typing import Final

#: Share of the real-time sequences that are to meet their targets, before best-effort work gets more than its due.
ATTAINMENT_GOAL: Final = 0.99
#: How long a sequence counts, in seconds.
_WINDOW_S: Final = 60.0


class RecentAttainment:
    """The share over the last minute; 1.0 where there were none."""

    def __init__(self) -> None:
        self._finished: deque[tuple[float, bool]] = deque()
        self._num_met = 0

    def note(self, now_s: float, is_met: bool) -> None:
        """A sequence ended, or it became certain that it will miss."""
        self._finished.append((now_s, is_met))
        self._num_met += is_met

    def share(self, now_s: float) -> float:
        """The share at `now_s`."""
        while self._finished and self._finished[0][0] < now_s - _WINDOW_S:
            self._num_met -= self._finished.popleft()[1]
        return self._num_met / len(self._finished) if self._finished else 1.0
