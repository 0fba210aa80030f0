"""The step loop: plan, send, commit, stream. It joins the pure scheduler to the ranks and to the clients."""

from __future__ import annotations

import asyncio
import time
from collections import deque
from dataclasses import dataclass
from types import TracebackType

import structlog

from bros_router.kv.kv_manager import KVManager
from bros_router.metrics import Method, Metrics
from bros_router.request import (
    Finish,
    FinishReason,
    GenerationError,
    RequestClass,
    ServiceUnavailableError,
    Token,
    TokenEvent,
    ValidRequest,
)
from bros_router.scheduling.scheduler import Outcome, Scheduler
from bros_router.scheduling.sequence import Sequence
from bros_router.shard_client import ShardError, ShardGroup
from bros_router.stop_sequences import StopSequences
from bros_router.tokenizer import Detokenizer, Tokenizer
from bros_shard.protocol import StepPlan

log = structlog.get_logger()


class Reply:
    """One accepted request's reply (`bros_router.request.Generation`): filled by the engine, read by a handler."""

    def __init__(self, engine: StepEngine, request: ValidRequest, sequence: Sequence, tokenizer: Tokenizer) -> None:
        self.sequence = sequence
        self.request_id = request.request_id
        self.detokenizer: Detokenizer = tokenizer.detokenizer(request.prompt_token_ids)
        self.stop_sequences = StopSequences(request.stop_sequences)
        self.texts: list[str] = []
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


class StepEngine:
    """Runs one group of ranks, one step after the other, for as long as there is work.

    All methods belong to the event loop's thread.
    """

    def __init__(
        self, scheduler: Scheduler, kv: KVManager, shards: ShardGroup, model: EngineModel, metrics: Metrics
    ) -> None:
        self._scheduler = scheduler
        self._kv = kv
        self._shards = shards
        self._model = model
        self._metrics = metrics
        self._replies: dict[int, Reply] = {}
        self._next_sequence_id = 0
        self._is_accepting = True
        self._work = asyncio.Event()
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
        """
        if not self._is_accepting:
            raise ServiceUnavailableError
        sequence = Sequence(
            sequence_id=self._next_sequence_id,
            request_class=request.request_class,
            prompt_token_ids=request.prompt_token_ids,
            sampling=request.sampling,
            max_new_tokens=request.max_new_tokens,
            eos_token_ids=frozenset() if request.ignore_eos else self._model.eos_token_ids,
            arrival_s=time.monotonic(),
        )
        self._next_sequence_id += 1
        reply = Reply(self, request, sequence, self._model.tokenizer)
        self._replies[sequence.sequence_id] = reply
        self._scheduler.add(sequence)
        self._is_idle.clear()
        self._work.set()
        return reply

    def abandon(self, reply: Reply) -> None:
        """The client is gone: end its sequence. Its blocks are free for the next plan."""
        if self._replies.pop(reply.sequence.sequence_id, None) is None:
            return
        self._scheduler.finish(reply.sequence)
        self._metrics.request_failed("dropped")
        log.info("request dropped by its client", request_id=reply.request_id)
        self._note_idle()
        self._work.set()  # the ranks are still to forget it

    def fail_all(self, message: str) -> None:
        """End every accepted request with an error: there is nobody left to serve them."""
        for reply in [*self._replies.values()]:
            self._fail(reply, message)

    def stop_accepting(self) -> None:
        """From now on `submit` refuses; what was accepted goes on."""
        self._is_accepting = False

    async def drained(self) -> None:
        """Wait until every accepted request has ended."""
        await self._is_idle.wait()

    def restart(self, generation: int) -> None:
        """The ranks were replaced: go on with every accepted request from the tokens its client has."""
        self._scheduler.restart(generation)
        self._work.set()

    async def run(self) -> None:
        """Run steps until the group fails.

        Raises:
            ShardError: the group failed. The accepted requests are unharmed and wait for `restart` or `fail_all`.
        """
        follows_a_step = False
        while True:
            plan = self._scheduler.plan(time.monotonic())
            self._observe_queue()
            if plan is not None:
                await self._step(plan, follows_a_step)
                follows_a_step = True
                continue
            self._metrics.engine_idle()
            self._work.clear()
            await self._work.wait()
            follows_a_step = False

    async def _step(self, plan: StepPlan, follows_a_step: bool) -> None:
        method = _method_of(plan)
        self._metrics.step_sent(
            method,
            num_sequences=len(plan.sequences),
            num_new_sequences=len(plan.new_sequences),
            max_tokens=self._scheduler.max_running_tokens,
        )
        sent_s = time.monotonic()
        try:
            await self._shards.send(plan)
            result = await self._shards.result(plan.step_id)
        except ShardError:
            self._metrics.step_failed(method)
            raise
        now_s = time.monotonic()
        for outcome in self._scheduler.commit(result, now_s):
            self._stream(outcome, now_s)
        self._metrics.step_finished(
            method, total_s=now_s - sent_s, forward_s=result.forward_s, sampling_s=result.sampling_s
        )
        self._metrics.rank_worked(result.step_s, result.idle_s if follows_a_step else None)
        self._note_idle()

    def _stream(self, outcome: Outcome, now_s: float) -> None:
        """Turn an outcome into the event that the client gets."""
        sequence = outcome.sequence
        reply = self._replies[sequence.sequence_id]
        if outcome.token_id is None or outcome.token_id >= self._model.vocab_size:
            log.error("sequence fault", request_id=reply.request_id, fault=outcome.fault)
            self._fail(reply, "the model gave no valid token")
            return
        text = reply.detokenizer.step(outcome.token_id)
        token = Token(outcome.token_id, text, outcome.logprob, self._model.tokenizer.is_special(outcome.token_id))
        if not token.is_special:
            reply.texts.append(text)
        # Length and EOS go before a stop sequence: TGI's precedence.
        reason = outcome.finish_reason
        if reply.stop_sequences.is_reached(text) and reason is None:
            reason = FinishReason.STOP_SEQUENCE
        self._observe_token(reply, now_s)
        reply.push(TokenEvent(token, self._finish(reply, reason, now_s) if reason else None))

    def _finish(self, reply: Reply, reason: FinishReason, now_s: float) -> Finish:
        sequence = reply.sequence
        self._scheduler.finish(sequence)
        del self._replies[sequence.sequence_id]
        assert sequence.first_scheduled_s is not None
        return Finish(
            reason,
            "".join(reply.texts),
            len(sequence.output_token_ids),
            sequence.first_scheduled_s,
            now_s,
        )

    def _fail(self, reply: Reply, message: str) -> None:
        self._scheduler.finish(reply.sequence)
        del self._replies[reply.sequence.sequence_id]
        reply.fail(GenerationError(message))
        self._note_idle()

    def _observe_token(self, reply: Reply, now_s: float) -> None:
        sequence = reply.sequence
        if reply.last_token_s is None:
            self._metrics.observe_ttft(sequence.request_class, now_s - sequence.arrival_s)
        else:
            self._metrics.observe_inter_token(sequence.request_class, now_s - reply.last_token_s)
        reply.last_token_s = now_s

    def _observe_queue(self) -> None:
        self._metrics.set_queue_size(self._scheduler.num_waiting)
        self._metrics.set_kv_blocks(
            rt=self._kv.num_used_blocks(RequestClass.RT),
            be=self._kv.num_used_blocks(RequestClass.BE),
            free=self._kv.num_free_blocks,
        )

    def _note_idle(self) -> None:
        if not self._replies:
            self._is_idle.set()


def _method_of(plan: StepPlan) -> Method:
    """TGI's word for a step: one that computes more than a token of any sequence has prefill in it."""
    return "prefill" if any(step.num_tokens > 1 for step in plan.sequences) else "decode"
