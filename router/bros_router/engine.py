"""The step loop: plan, send, commit, stream. It joins the pure scheduler to the ranks and to the clients.

Two steps are in flight while there is work: the next one is planned shortly before the one that runs is predicted to
end, so the ranks never wait for Python and a request that comes late still joins the next step.
"""

from __future__ import annotations

import asyncio
import time
from collections import deque
from dataclasses import dataclass
from types import TracebackType
from typing import Final

import structlog

from bros_router.admission import AdmissionController
from bros_router.kv.kv_manager import KVManager
from bros_router.metrics import Method, Metrics
from bros_router.planning_guard import PlanningGuard
from bros_router.ranked_tokens import ranked_tokens
from bros_router.request import (
    DeadlineError,
    Finish,
    FinishReason,
    GenerationError,
    PromptDetails,
    RequestClass,
    ServiceUnavailableError,
    Terms,
    Token,
    TokenEvent,
    ValidRequest,
)
from bros_router.scheduling.deadlines import met_targets
from bros_router.scheduling.latency_model import LatencyModel
from bros_router.scheduling.scheduler import Outcome, Scheduler, StepInFlight
from bros_router.scheduling.sequence import Sequence
from bros_router.shard_client import ShardError, ShardGroup
from bros_router.stop_sequences import stop_rule
from bros_router.tokenizer import Detokenizer, Tokenizer
from bros_shard.protocol import PromptLogprobs, StepPlan, StepResult

log = structlog.get_logger()


class Reply:
    """One accepted request's reply (`bros_router.request.Generation`): filled by the engine, read by a handler."""

    def __init__(
        self, engine: StepEngine, request: ValidRequest, terms: Terms, sequence: Sequence, tokenizer: Tokenizer
    ) -> None:
        self.sequence = sequence
        self.terms = terms
        #: What ends the reply at the deadline that the client gave.
        self.expiry: asyncio.TimerHandle | None = None
        self.request_id = request.request_id
        self.detokenizer: Detokenizer = tokenizer.detokenizer(request.prompt_token_ids)
        self.stop_rule = stop_rule(request.stop_sequences, cuts=request.cuts_stop_sequences)
        self.texts: list[str] = []
        #: What the ranks told of the prompt so far, where it was asked for; the first event takes it.
        self.prompt = _unknown_prompt(request)
        self.last_token_s: float | None = None
        self._engine = engine
        self._events: deque[TokenEvent] = deque()
        self._error: GenerationError | None = None
        self._is_complete = False
        self._wakeup = asyncio.Event()

    def push(self, event: TokenEvent) -> None:
        """Give the reader one more event. Never waits: what a slow reader has not read is bounded by the reply."""
        self._events.append(event)
        self._is_complete = event.finish is not None
        self._wakeup.set()

    def fail(self, error: GenerationError) -> None:
        """End the reply with an error, which the reader gets after the events before it."""
        self._error = error
        self._is_complete = True
        self._wakeup.set()

    @property
    def is_complete(self) -> bool:
        """Whether the last event, or an error, has been pushed."""
        return self._is_complete

    def __enter__(self) -> Reply:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if not self._is_complete:
            self._engine.abandon(self)

    def __aiter__(self) -> Reply:
        return self

    async def __anext__(self) -> TokenEvent:
        while not self._events:
            if self._error is not None:
                raise self._error
            if self._is_complete:
                raise StopAsyncIteration
            self._wakeup.clear()
            await self._wakeup.wait()
        return self._events.popleft()


@dataclass(frozen=True, slots=True)
class EngineModel:
    """What the engine must know of the model."""

    tokenizer: Tokenizer
    eos_token_ids: frozenset[int]
    vocab_size: int


#: One runs, one waits for it on the ranks. More would only shut out requests that arrive late.
_MAX_STEPS_IN_FLIGHT: Final = 2


@dataclass(frozen=True, slots=True)
class _SentStep:
    """A step that the ranks have, or had until its result came."""

    plan: StepPlan
    method: Method
    sent_s: float
    planned: StepInFlight
    result: asyncio.Future[StepResult]
    #: The ranks had nothing to do before it, or all the time: how long they waited for it says nothing.
    is_resuming: bool


class StepEngine:
    """Runs one group of ranks, step after step, for as long as there is work.

    All methods belong to the event loop's thread.
    """

    def __init__(
        self,
        scheduler: Scheduler,
        kv: KVManager,
        latency_model: LatencyModel,
        admission: AdmissionController,
        shards: ShardGroup,
        model: EngineModel,
        metrics: Metrics,
    ) -> None:
        self._scheduler = scheduler
        self._latency_model = latency_model
        self._admission = admission
        self._kv = kv
        self._shards = shards
        self._model = model
        self._metrics = metrics
        self._replies: dict[int, Reply] = {}
        self._next_sequence_id = 0
        self._is_accepting = True
        self._in_flight: deque[_SentStep] = deque()
        #: What is run in the middle of these.
        self._interruptions: list[_SentStep] = []
        self._guard = PlanningGuard()
        self._wakeup = asyncio.Event()
        #: The next step is the first after a time without work.
        self._is_resuming = True
        self._is_idle = asyncio.Event()
        self._is_idle.set()

    @property
    def is_healthy(self) -> bool:
        """Whether a request submitted now would be served."""
        return self._is_accepting and self._shards.is_alive

    @property
    def num_replies(self) -> int:
        """Accepted requests that have not ended."""
        return len(self._replies)

    def submit(self, request: ValidRequest) -> Reply:
        """Queue a request.

        Raises:
            ServiceUnavailableError: nothing is accepted now.
            OverloadedError: the queue of its class is full.
            RefusedError: its target cannot be met, and the operator wants such requests refused.
        """
        if not self._is_accepting:
            raise ServiceUnavailableError
        now_s = time.monotonic()
        # What was computed before tells nothing of how likely it was found.
        is_shared = request.num_prompt_top_tokens is None
        block_hashes = self._scheduler.block_hashes(request.prompt_token_ids, request.adapter) if is_shared else None
        num_cached_tokens = self._kv.num_cached_tokens(block_hashes or ())
        terms = self._admission.judge(request, now_s, self._scheduler.num_held_tokens(), num_cached_tokens)
        sequence = Sequence(
            sequence_id=self._next_sequence_id,
            request_class=terms.request_class,
            prompt_token_ids=request.prompt_token_ids,
            sampling=request.sampling,
            max_new_tokens=request.max_new_tokens,
            eos_token_ids=frozenset() if request.ignore_eos else self._model.eos_token_ids,
            arrival_s=now_s,
            targets=terms.targets,
            grammar=request.grammar,
            adapter=request.adapter,
            is_late=terms.is_degraded,
            block_hashes=block_hashes,
            num_cached_tokens=num_cached_tokens,
            num_prompt_top_tokens=request.num_prompt_top_tokens,
        )
        self._next_sequence_id += 1
        reply = Reply(self, request, terms, sequence, self._model.tokenizer)
        self._replies[sequence.sequence_id] = reply
        self._admission.accepted(sequence.sequence_id, request, terms, now_s, num_cached_tokens)
        self._scheduler.add(sequence)
        if request.deadline_s is not None:
            reply.expiry = asyncio.get_running_loop().call_later(request.deadline_s, self._expire, reply)
        self._is_idle.clear()
        self._wakeup.set()
        return reply

    def drain_s(self, request_class: RequestClass) -> float:
        """Predicted seconds until what waits in a class now has begun."""
        return self._admission.drain_s(request_class, time.monotonic())

    def abandon(self, reply: Reply) -> None:
        """The client is gone: end its sequence. Its blocks are free for the next plan."""
        if reply.sequence.sequence_id not in self._replies:
            return
        self._end(reply)
        self._metrics.request_failed("dropped")
        self._metrics.request_ended(reply.sequence.request_class, "dropped")
        log.info("request dropped by its client", request_id=reply.request_id)
        self._wakeup.set()  # the ranks are still to forget it

    def fail_all(self, message: str) -> None:
        """End every accepted request with an error: there is nobody left to serve them."""
        for reply in [*self._replies.values()]:
            self._fail(reply, GenerationError(message))

    def stop_accepting(self) -> None:
        """From now on `submit` refuses; what was accepted goes on."""
        self._is_accepting = False

    async def drained(self) -> None:
        """Wait until every accepted request has ended."""
        await self._is_idle.wait()

    def restart(self, generation: int) -> None:
        """The ranks were replaced: go on with every accepted request from the tokens its client has."""
        self._scheduler.restart(generation)
        now_s = time.monotonic()
        for sequence_id in self._replies:
            self._admission.progressed(sequence_id, 0, now_s)
        self._wakeup.set()

    async def run(self) -> None:
        """Run steps until the group fails.

        Raises:
            ShardError: the group failed. The accepted requests are unharmed and wait for `restart` or `fail_all`.
        """
        try:
            while True:
                await self._advance()
        finally:
            self._in_flight.clear()
            self._interruptions.clear()

    async def _advance(self) -> None:
        """Take in a result, or send a plan, or wait for a reason to do either."""
        if (step := self._take_finished()) is not None:
            self._commit(step)
            await asyncio.sleep(0)  # the clients' turn
            return
        now_s = time.monotonic()
        if await self._interrupt(now_s):
            return
        due_s = self._next_plan_due_s()
        if due_s is not None and due_s <= now_s:
            if await self._plan(now_s):
                return
            due_s = None  # there is nothing to plan before something happens
            if not self._in_flight:
                self._metrics.engine_idle()
                self._is_resuming = True
        await self._wait(due_s)

    def _take_finished(self) -> _SentStep | None:
        """A step whose result has come, in the order of the results."""
        for step in self._interruptions:
            if step.result.done():
                self._interruptions.remove(step)
                return step
        return self._in_flight.popleft() if self._in_flight and self._in_flight[0].result.done() else None

    async def _wait(self, until_s: float | None) -> None:
        """Wait for a result, a request, one that is gone, or the time."""
        self._wakeup.clear()
        loop = asyncio.get_running_loop()
        timer = None if until_s is None else loop.call_later(until_s - time.monotonic(), self._wakeup.set)
        await self._wakeup.wait()
        if timer is not None:
            timer.cancel()

    def _next_plan_due_s(self) -> float | None:
        """When the next step is to be planned; `None` while two are in flight."""
        if not self._in_flight:
            return 0.0
        if len(self._in_flight) == _MAX_STEPS_IN_FLIGHT:
            return None
        return self._scheduler.free_at_s(time.monotonic()) - self._guard.seconds

    async def _plan(self, now_s: float) -> bool:
        """Plan a step and send it. Returns whether there was one."""
        plan = self._scheduler.plan(now_s)
        self._observe_relegated()
        self._observe_queue()
        if plan is None:
            return False
        self._in_flight.append(await self._send(plan, now_s, is_resuming=self._is_resuming))
        self._is_resuming = False
        return True

    async def _interrupt(self, now_s: float) -> bool:
        """Send what cannot wait for the end of the step that runs. Returns whether there was something."""
        plan = self._scheduler.interrupt(now_s)
        self._observe_relegated()
        if plan is None:
            return False
        self._interruptions.append(await self._send(plan, now_s, is_resuming=True))
        self._metrics.step_interrupted()
        return True

    async def _send(self, plan: StepPlan, now_s: float, *, is_resuming: bool) -> _SentStep:
        method = _method_of(plan)
        self._metrics.step_sent(
            method,
            num_sequences=len(plan.sequences),
            num_new_sequences=len(plan.new_sequences),
            num_running=self._scheduler.num_running,
            max_tokens=self._scheduler.max_running_tokens,
            planning_s=time.monotonic() - now_s,
        )
        try:
            result = await self._shards.send(plan)
        except ShardError:
            self._metrics.step_failed(method)
            raise
        result.add_done_callback(lambda _: self._wakeup.set())
        planned = self._scheduler.last_step
        assert planned is not None
        self._observe_plan(plan, planned)
        return _SentStep(plan, method, now_s, planned, result, is_resuming)

    def _commit(self, step: _SentStep) -> None:
        try:
            result = step.result.result()
        except ShardError:
            self._metrics.step_failed(step.method)
            raise
        now_s = time.monotonic()
        self._admission.step_ended(step.plan, step.planned.rt_decode_share, now_s)
        for told in result.prompts:
            self._note_prompt(told)
        for part in result.sequences if step.planned.guesses else ():
            if part.num_speculative_tokens:
                self._metrics.tokens_guessed(part.num_speculative_tokens, num_accepted=len(part.tokens) - 1)
        for outcome in self._scheduler.commit(result, now_s):
            if outcome.sequence.sequence_id in self._replies:  # a token of the step may have been its last
                self._stream(outcome, now_s)
        self._metrics.step_finished(
            step.method,
            total_s=now_s - step.sent_s,
            forward_s=result.forward_s,
            sampling_s=result.sampling_s,
            taking_in_s=time.monotonic() - now_s,
        )
        if result.step_s > 0.0 and step.plan.sequences:
            self._metrics.step_predicted(step.planned.predicted_s, result.step_s, self._latency_model.margin)
        self._metrics.rank_worked(result.step_s, None if step.is_resuming else result.idle_s)
        if not step.is_resuming:
            self._guard.note_wait(result.idle_s)

    def _stream(self, outcome: Outcome, now_s: float) -> None:
        """Turn an outcome into the event that the client gets."""
        sequence = outcome.sequence
        reply = self._replies[sequence.sequence_id]
        if outcome.token_id is None or outcome.token_id >= self._model.vocab_size:
            log.error("sequence fault", request_id=reply.request_id, fault=outcome.fault)
            self._fail(reply, GenerationError("the model gave no valid token"))
            return
        text = reply.detokenizer.step(outcome.token_id)
        token = Token(
            outcome.token_id,
            text,
            outcome.logprob,
            self._model.tokenizer.is_special(outcome.token_id),
            ranked_tokens(outcome.top_tokens, self._model.tokenizer) if outcome.top_tokens else (),
        )
        shown = reply.stop_rule.take(text, is_special=token.is_special)
        reason = reply.stop_rule.judge(outcome.finish_reason)
        if reason is not None:
            shown += reply.stop_rule.rest()
        reply.texts.append(shown)
        self._observe_token(reply, now_s)
        prompt, reply.prompt = reply.prompt, None
        reply.push(TokenEvent(token, shown, self._finish(reply, reason, now_s) if reason else None, prompt))

    def _note_prompt(self, told: PromptLogprobs) -> None:
        """Keep what a step told of a prompt, if somebody waits for it still. What is told again is the same."""
        reply = self._replies.get(told.sequence_id)
        if reply is None or reply.prompt is None:
            return
        positions = range(told.first_position, len(reply.prompt.logprobs))
        for position, logprob in zip(positions, told.logprobs, strict=False):
            reply.prompt.logprobs[position] = logprob
        for position, top_tokens in zip(positions, told.top_tokens, strict=False):
            reply.prompt.top_tokens[position] = top_tokens

    def _finish(self, reply: Reply, reason: FinishReason, now_s: float) -> Finish:
        sequence = reply.sequence
        self._end(reply, is_complete=True)
        self._admission.finished(sequence.request_class, len(sequence.output_token_ids))
        self._judge_targets(sequence, is_complete=True)
        assert sequence.first_scheduled_s is not None
        return Finish(
            reason,
            "".join(reply.texts),
            len(sequence.output_token_ids),
            sequence.first_scheduled_s,
            now_s,
        )

    def _fail(self, reply: Reply, error: GenerationError) -> None:
        self._end(reply)
        self._judge_targets(reply.sequence, is_complete=False)
        reply.fail(error)

    def _expire(self, reply: Reply) -> None:
        """The deadline that the client gave has passed."""
        log.info("request expired", request_id=reply.request_id)
        self._fail(reply, DeadlineError(has_run=reply.sequence.first_scheduled_s is not None))
        self._wakeup.set()

    def _end(self, reply: Reply, *, is_complete: bool = False) -> None:
        """The one exit of a request: what it held is free, and nobody waits for it any more."""
        sequence = reply.sequence
        if reply.expiry is not None:
            reply.expiry.cancel()
        self._scheduler.finish(sequence, num_output_tokens=len(reply.texts), is_complete=is_complete)
        self._admission.ended(sequence.sequence_id)
        del self._replies[sequence.sequence_id]
        if not self._replies:
            self._is_idle.set()

    def _observe_token(self, reply: Reply, now_s: float) -> None:
        sequence = reply.sequence
        if reply.last_token_s is None:
            self._admission.progressed(sequence.sequence_id, sequence.num_prompt_tokens, now_s)
            assert sequence.first_scheduled_s is not None
            self._metrics.observe_first_token(
                sequence.request_class,
                queue_s=sequence.first_scheduled_s - sequence.arrival_s,
                ttft_s=now_s - sequence.arrival_s,
            )
            self._metrics.prompt_computed(
                sequence.request_class, sequence.num_prompt_tokens, num_cached=sequence.num_reused_tokens
            )
        else:
            self._metrics.observe_inter_token(sequence.request_class, now_s - reply.last_token_s)
        reply.last_token_s = now_s

    def _judge_targets(self, sequence: Sequence, *, is_complete: bool) -> None:
        """Count whether targets that somebody set were met; an error meets none."""
        if sequence.targets is not None and sequence.targets.are_given:
            is_ttft_met, is_tpot_met = met_targets(sequence) if is_complete else (False, False)
            self._metrics.targets_judged(is_ttft_met=is_ttft_met, is_tpot_met=is_tpot_met)

    def _observe_relegated(self) -> None:
        relegated = self._scheduler.take_relegated()
        for sequence in relegated:
            self._admission.relegated(sequence.sequence_id)
        if relegated:
            self._metrics.sequences_relegated(len(relegated))

    def _observe_plan(self, plan: StepPlan, planned: StepInFlight) -> None:
        self._metrics.set_batch_cap(planned.max_num_sequences)
        for request_class in RequestClass:
            num_victims = sum(victim is request_class for victim in planned.victims.values())
            if num_victims:
                self._metrics.sequences_preempted(request_class, num_victims)
        if plan.copies_out:
            self._metrics.blocks_copied("out", len(plan.copies_out))
        if plan.copies_in:
            self._metrics.blocks_copied("in", len(plan.copies_in))

    def _observe_queue(self) -> None:
        self._metrics.set_queue_size(self._scheduler.num_waiting)
        for request_class, (num_running, num_waiting) in self._scheduler.num_sequences().items():
            self._metrics.set_sequences(request_class, num_running=num_running, num_waiting=num_waiting)
        self._metrics.set_kv_blocks(
            rt=self._kv.num_used_blocks(RequestClass.RT),
            be=self._kv.num_used_blocks(RequestClass.BE),
            cached=self._kv.num_idle_blocks,
            free=self._kv.num_free_blocks - self._kv.num_idle_blocks,
        )


def _unknown_prompt(request: ValidRequest) -> PromptDetails | None:
    if request.num_prompt_top_tokens is None:
        return None
    num_tokens = len(request.prompt_token_ids)
    return PromptDetails([None] * num_tokens, [[] for _ in range(num_tokens)])


def _method_of(plan: StepPlan) -> Method:
    """TGI's word for a step: one that computes more than a token of any sequence has prefill in it."""
    return "prefill" if any(step.num_tokens > 1 for step in plan.sequences) else "decode"
