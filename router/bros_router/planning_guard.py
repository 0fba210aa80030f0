"""How long before the ranks run out of work the next step is planned."""

from __future__ import annotations

from typing import Final

#: The share of steps that may find the ranks waiting: earlier planning would shut out requests that arrive late.
_LATE_SHARE: Final = 0.05
#: A rank that waited for less than this for its next plan did not wait: decoding the frame takes as long.
_NO_WAIT_S: Final = 0.0005
#: How much the guard moves when a plan came late, as a share of itself and at least in seconds.
_STEP: Final = 0.25
_SMALLEST_STEP_S: Final = 0.0002
_SMALLEST_S: Final = 0.0005
_LARGEST_S: Final = 0.050


class PlanningGuard:
    """Follows the 95th percentile of how early a plan must be made for the ranks not to wait for it.

    Up by much when a plan came late, down by little when it did not, in the ratio at which both happen equally often
    when 5 % come late (a stochastic estimate of a quantile). It covers the time of planning, the way to the ranks
    and the error of the prediction alike.
    """

    def __init__(self) -> None:
        self.seconds = 0.003

    def note_wait(self, idle_s: float) -> None:
        """The ranks waited this long for a plan that was made while they still worked."""
        step_s = max(_SMALLEST_STEP_S, _STEP * self.seconds)
        change_s = step_s * (1.0 - _LATE_SHARE) if idle_s > _NO_WAIT_S else -step_s * _LATE_SHARE
        self.seconds = min(_LARGEST_S, max(_SMALLEST_S, self.seconds + change_s))
