"""Search for the goodput: the highest rate at which enough real-time requests meet their targets."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Final

#: Joint attainment that a goodput stands for.
LEVEL: Final = 0.99
#: By so many places of the grid the rate grows or shrinks at first; then by as many as were crossed so far.
_FIRST_STRIDE = 4


@dataclass(slots=True)
class GoodputSearch:
    """Bisection over the geometric grid of rates `first * ratio ** k`.

    It says which rate to try next and is told what came of it, so that several searches can take turns. Attainment
    falls with the rate, but for noise; where it does not, the lowest rate that fails decides.
    """

    first: float
    #: Step of the grid, and thus the resolution of the result.
    ratio: float
    #: Shares of requests, 0 to 1, each searched for.
    levels: tuple[float, ...] = (LEVEL, 0.90)
    #: Rates outside are not tried: below, the goodput counts as 0.
    lowest: float = 0.0
    highest: float = math.inf
    #: Attainment by place on the grid.
    results: dict[int, float] = field(default_factory=dict)

    @property
    def next_rate(self) -> float | None:
        """The rate to try now; `None`: all levels are known."""
        place = self._next_place()
        return None if place is None else self.rate_of(place)

    def record(self, attainment: float) -> None:
        """What came of `next_rate`."""
        place = self._next_place()
        assert place is not None, "nothing was to be tried"
        self.results[place] = attainment

    def goodput(self, level: float) -> float:
        """Requests a second; 0 where even the lowest rate fails. What is not known yet counts as failing."""
        place, _ = bracket(self.results, level)
        return 0.0 if place is None else self.rate_of(place)

    def rate_of(self, place: int) -> float:
        """A rate of the grid."""
        return self.first * self.ratio**place

    def _next_place(self) -> int | None:
        for level in self.levels:
            place = self._next_place_for(level)
            if place is not None:
                return place
        return None

    def _next_place_for(self, level: float) -> int | None:
        passes, fails = bracket(self.results, level)
        stride = max(_FIRST_STRIDE, max(self.results, default=0) - min(self.results, default=0))
        if passes is None and fails is None:
            place = 0
        elif fails is None:
            assert passes is not None
            place = passes + stride
        elif passes is None:
            place = fails - stride
        else:
            place = (passes + fails) // 2
        # Where a stride leaves the range, its last place is tried instead.
        while self.rate_of(place) > self.highest:
            place -= 1
        while self.rate_of(place) < self.lowest:
            place += 1
        return None if place in self.results else place


def bracket(results: Mapping[int, float], level: float) -> tuple[int | None, int | None]:
    """(highest place that passes below the lowest that fails, lowest that fails)."""
    fails = min((place for place, attainment in results.items() if attainment < level), default=None)
    passing = [place for place in results if fails is None or place < fails]
    return max(passing, default=None), fails
