"""How long a step may become by work that can wait: a real-time request that arrives just after it began must wait."""

from __future__ import annotations

import math
from collections import deque
from typing import Final

#: The share of a request's slack that waiting for the end of a step may take: of the least slack, of the lower
#: quartile (where the limit starts) and of the median. The rest is for the decodes in the step of the first token.
_LOW, _START, _HIGH = 0.4, 0.6, 0.7
#: Latest real-time requests that count, and for how long any of them does, in seconds.
_NUM_RECENT: Final = 64
_QUIET_S: Final = 300.0
#: By how much the limit grows with every target that was met, and shrinks with one that was missed. The two balance
#: when 0.6 % are missed.
_GROWTH: Final = 1.003
_SHRINKAGE: Final = 0.6
#: Where steps can be interrupted: how many times as long as the shortest step one may last, so that an eighth of the
#: time goes into what every step costs; and the share of the least recent time per output token that it may last at
#: most, since the second token of a sequence waits for the end of the step that its first one came in the middle of.
#: Longer steps gain little more, and real-time sequences accumulate until nothing is left for prompts.
_MOST_FLOORS: Final = 8.0
_TPOT_SHARE: Final = 0.7


class StepLimit:
    """Seconds of a step with work in it that can wait, between what the least and what the median of the recent slacks
    leaves: the slack of a request is its target for the first token, less the time that its prompt needs alone.

    Where a step can be interrupted, a request that cannot wait for its end does not have to, so what every step costs
    and the time per output token are the limit, if that is longer.

    A limit for the shortest target would cost best-effort work a fifth of its throughput where short prompts want
    their token much sooner than others, for the few that arrive at the wrong moment. So the limit is as long as
    nearly all targets are met.
    """

    def __init__(self, *, can_interrupt: bool = False) -> None:
        """`can_interrupt`: a request that cannot wait for the end of a step does not have to."""
        self._can_interrupt = can_interrupt
        self._recent_slack_s: deque[float] = deque(maxlen=_NUM_RECENT)
        self._recent_tpot_s: deque[float] = deque(maxlen=_NUM_RECENT)
        self._last_arrival_s = -math.inf
        self._low_s = self._start_s = self._high_s = math.inf
        self._factor = 1.0

    def seconds(self, now_s: float, shortest_s: float) -> float:
        """The limit; infinity where no real-time request has come for minutes.

        Args:
            shortest_s: how long a step with next to nothing in it takes.
        """
        if now_s - self._last_arrival_s > _QUIET_S:
            return math.inf
        limit_s = min(max(self._start_s * self._factor, self._low_s), self._high_s)
        if not self._can_interrupt:
            return limit_s
        return max(limit_s, min(_MOST_FLOORS * shortest_s, _TPOT_SHARE * min(self._recent_tpot_s)))

    def note_arrival(self, now_s: float, slack_s: float, tpot_s: float) -> None:
        """A real-time request came, with so much slack; one that has none asks for the impossible, and counts as 0."""
        self._recent_tpot_s.append(tpot_s)
        self._last_arrival_s = now_s
        self._recent_slack_s.append(max(0.001, slack_s))
        ordered = sorted(self._recent_slack_s)
        self._low_s = _LOW * ordered[0]
        self._start_s = max(self._low_s, _START * ordered[len(ordered) // 4])
        self._high_s = max(self._start_s, _HIGH * ordered[len(ordered) // 2])

    def note_first_token(self, late_by_s: float) -> None:
        """A real-time request got its first token so long after its target; negative: in time.

        One that is later than a step with best-effort work lasts would have been late without it too.
        """
        if late_by_s > self._start_s * self._factor:
            return
        factor = self._factor * (_SHRINKAGE if late_by_s > 0.0 else _GROWTH)
        self._factor = min(max(factor, self._low_s / self._start_s), self._high_s / self._start_s)
