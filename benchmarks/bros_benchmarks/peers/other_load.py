"""How much of the cores others took while something was measured: more than a little, and it says nothing."""

from __future__ import annotations

import time

import psutil


class OtherLoad:
    """Counts from when it is made. Processes that we started before are ours; those that start later are not."""

    def __init__(self) -> None:
        own = psutil.Process()
        self._own = [own, *own.children(recursive=True)]
        self._start_s = time.perf_counter()
        self._start_busy_s = _busy_s()
        self._start_own_s = self._own_s()

    def share(self) -> float:
        """Of all cores' time since the start, what neither we nor our processes took, and what a hypervisor took."""
        seconds = (time.perf_counter() - self._start_s) * (psutil.cpu_count() or 1)
        others_s = _busy_s() - self._start_busy_s - (self._own_s() - self._start_own_s)
        return max(0.0, others_s / seconds)

    def _own_s(self) -> float:
        # The processes live as long as the engine does, so none is missing at the end.
        times = [process.cpu_times() for process in self._own if process.is_running()]
        return float(sum(taken.user + taken.system for taken in times))


def _busy_s() -> float:
    times = psutil.cpu_times()
    return float(times.user + times.nice + times.system + times.irq + times.softirq + times.steal)
