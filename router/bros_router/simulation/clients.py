"""The clients of a simulated server: they send what the workload says, when it says so."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterator

from bros_router.request import RequestClass
from bros_router.simulation.record import RequestRecord
from bros_router.simulation.workload import ClosedLoop, TraceRequest, Workload


class Clients:
    """Requests in order of time. Traces wait for nobody; a closed loop sends as its requests end."""

    def __init__(self, workload: Workload) -> None:
        #: One for each request that was sent, in that order.
        self.records: list[RequestRecord] = []
        #: Real-time requests that have not ended, those still to come included.
        self.num_rt_left = len(workload.rt)
        be = workload.be
        be_trace = () if isinstance(be, ClosedLoop) else be
        self._trace = deque(sorted([*workload.rt, *be_trace], key=lambda request: request.arrival_s))
        self._loop = be if isinstance(be, ClosedLoop) else None
        self._draws: Iterator[tuple[int, int]] = self._loop.draws() if self._loop else iter(())
        #: Requests of the closed loop that are due now, and those in the system.
        self._num_due = self._loop.num_requests if self._loop else 0
        self._num_looping = 0
        self._due_s = 0.0

    @property
    def next_s(self) -> float:
        """When the next request is sent; infinity: never, or not before another one ends."""
        if self._num_due:
            return self._due_s
        return self._trace[0].arrival_s if self._trace else math.inf

    def send(self) -> RequestRecord:
        """The request that is due at `next_s`."""
        if self._num_due:
            self._num_due -= 1
            self._num_looping += 1
            request = TraceRequest(self._due_s, RequestClass.BE, *next(self._draws))
        else:
            request = self._trace.popleft()
        record = RequestRecord(request, request.arrival_s)
        self.records.append(record)
        return record

    def note_end(self, record: RequestRecord, now_s: float) -> None:
        """A request has ended: a closed loop goes on."""
        if record.is_rt:
            self.num_rt_left -= 1
        elif self._loop is not None:
            self._num_looping -= 1
            self._due_s = now_s
            if not self._loop.is_grouped:
                self._num_due += 1
            elif self._num_looping == 0 and self._num_due == 0:
                self._num_due = self._loop.num_requests
