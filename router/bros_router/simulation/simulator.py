"""Discrete-event simulation of a server: its own scheduler and KV manager, a virtual clock, simulated devices."""

from __future__ import annotations

import heapq
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Protocol

from bros_router.admission import AdmissionController, AdmissionPolicy
from bros_router.kv.kv_manager import KVManager
from bros_router.scheduling.latency_model import LatencyModel
from bros_router.scheduling.policies.registry import PolicyOptions, make_policy, preemption_of
from bros_router.scheduling.scheduler import Scheduler
from bros_router.scheduling.step_draft import SchedulerLimits
from bros_router.simulation.clients import Clients
from bros_router.simulation.hardware import Hardware, profile
from bros_router.simulation.record import Ending, RequestRecord, Summary, summarise
from bros_router.simulation.replica import Replica, Timing
from bros_router.simulation.step_log import StepLog
from bros_router.simulation.workload import Workload
from bros_shard.protocol import StepShape


@dataclass(frozen=True, kw_only=True, slots=True)
class Setup:
    """How the simulated server is configured: the flags that matter."""

    policy: str = "bros"
    options: PolicyOptions = field(default_factory=PolicyOptions)
    limits: SchedulerLimits = field(default_factory=lambda: SchedulerLimits(2048, 256))
    block_size: int = 16
    #: Tokens of the KV region and of the host pool; `None`: what the hardware has.
    num_kv_tokens: int | None = None
    num_host_tokens: int | None = None
    admission_policy: AdmissionPolicy = AdmissionPolicy.QUEUE
    timing: Timing = field(default_factory=Timing)


def make_replica(setup: Setup, hardware: Hardware, points: Sequence[tuple[StepShape, float]]) -> Replica:
    """The one place where a simulated server is put together.

    Args:
        points: what its latency model is fitted to, as the ranks' warm-up would have measured it.
    """
    num_kv_tokens = hardware.num_kv_tokens if setup.num_kv_tokens is None else setup.num_kv_tokens
    num_host_tokens = hardware.num_host_tokens if setup.num_host_tokens is None else setup.num_host_tokens
    preemption = preemption_of(setup.policy, setup.options)
    kv = KVManager(num_kv_tokens // setup.block_size, setup.block_size, num_host_tokens // setup.block_size, preemption)
    model = LatencyModel(points, hardware.copies_overlap)
    limits = replace(setup.limits, can_interrupt=hardware.can_interrupt)
    policy = make_policy(setup.policy, model, limits, setup.options)
    admission = AdmissionController(model, limits.max_batch_tokens, num_kv_tokens, setup.admission_policy)
    return Replica(Scheduler(policy, kv, model, limits), kv, model, admission, hardware, setup.timing)


class Dispatcher(Protocol):
    """Decides which replica gets a request."""

    def choose(self, record: RequestRecord, replicas: Sequence[Replica], now_s: float) -> int:
        """Index of a replica."""
        ...


class Alone:
    """For a server that is one replica."""

    def choose(self, record: RequestRecord, replicas: Sequence[Replica], now_s: float) -> int:
        """The only one."""
        return 0


@dataclass(frozen=True, slots=True)
class Run:
    """A simulation that has ended."""

    workload: Workload
    #: In the order in which they were sent.
    records: list[RequestRecord]
    #: One for each replica.
    logs: list[StepLog]
    end_s: float

    def summary(self) -> Summary:
        """The run by its window."""
        return summarise(self.records, self.workload.start_s, self.workload.stop_s, self.end_s)


def simulate(
    workload: Workload, setup: Setup, hardware: Hardware, on_progress: Callable[[float], None] | None = None
) -> Run:
    """Run one server. The same arguments give the same run; hardware with noise must be as new.

    Args:
        on_progress: told the simulated time now and then.
    """
    return run([make_replica(setup, hardware, profile(hardware))], Alone(), workload, on_progress)


def run(
    replicas: Sequence[Replica],
    dispatcher: Dispatcher,
    workload: Workload,
    on_progress: Callable[[float], None] | None = None,
) -> Run:
    """Send the workload to replicas that have done nothing yet."""
    return _EventLoop(replicas, dispatcher, workload, on_progress).run()


class _EventLoop:
    """Lets clients and replicas act in order of time; at the same time, clients first."""

    def __init__(
        self,
        replicas: Sequence[Replica],
        dispatcher: Dispatcher,
        workload: Workload,
        on_progress: Callable[[float], None] | None,
    ) -> None:
        self._replicas = replicas
        self._dispatcher = dispatcher
        self._workload = workload
        self._clients = Clients(workload)
        self._now_s = 0.0
        #: (time, index of a replica). One that says another time by now was pushed again with that.
        self._agenda: list[tuple[float, int]] = []
        self._on_progress = on_progress
        self._next_progress_s = 0.0

    def run(self) -> Run:
        """Until the end of the workload."""
        while (time_s := self._next_s()) <= self._end_s():
            self._now_s = time_s
            if self._clients.next_s <= time_s:
                self._send()
            else:
                self._advance(heapq.heappop(self._agenda)[1])
            if self._on_progress is not None and time_s >= self._next_progress_s:
                self._next_progress_s = time_s + 1.0
                self._on_progress(time_s)
        for replica in self._replicas:
            replica.stop()
        end_s = max(self._now_s, self._end_s())
        return Run(self._workload, self._clients.records, [replica.log for replica in self._replicas], end_s)

    def _next_s(self) -> float:
        while self._agenda and self._agenda[0][0] != self._replicas[self._agenda[0][1]].next_s:
            heapq.heappop(self._agenda)
        replica_s = self._agenda[0][0] if self._agenda else math.inf
        return min(replica_s, self._clients.next_s)

    def _end_s(self) -> float:
        return self._workload.end_s if self._clients.num_rt_left else self._workload.stop_s

    def _send(self) -> None:
        record = self._clients.send()
        index = self._dispatcher.choose(record, self._replicas, self._now_s)
        replica = self._replicas[index]
        replica.submit(record, self._now_s)
        if record.ending is not Ending.UNFINISHED:
            self._note_end(record)
        self._push(index)

    def _advance(self, index: int) -> None:
        self._replicas[index].advance(self._now_s, self._note_end)
        self._push(index)

    def _note_end(self, record: RequestRecord) -> None:
        self._clients.note_end(record, self._now_s)

    def _push(self, index: int) -> None:
        next_s = self._replicas[index].next_s
        if next_s < math.inf:
            heapq.heappush(self._agenda, (next_s, index))
