"""Shows how far start-up has come: a bar on a terminal, a few lines elsewhere."""

from __future__ import annotations

import sys
import threading
import time
from typing import Final

import structlog
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

_LINE_PERIOD_S: Final = 10.0

log = structlog.get_logger()


class StartupProgress:
    """One bar (or line) per phase. May be called from any thread."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._phase = ""
        self._percent = 0
        self._next_line_s = 0.0
        self._bar: Progress | None = None
        self._task = TaskID(0)
        if sys.stderr.isatty():
            self._bar = Progress(
                TextColumn("{task.description}"),
                BarColumn(),
                TextColumn("{task.percentage:>3.0f}%"),
                TimeRemainingColumn(),
                console=Console(stderr=True),
                transient=True,
            )

    def update(self, phase: str, num_done: int, num_total: int) -> None:
        """`num_done` of `num_total` units (of bytes or of work) of the phase are done."""
        with self._lock:
            if self._bar is not None:
                self._draw(self._bar, phase, num_done, num_total)
            else:
                self._log(phase, num_done, num_total)
            self._phase = phase

    def close(self) -> None:
        """Remove the bar. May be called more than once."""
        with self._lock:
            if self._bar is not None:
                self._bar.stop()

    def _draw(self, bar: Progress, phase: str, num_done: int, num_total: int) -> None:
        if phase != self._phase:
            for task_id in bar.task_ids:
                bar.remove_task(task_id)
            self._task = bar.add_task(phase)
            bar.start()
        bar.update(self._task, completed=num_done, total=num_total or None)

    def _log(self, phase: str, num_done: int, num_total: int) -> None:
        """The first and the last state of a phase, and now and then one between."""
        now_s, percent = time.monotonic(), 100 * num_done // max(1, num_total)
        is_news = phase != self._phase or (percent != self._percent and (percent == 100 or now_s >= self._next_line_s))
        if is_news:
            self._percent, self._next_line_s = percent, now_s + _LINE_PERIOD_S
            log.info(phase, percent=percent)
