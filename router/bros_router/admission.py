"""Admission: how many requests may be inside the server at once, and on which terms one more is accepted."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from enum import Enum
from typing import Final

from bros_router.request import (
    Admission,
    LatencyTargets,
    OverloadedError,
    RefusedError,
    RequestClass,
    Terms,
    ValidRequest,
)
from bros_router.scheduling.demand import Demand
from bros_router.scheduling.latency_model import LatencyModel
from bros_router.scheduling.memory_demand import MemoryDemand
from bros_shard.protocol import StepPlan, StepShape

#: Targets that nobody set are this many times what an idle server would need: "strict" in Sarathi-Serve's evaluation.
_DEFAULT_SLOWDOWN: Final = 5.0
#: The batch that a token's time is taken from, where nobody set it: large enough to be worth running.
_DEFAULT_BATCH: Final = 32
#: How far back the share of time that decoding takes is remembered: the length of a short reply.
_DECODE_MEMORY_S: Final = 2.0
#: Decoding never counts as all of the time, or nothing could be promised ever again.
_MAX_DECODE_SHARE: Final = 0.95


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


class AdmissionPolicy(str, Enum):
    """What becomes of a request whose target cannot be met. Only targets that somebody set are judged."""

    #: Accept it; the scheduler does its best.
    QUEUE = "queue"
    REJECT = "reject"
    #: Accept it, to be served after those that can meet theirs.
    DEGRADE = "degrade"
    #: Accept it with the earliest target that can be met.
    RELAX = "relax"


def default_targets(latency_model: LatencyModel, num_prompt_tokens: int, max_batch_tokens: int) -> LatencyTargets:
    """Targets where nobody set any: a few times what this prompt takes on an idle server, and its tokens in a batch.

    The first token of a short prompt is not wanted sooner than the others: that would leave a step no time for a batch.
    """
    batch = StepShape(
        num_decode_sequences=_DEFAULT_BATCH, decode_context_tokens=_DEFAULT_BATCH * (num_prompt_tokens + 1)
    )
    tpot_s = _DEFAULT_SLOWDOWN * latency_model.predict_s(batch)
    ttft_s = _DEFAULT_SLOWDOWN * latency_model.prefill_s(num_prompt_tokens, 0, max_batch_tokens)
    return LatencyTargets(max(ttft_s, tpot_s), tpot_s, are_given=False)


@dataclass(slots=True)
class _Queued:
    """A prompt that is not computed yet."""

    request_class: RequestClass
    num_prompt_tokens: int
    num_left_tokens: int
    #: Whether it is to be computed before those that are late.
    is_in_time: bool


class AdmissionController:
    """Judges requests, from what is queued and how long it takes. Pure: time is an argument.

    The owner asks `judge`, then reports what became of the request: `accepted`, `progressed`, `relegated`, `finished`
    where it got its last token, and `ended` whatever the reason.
    """

    def __init__(
        self,
        latency_model: LatencyModel,
        max_batch_tokens: int,
        num_kv_tokens: int,
        policy: AdmissionPolicy = AdmissionPolicy.QUEUE,
        max_queued_tokens: Mapping[RequestClass, int] | None = None,
    ) -> None:
        """Begin with an empty queue.

        Args:
            max_batch_tokens: the token budget of a step.
            num_kv_tokens: what the KV region holds.
            max_queued_tokens: most prompt tokens of a class that wait to be computed; absent or 0: any number.
        """
        self._latency_model = latency_model
        self._max_batch_tokens = max_batch_tokens
        self._memory = MemoryDemand(num_kv_tokens)
        self._policy = policy
        self._max_queued_tokens = dict(max_queued_tokens or {})
        self._queued: dict[int, _Queued] = {}
        self._num_queued_tokens = dict.fromkeys(RequestClass, 0)
        #: Those of real-time prompts that are in time.
        self._num_due_tokens = 0
        #: Under `queue` nobody asks for it. Work is in seconds as the clock counts them, decoding included.
        self._demand = None if policy is AdmissionPolicy.QUEUE else Demand()
        self._decode_share = 0.0
        self._decoded_s = -math.inf

    def judge(self, request: ValidRequest, now_s: float, num_held_tokens: int = 0, num_cached_tokens: int = 0) -> Terms:
        """The terms on which a request that arrives now would be accepted. Changes nothing.

        Args:
            num_held_tokens: room in the KV region that real-time sequences have which are in time.
            num_cached_tokens: so many tokens of its prompt need not be computed.

        Raises:
            OverloadedError: the queue of its class is full.
            RefusedError: its target cannot be met, and the policy is `reject`.
        """
        self._check_queue(request)
        if request.request_class is RequestClass.BE:
            return Terms(RequestClass.BE)
        targets = self._targets(request)
        terms = Terms(RequestClass.RT, targets)
        if self._demand is None or not targets.are_given:
            return terms
        work_s = self._work_s(len(request.prompt_token_ids), num_cached_tokens, now_s)
        deadline_s = now_s + targets.ttft_s
        wait_s = self._memory.wait_s(
            len(request.prompt_token_ids),
            request.max_new_tokens,
            targets.tpot_s,
            num_held_tokens=num_held_tokens,
            num_due_tokens=self._num_due_tokens,
        )
        earliest_s = self._demand.earliest_deadline_s(work_s, max(deadline_s, now_s + wait_s + work_s), now_s)
        if earliest_s <= deadline_s:
            return terms
        if self._policy is AdmissionPolicy.REJECT:
            raise RefusedError(earliest_s - deadline_s)
        if self._policy is AdmissionPolicy.DEGRADE:
            return replace(terms, admission=Admission.DEGRADED)
        relaxed = replace(targets, ttft_s=earliest_s - now_s)
        return replace(terms, targets=relaxed, admission=Admission.RELAXED)

    def accepted(
        self, sequence_id: int, request: ValidRequest, terms: Terms, now_s: float, num_cached_tokens: int = 0
    ) -> None:
        """A request was queued on these terms."""
        num_tokens = len(request.prompt_token_ids)
        num_left_tokens = num_tokens - num_cached_tokens
        is_in_time = terms.targets is not None and not terms.is_degraded
        self._queued[sequence_id] = _Queued(request.request_class, num_tokens, num_left_tokens, is_in_time)
        self._num_queued_tokens[request.request_class] += num_left_tokens
        self._num_due_tokens += num_left_tokens if is_in_time else 0
        if self._demand is not None and terms.targets is not None and is_in_time:
            self._demand.put(
                sequence_id,
                self._work_s(num_tokens, num_cached_tokens, now_s),
                now_s + terms.targets.ttft_s,
                is_binding=terms.targets.are_given,
                now_s=now_s,
            )

    def progressed(self, sequence_id: int, num_computed_tokens: int, now_s: float) -> None:
        """So many tokens of a sequence are computed: more than before, or none where it was preempted.

        Once the prompt is computed, the sequence waits no more; later calls say nothing.
        """
        queued = self._queued.get(sequence_id)
        if queued is None:
            return
        if num_computed_tokens >= queued.num_prompt_tokens:
            self.ended(sequence_id)
            return
        num_left = queued.num_prompt_tokens - num_computed_tokens
        self._num_queued_tokens[queued.request_class] += num_left - queued.num_left_tokens
        self._num_due_tokens += num_left - queued.num_left_tokens if queued.is_in_time else 0
        queued.num_left_tokens = num_left
        if self._demand is not None and sequence_id in self._demand:
            self._demand.change(sequence_id, self._work_s(queued.num_prompt_tokens, num_computed_tokens, now_s))

    def relegated(self, sequence_id: int) -> None:
        """A sequence can no longer meet its target: others go first, so it takes nothing from them."""
        queued = self._queued.get(sequence_id)
        if queued is not None and queued.is_in_time:
            queued.is_in_time = False
            self._num_due_tokens -= queued.num_left_tokens
        if self._demand is not None:
            self._demand.remove(sequence_id)

    def ended(self, sequence_id: int) -> None:
        """A sequence ended, whatever the reason."""
        self.relegated(sequence_id)
        queued = self._queued.pop(sequence_id, None)
        if queued is not None:
            self._num_queued_tokens[queued.request_class] -= queued.num_left_tokens

    def finished(self, request_class: RequestClass, num_output_tokens: int) -> None:
        """A request got its last token."""
        if request_class is RequestClass.RT:
            self._memory.note_output(num_output_tokens)

    def decoded(self, rt_decode_share: float, now_s: float) -> None:
        """A step ended; to decode its real-time sequences as often as they must be takes this share of the time."""
        remembered = math.exp(-(now_s - self._decoded_s) / _DECODE_MEMORY_S)
        self._decode_share = remembered * self._decode_share + (1.0 - remembered) * rt_decode_share
        self._decoded_s = now_s

    def step_ended(self, plan: StepPlan, rt_decode_share: float, now_s: float) -> None:
        """A step of this plan ended: chunks of prompts are computed, and real-time sequences were decoded."""
        for part in plan.sequences:
            if part.num_tokens > 1:
                self.progressed(part.sequence_id, part.num_computed_tokens + part.num_tokens, now_s)
        if not plan.is_interruption:  # those who decode in the step that it interrupts will do so again
            self.decoded(rt_decode_share, now_s)

    def drain_s(self, request_class: RequestClass, now_s: float) -> float:
        """Predicted seconds until the prompts that wait now are computed; best-effort ones wait for real-time ones."""
        num_tokens = self._num_queued_tokens[RequestClass.RT]
        if request_class is RequestClass.BE:
            num_tokens += self._num_queued_tokens[RequestClass.BE]
        step = StepShape().with_sequence(0, self._max_batch_tokens)
        per_token_s = self._latency_model.bound_s(step) / self._max_batch_tokens
        return num_tokens * per_token_s / (1.0 - self._share(now_s))

    def _check_queue(self, request: ValidRequest) -> None:
        """A queue that is empty takes any prompt, or the longest could never be served."""
        limit = self._max_queued_tokens.get(request.request_class)
        num_queued = self._num_queued_tokens[request.request_class]
        if limit and num_queued and num_queued + len(request.prompt_token_ids) > limit:
            raise OverloadedError

    def _targets(self, request: ValidRequest) -> LatencyTargets:
        """Those that were set, and the default of the other. They count as given where it is the TTFT that was."""
        targets = default_targets(self._latency_model, len(request.prompt_token_ids), self._max_batch_tokens)
        return LatencyTargets(
            ttft_s=targets.ttft_s if request.ttft_s is None else request.ttft_s,
            tpot_s=targets.tpot_s if request.tpot_s is None else request.tpot_s,
            are_given=request.ttft_s is not None,
        )

    def _work_s(self, num_prompt_tokens: int, num_computed_tokens: int, now_s: float) -> float:
        """Seconds until a prompt is computed, were it alone with the sequences that decode."""
        num_left_tokens = num_prompt_tokens - num_computed_tokens
        alone_s = self._latency_model.prefill_s(num_left_tokens, num_computed_tokens, self._max_batch_tokens)
        return self._latency_model.margin * alone_s / (1.0 - self._share(now_s))

    def _share(self, now_s: float) -> float:
        """Share of the time that real-time decoding needs; forgotten while nothing runs."""
        forgotten = math.exp(-max(0.0, now_s - self._decoded_s) / _DECODE_MEMORY_S)
        return min(_MAX_DECODE_SHARE, forgotten * self._decode_share)
