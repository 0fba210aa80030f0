"""What the benchmark asks of a server, or of an engine without one."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Protocol, TypeAlias

from bros_benchmarks.load import Load

#: Sends prompts, all at once, each for so many new tokens, and waits for the last.
SendAll: TypeAlias = Callable[[list[list[int]], int], Load]


class EngineError(Exception):
    """An engine could not be installed or started, or answered other than it should."""


class Engine(Protocol):
    """One engine with one format of weights. It runs while the context that `start` returns is entered."""

    @property
    def name(self) -> str:
        """As the table calls it."""

    @property
    def weights(self) -> str:
        """`bf16` or `int8`: only engines with the same are compared."""

    def prepare(self, model: Path) -> None:
        """Install what is missing, and convert the checkpoint `model`; slow the first time.

        Raises:
            EngineError: it could not.
        """

    def start(self, model: Path, num_threads: int, log: Path) -> AbstractContextManager[SendAll]:
        """A fresh one, ready when the context is entered and ended when it is left. What it says goes to `log`.

        Raises:
            EngineError: it did not become ready.
        """
