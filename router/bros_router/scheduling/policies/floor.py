"""The floor under best-effort sequences: when one gets something although real-time ones leave no time for it."""

from __future__ import annotations

from bros_router.scheduling.attainment import ATTAINMENT_GOAL, RecentAttainment
from bros_router.scheduling.sequence import Sequence


class Floor:
    """A sequence that starves is owed something, as long as that is not at the cost of missed targets."""

    def __init__(self, attainment: RecentAttainment, max_wait_s: float, *, is_hard: bool) -> None:
        """Lay the floor.

        Args:
            attainment: of the real-time sequences; their owner keeps it up to date.
            max_wait_s: the longest that a sequence goes without a token, in seconds, before it starves.
            is_hard: it is owed something even while real-time sequences miss their targets.
        """
        self._attainment = attainment
        self._max_wait_s = max_wait_s
        self._is_hard = is_hard

    def is_starving(self, sequence: Sequence, now_s: float) -> bool:
        """Whether the sequence got no token for too long."""
        since_s = sequence.arrival_s if sequence.last_token_s is None else sequence.last_token_s
        return now_s - since_s > self._max_wait_s

    def is_owed(self, sequence: Sequence, now_s: float) -> bool:
        """Whether the sequence gets something although there is no time for it."""
        return self.is_starving(sequence, now_s) and (self._is_hard or self._attainment.share(now_s) >= ATTAINMENT_GOAL)
