"""One simulated replica: the server's own scheduler, and devices that take as long as the hardware says."""

from __future__ import annotations

import itertools
import math
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

from bros_router.admission import AdmissionController
from bros_router.kv.kv_manager import KVManager
from bros_router.planning_guard import PlanningGuard
from bros_router.request import OverloadedError, RefusedError, RequestClass, ValidRequest
from bros_router.scheduling.latency_model import LatencyModel
from bros_router.scheduling.scheduler import Outcome, Scheduler, StepInFlight
from bros_router.scheduling.sequence import Sequence
from bros_router.simulation.hardware import Hardware
from bros_router.simulation.record import Ending, RequestRecord
from bros_router.simulation.step_log import StepLog
from bros_shard.protocol import SampledToken, SamplingParams, SequenceResult, StepPlan, StepResult

#: Every token of every sequence. Which one does not matter: nobody stops early.
_TOKEN: Final = SampledToken(1)
_SAMPLING: Final = SamplingParams()


@dataclass(frozen=True, slots=True)
class Timing:
    """How the step loop between the router and its ranks keeps time."""

    #: Steps that were sent and are not committed: 1, or 2 as in the server.
    max_steps_in_flight: int = 2
    #: From the moment for which a step is planned to its arrival on the ranks.
    send_s: float = 0.001
    #: From the end of a step on the ranks to its tokens.
    return_s: float = 0.0005
    #: From a client to the scheduler, and with a token from there to the client: added to what clients see.
    client_s: float = 0.0


@dataclass(slots=True, eq=False)
class _Step:
    plan: StepPlan
    planned: StepInFlight
    results: list[SequenceResult]
    start_s: float
    end_s: float
    #: Position in the log.
    index: int
    #: How long the devices had nothing to do before it.
    idle_s: float = 0.0
    #: They had nothing to do for want of work, not because this plan came late; or it interrupts another.
    is_resuming: bool = True
    #: How long steps ran in the middle of it.
    interrupted_s: float = 0.0


class Replica:
    """One scheduler and its devices. Time is an argument; `next_s` says when it wants to be called."""

    def __init__(
        self,
        scheduler: Scheduler,
        kv: KVManager,
        model: LatencyModel,
        admission: AdmissionController,
        hardware: Hardware,
        timing: Timing,
    ) -> None:
        self.log = StepLog()
        self.scheduler = scheduler
        self.model = model
        #: Accepted requests that have not ended: how many, how many tokens they grow to, and how many prompt tokens
        #: of real-time ones without a first token are among these.
        self.num_requests = 0
        self.num_tokens = 0
        self.num_rt_prompt_tokens = 0
        self._kv = kv
        self._admission = admission
        self._hardware = hardware
        self._timing = timing
        self._guard = PlanningGuard()
        self._open: dict[int, tuple[Sequence, RequestRecord]] = {}
        self._results: dict[int, SequenceResult] = {}
        self._prompts: dict[int, tuple[int, ...]] = {}
        self._num_submitted = 0
        self._steps: deque[_Step] = deque()
        #: What is run in the middle of these, each maybe in the middle of the one before.
        self._interruptions: list[_Step] = []
        #: When the devices have done all that was sent to them.
        self._free_s = 0.0
        #: When to plan; infinity: not before something happens.
        self._plan_s = math.inf
        self._is_resuming = True

    @property
    def next_s(self) -> float:
        """When `advance` has something to do; infinity where only a request can change anything."""
        return min(self._plan_s, self._commit_s)

    def free_s(self, now_s: float) -> float:
        """When the devices are predicted to have done all that was sent to them."""
        return self.scheduler.free_at_s(now_s)

    def submit(self, record: RequestRecord, now_s: float) -> None:
        """Accept a request, or reject it: admission refuses it, or it can never fit."""
        request = self._validated(record)
        num_tokens = len(request.prompt_token_ids) + request.max_new_tokens
        record.ending = Ending.REJECTED
        if num_tokens > min(self._hardware.max_length, self._kv.num_blocks * self._kv.block_size):
            return
        try:
            terms = self._admission.judge(request, now_s, self.scheduler.num_held_tokens())
        except (OverloadedError, RefusedError):
            return
        record.ending = Ending.UNFINISHED
        sequence_id = self._num_submitted
        self._num_submitted += 1
        sequence = Sequence(
            sequence_id,
            terms.request_class,
            request.prompt_token_ids,
            request.sampling,
            request.max_new_tokens,
            eos_token_ids=frozenset(),
            arrival_s=record.offered_s,
            targets=terms.targets,
            is_late=terms.is_degraded,
        )
        self._open[sequence_id] = (sequence, record)
        self._results[sequence_id] = SequenceResult(sequence_id, [_TOKEN])
        self.num_requests += 1
        self.num_tokens += num_tokens
        self.num_rt_prompt_tokens += sequence.num_prompt_tokens if record.is_rt else 0
        self._admission.accepted(sequence_id, request, terms, now_s)
        self.scheduler.add(sequence)
        if self._plan_s == math.inf and len(self._steps) < self._timing.max_steps_in_flight:
            self._plan_s = self._due_s(now_s)
        self._interrupt(now_s)

    def advance(self, now_s: float, on_end: Callable[[RequestRecord], None]) -> None:
        """Do what is due: take in the tokens of a step, plan the next one, or both.

        Args:
            on_end: told of every request that ended.
        """
        if self._commit_s <= now_s:
            self._commit(now_s, on_end)
            self._interrupt(now_s)
        if self._plan_s <= now_s:
            self._plan(now_s)

    def stop(self) -> None:
        """The run is over: note on those that have not ended whether they were relegated."""
        for sequence, record in self._open.values():
            record.was_relegated = sequence.is_late

    @property
    def _commit_s(self) -> float:
        first = self._first_to_end
        return first.end_s + self._timing.return_s if first is not None else math.inf

    @property
    def _first_to_end(self) -> _Step | None:
        return min([*self._interruptions, *itertools.islice(self._steps, 1)], key=lambda step: step.end_s, default=None)

    def _due_s(self, now_s: float) -> float:
        """When to plan the next step: just in time, or at once where none runs."""
        if not self._steps:
            return now_s
        return max(now_s, self.free_s(now_s) - self._guard.seconds)

    def _plan(self, now_s: float) -> None:
        self._plan_s = math.inf
        plan, planning_s = self._ask(self.scheduler.plan, now_s)
        if plan is None:
            self._is_resuming = not self._steps
            return
        # The devices run the step as soon as it has arrived and they have done all that came before.
        step = self._begin(plan, max(now_s + self._timing.send_s, self._free_s), planning_s)
        step.idle_s = step.start_s - self._free_s
        step.is_resuming, self._is_resuming = self._is_resuming, False
        self._free_s = step.end_s
        self._steps.append(step)
        if len(self._steps) < self._timing.max_steps_in_flight:
            self._plan_s = self._due_s(now_s)

    def _interrupt(self, now_s: float) -> None:
        """Run what cannot wait in the middle of what runs, which ends later by that. Layers are short: it begins at
        once."""
        plan, planning_s = self._ask(self.scheduler.interrupt, now_s)
        if plan is None:
            return
        step = self._begin(plan, now_s + self._timing.send_s, planning_s)
        seconds = step.end_s - step.start_s
        for other in [*self._steps, *self._interruptions]:
            if step.start_s < other.end_s:
                other.end_s += seconds
                if step.start_s < other.start_s:
                    other.start_s += seconds
                else:
                    other.interrupted_s += seconds
        self._interruptions.append(step)
        self._free_s = max(self._steps[-1].end_s, step.end_s)
        if len(self._steps) < self._timing.max_steps_in_flight:
            self._plan_s = self._due_s(now_s)

    def _ask(self, decide: Callable[[float], StepPlan | None], now_s: float) -> tuple[StepPlan | None, float]:
        """What the scheduler decides, and the real seconds that it took. Admission hears of those it gave up."""
        began_s = time.perf_counter()
        plan = decide(now_s)
        planning_s = time.perf_counter() - began_s
        for sequence in self.scheduler.take_relegated():
            self._admission.relegated(sequence.sequence_id)
        return plan, planning_s

    def _begin(self, plan: StepPlan, start_s: float, planning_s: float) -> _Step:
        planned = self.scheduler.last_step
        assert planned is not None
        shape = planned.shape
        seconds = self._hardware.seconds(shape)
        # A result too many does no harm: the scheduler knows for which sequences the step samples a token.
        results = [self._results[part.sequence_id] for part in plan.sequences]
        step = _Step(plan, planned, results, start_s, start_s + seconds, len(self.log))
        self.log.add(
            start_s,
            seconds,
            planned.predicted_s,
            len(plan.sequences),
            shape.num_prefill_tokens + shape.num_decode_sequences,
            self._kv.num_used_blocks(RequestClass.RT) / self._kv.num_blocks,
            planning_s,
        )
        return step

    def _commit(self, now_s: float, on_end: Callable[[RequestRecord], None]) -> None:
        step = self._first_to_end
        assert step is not None
        if step in self._interruptions:
            self._interruptions.remove(step)
        else:
            self._steps.popleft()
        seconds = step.end_s - step.start_s - step.interrupted_s
        result = StepResult(step.plan.generation, step.plan.step_id, step.results, seconds, 0.0, seconds, step.idle_s)
        self._admission.step_ended(step.plan, step.planned.rt_decode_share, now_s)
        began_s = time.perf_counter()
        outcomes = self.scheduler.commit(result, now_s)
        self.log.planning_s[step.index] += time.perf_counter() - began_s
        for outcome in outcomes:
            self._take(outcome, now_s, on_end)
        if not step.is_resuming:
            self._guard.note_wait(step.idle_s)
        self._plan_s = self._due_s(now_s)

    def _take(self, outcome: Outcome, now_s: float, on_end: Callable[[RequestRecord], None]) -> None:
        """Write a token down."""
        sequence_id = outcome.sequence.sequence_id
        sequence, record = self._open[sequence_id]
        assert outcome.token_id is not None, "simulated devices have no faults"
        record.token_s.append(now_s + self._timing.client_s)
        if len(record.token_s) == 1:
            self._admission.progressed(sequence_id, sequence.num_prompt_tokens, now_s)
            self.num_rt_prompt_tokens -= sequence.num_prompt_tokens if record.is_rt else 0
        if outcome.finish_reason is None:
            return
        record.ending = Ending.FINISHED
        record.was_relegated = sequence.is_late
        self.num_requests -= 1
        self.num_tokens -= sequence.max_total_tokens
        self._admission.finished(sequence.request_class, len(sequence.output_token_ids))
        self._admission.ended(sequence_id)
        del self._open[sequence_id], self._results[sequence_id]
        on_end(record)

    def _validated(self, record: RequestRecord) -> ValidRequest:
        request = record.request
        return ValidRequest(
            request_id="",
            prompt_token_ids=self._prompts.setdefault(request.num_prompt_tokens, (0,) * request.num_prompt_tokens),
            sampling=_SAMPLING,
            max_new_tokens=request.num_output_tokens,
            ignore_eos=True,
            request_class=request.request_class,
            ttft_s=request.ttft_s,
            tpot_s=request.tpot_s,
        )
