"""The router has a core of its own; what drives it and what it drives have the others."""

from __future__ import annotations

import os


def take_one_core() -> None:
    """Keep this process, and what it starts, on the first of its cores."""
    os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})


def leave_cores_of(pid: int) -> None:
    """Keep this process on all cores but those of another; where there are no others, on the same."""
    others = set(range(os.cpu_count() or 1)) - os.sched_getaffinity(pid)
    if others:
        os.sched_setaffinity(0, others)
