"""Admission: how many requests may be inside the server at once."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager


class OverloadedError(Exception):
    """Every permit is taken."""


class Permits:
    """TGI's concurrency limit: nobody waits for a permit, and whoever has one keeps it until the reply has ended."""

    def __init__(self, num_permits: int) -> None:
        self._num_free = num_permits

    @contextmanager
    def take(self) -> Iterator[None]:
        """Hold one permit inside the `with` block.

        Raises:
            OverloadedError: none is free.
        """
        if self._num_free == 0:
            raise OverloadedError
        self._num_free -= 1
        try:
            yield
        finally:
            self._num_free += 1
