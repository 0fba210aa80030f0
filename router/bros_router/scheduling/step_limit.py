"""How long a step may become by best-effort work: a real-time request that arrives just after it began must wait."""

from __future__ import annotations

import math
from collections import deque
from typing import Final

#: The share of a target for the first token that waiting for the end of a step may take.
_SHARE: Final = 0.25
#: Latest real-time requests that count, and for how long any of them does, in seconds.
_NUM_RECENT: Final = 64
_QUIET_S: Final = 300.0
#: By how much the limit grows with every target that was met, and shrinks with one that was missed. The two balance
#: when 0.6 % are missed.
_GROWTH: Final = 1.003
_SHRINKAGE: Final = 0.6


class StepLimit:
    """Seconds of a step with best-effort work in it, between what the shortest of the recent targets and what the
    median of them leaves.

    Where all requests want the same, that is one value. Where short prompts want their token much sooner than others
    (targets in proportion to the prompt), a limit for the shortest would cost best-effort work a fifth of its
    throughput, for the few that arrive at the wrong moment: so it is as long as nearly all targets are met.
    """

    def __init__(self) -> None:
        self._recent_ttft_s: deque[float] = deque(maxlen=_NUM_RECENT)
        self._last_arrival_s = -math.inf
        self._low_s = self._start_s = self._high_s = math.inf
        self._factor = 1.0

    def seconds(self, now_s: float) -> float:
        """The limit; infinity where no real-time request has come for minutes."""
        if now_s - self._last_arrival_s > _QUIET_S:
            return math.inf
        return min(max(self._start_s * self._factor, self._low_s), self._high_s)

    def note_arrival(self, now_s: float, ttft_s: float) -> None:
        """A real-time request came that wants its first token within `ttft_s`."""
        self._last_arrival_s = now_s
        self._recent_ttft_s.append(ttft_s)
        ordered = sorted(self._recent_ttft_s)
        self._low_s = _SHARE * ordered[0]
        self._start_s = _SHARE * ordered[len(ordered) // 4]
        self._high_s = _SHARE * ordered[len(ordered) // 2]

    def note_first_token(self, late_by_s: float) -> None:
        """A real-time request got its first token so long after its target; negative: in time.

        One that is later than a step with best-effort work lasts would have been late without it too.
        """
        if late_by_s > self._start_s * self._factor:
            return
        factor = self._factor * (_SHRINKAGE if late_by_s > 0.0 else _GROWTH)
        self._factor = min(max(factor, self._low_s / self._start_s), self._high_s / self._start_s)
