"""How often a group of ranks may fail before the requests that wait for it are given up."""

from __future__ import annotations

from typing import Final

#: This many failures without a healthy minute in between: whoever waits gets an error instead of more waiting.
_MAX_FAILURES: Final = 3
_HEALTHY_AFTER_S: Final = 60.0
_MAX_DELAY_S: Final = 30.0


class Breaker:
    """Counts failures. The first restart is at once; after it 1, 2, 4, … and at most 30 seconds apart."""

    def __init__(self) -> None:
        self._num_failures = 0
        self._recovered_s = 0.0

    def note_failure(self, now_s: float) -> None:
        """The ranks failed, while running or while starting."""
        if now_s - self._recovered_s >= _HEALTHY_AFTER_S and self._recovered_s > 0.0:
            self._num_failures = 0
        self._recovered_s = 0.0
        self._num_failures += 1

    def note_recovery(self, now_s: float) -> None:
        """The ranks are ready again."""
        self._recovered_s = now_s

    @property
    def is_open(self) -> bool:
        """Whether waiting has become pointless."""
        return self._num_failures >= _MAX_FAILURES

    @property
    def delay_s(self) -> float:
        """How long to wait before the next start."""
        return 0.0 if self._num_failures <= 1 else min(_MAX_DELAY_S, 2.0 ** (self._num_failures - 2))
