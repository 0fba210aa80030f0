"""One call for inference, from its decoded body to its last token: what every dialect shares."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Iterator, Mapping
from contextlib import ExitStack, asynccontextmanager, contextmanager
from dataclasses import dataclass, replace

import msgspec
import structlog
from aiohttp import web
from opentelemetry.trace import Span

from bros_router import tracing
from bros_router.admission import Permits
from bros_router.api import errors
from bros_router.api.dialect import Dialect
from bros_router.api.service_level import ServiceLevel
from bros_router.api.together import together
from bros_router.api.validation import NUM_JUDGED_NEW_TOKENS, InferenceRequest, Validator
from bros_router.chat_templates.renderer import TemplateRenderer
from bros_router.config import ApiConfig
from bros_router.metrics import Metrics
from bros_router.request import (
    DeadlineError,
    Engine,
    Finish,
    Generation,
    GenerationError,
    OverloadedError,
    PromptDetails,
    RefusedError,
    RequestClass,
    ServiceUnavailableError,
    Token,
    TokenEvent,
    ValidRequest,
)
from bros_router.service import ServedModel, Service


@dataclass(frozen=True, kw_only=True)
class Timeouts:
    """How long the HTTP side waits, in seconds."""

    #: For a whole request body.
    body_s: float = 10.0
    #: Between two signs of life in a stream: TGI's.
    keep_alive_s: float = 15.0
    #: For a client that does not read its stream.
    write_s: float = 30.0


@dataclass(frozen=True, kw_only=True)
class Api:
    """What the handlers work with."""

    config: ApiConfig
    dialect: Dialect
    service: Service
    metrics: Metrics
    validator: Validator
    templates: TemplateRenderer
    permits: Mapping[RequestClass, Permits]
    timeouts: Timeouts

    def served(self) -> tuple[ServedModel, Engine]:
        """The model and its engine. Raises `UnavailableError` where a request sent now would not be served."""
        model, engine = self.service.model, self.service.engine
        if not self.service.is_ready or model is None or engine is None:
            raise errors.UnavailableError(self.service.phase)
        return model, engine

    def model(self) -> ServedModel:
        """The model. Raises `UnavailableError` while it is not known."""
        if self.service.model is None:
            raise errors.UnavailableError(self.service.phase)
        return self.service.model

    def check_room(self, num_requests: int) -> None:
        """Refuse a body of more requests than there are permits before it takes time. Raises `OverloadedError`."""
        if num_requests > self.config.max_concurrent_requests + self.config.max_concurrent_be_requests:
            raise OverloadedError


API = web.AppKey("api", Api)

log = structlog.get_logger()


@dataclass(frozen=True, slots=True)
class Timings:
    """Where the time of an answered request went, in seconds."""

    total_s: float
    validation_s: float
    queue_s: float
    inference_s: float


class Call:
    """An accepted call: iterate over `events`, or over `generation` and report how it went with `succeeded`."""

    def __init__(self, api: Api, request: ValidRequest, generation: Generation, arrived_s: float, span: Span) -> None:
        self.request = request
        self.generation = generation
        self._api = api
        self._arrived_s = arrived_s
        self._span = span
        self._queued_s = time.monotonic()

    @property
    def seed(self) -> int | None:
        """The seed as replies show it: greedy generation has none."""
        return self.request.sampling.seed if self.request.sampling.do_sample else None

    async def events(self) -> AsyncIterator[TokenEvent]:
        """The reply, token by token. It has succeeded once its last event is handed out.

        Raises:
            IncompleteStreamError: there was no last event.
        """
        async for event in self.generation:
            if event.finish is not None:
                self.succeeded(event.finish)
            yield event
            if event.finish is not None:
                return
        raise errors.IncompleteStreamError

    def succeeded(self, finish: Finish) -> Timings:
        """The last token was received: count it, and say where the time went."""
        timings = Timings(
            total_s=time.monotonic() - self._arrived_s,
            validation_s=self._queued_s - self._arrived_s,
            queue_s=max(0.0, finish.first_scheduled_s - self._queued_s),
            inference_s=finish.finished_s - finish.first_scheduled_s,
        )
        self._api.metrics.request_succeeded(
            total_s=timings.total_s,
            validation_s=timings.validation_s,
            queue_s=timings.queue_s,
            inference_s=timings.inference_s,
            num_generated_tokens=finish.num_generated_tokens,
        )
        self._api.metrics.request_ended(self.request.request_class, "success")
        tracing.note_success(
            self._span,
            total_s=timings.total_s,
            validation_s=timings.validation_s,
            queue_s=timings.queue_s,
            inference_s=timings.inference_s,
            num_prompt_tokens=len(self.request.prompt_token_ids),
            num_generated_tokens=finish.num_generated_tokens,
            finish_reason=finish.reason.value,
        )
        return timings


@dataclass(frozen=True, slots=True)
class WholeReply:
    """A reply that was waited for to its end."""

    call: Call
    tokens: list[Token]
    finish: Finish
    timings: Timings
    #: Where it was asked for.
    prompt: PromptDetails | None

    @property
    def num_prompt_tokens(self) -> int:
        """Tokens of the prompt as the model saw it."""
        return len(self.call.request.prompt_token_ids)


async def whole_replies(api: Api, request: InferenceRequest, level: ServiceLevel) -> list[WholeReply]:
    """Run every sequence of a request to its end. Raises `ApiError` where it is refused, or one of them fails."""
    async with inference_calls(api, request, level, is_stream=False) as calls:
        return await together(_whole_reply(call) for call in calls)


async def _whole_reply(call: Call) -> WholeReply:
    tokens: list[Token] = []
    finish: Finish | None = None
    prompt: PromptDetails | None = None
    async for event in call.generation:
        tokens.append(event.token)
        finish = event.finish
        prompt = event.prompt or prompt
    if finish is None:
        raise errors.IncompleteGenerationError
    return WholeReply(call, tokens, finish, call.succeeded(finish), prompt)


@asynccontextmanager
async def inference_call(
    api: Api, request: InferenceRequest, level: ServiceLevel, *, is_stream: bool
) -> AsyncIterator[Call]:
    """As `inference_calls`, for a request of one sequence."""
    async with inference_calls(api, request, level, is_stream=is_stream) as calls:
        (call,) = calls
        yield call


@asynccontextmanager
async def inference_calls(
    api: Api, request: InferenceRequest, level: ServiceLevel, *, is_stream: bool
) -> AsyncIterator[list[Call]]:
    """Admit, validate and queue a request: each of its sequences as one of its own, with a permit of its own.

    It gets all of them or none. Leaving the block ends what has not ended, and gives the permits back.

    Raises:
        ApiError: it was refused, or failed inside the block.
    """
    arrived_s = time.monotonic()
    model, engine = api.served()
    api.metrics.request_received()
    span = tracing.inference_span(request.request_id, level.request_class)
    try:
        api.validator.check_before_admission(request, is_stream=is_stream)
        with ExitStack() as held:
            for _ in range(request.num_sequences):
                held.enter_context(api.permits[level.request_class].take())
            valid = await api.validator.validate(request, level, model)
            api.metrics.request_validated(
                len(valid.prompt_token_ids),
                min(valid.max_new_tokens, NUM_JUDGED_NEW_TOKENS),
                max_input_tokens=model.max_input_tokens,
                max_total_tokens=model.max_total_tokens,
            )
            calls = []
            for index in range(request.num_sequences):
                if index:
                    api.metrics.request_received()  # from here on, each ends as one of its own
                sequence = _sequence(valid, index)
                generation = held.enter_context(engine.submit(sequence))
                api.metrics.request_admitted(level.request_class, generation.terms.admission)
                calls.append(Call(api, sequence, generation, arrived_s, span))
            yield calls
    except ConnectionError:
        raise  # the client is gone: its sequence was ended, and the engine counted it
    except Exception as error:
        public = _counted(error, api, engine, level)
        tracing.note_failure(span, public.error_type)
        raise public from None
    finally:
        span.end()


def _sequence(request: ValidRequest, index: int) -> ValidRequest:
    """One of the sequences of a request: they differ in their seeds."""
    seed = (request.sampling.seed + index) % 2**64
    return replace(request, sampling=msgspec.structs.replace(request.sampling, seed=seed))


@contextmanager
def preparation(api: Api, level: ServiceLevel) -> Iterator[None]:
    """What comes before `inference_call`: a request that fails in this block is counted as one that failed there.

    Raises:
        ApiError: it was refused, or failed inside the block.
    """
    _, engine = api.served()
    try:
        yield
    except Exception as error:
        api.metrics.request_received()
        raise _counted(error, api, engine, level) from None


def _counted(error: Exception, api: Api, engine: Engine, level: ServiceLevel) -> errors.ApiError:
    """What a client is told of `error`, once it was counted."""
    public = _public(error, api, engine, level)
    _count_failure(public, api.metrics, level)
    return public


def _count_failure(error: errors.ApiError, metrics: Metrics, level: ServiceLevel) -> None:
    metrics.request_failed(error.failure)
    metrics.request_ended(level.request_class, error.failure)
    if isinstance(error, errors.InfeasibleApiError):
        metrics.request_refused(level.request_class)
    # Of what was accepted the engine judges the targets.
    if error.failure == "overloaded" and level.has_given_target:
        metrics.targets_judged(is_ttft_met=False, is_tpot_met=False)


def _public(error: Exception, api: Api, engine: Engine, level: ServiceLevel) -> errors.ApiError:
    """What a client is told of `error`."""
    match error:
        case errors.ApiError():
            return error
        case RefusedError():
            return errors.InfeasibleApiError(error.retry_after_s)
        case OverloadedError():
            return errors.OverloadedApiError(engine.drain_s(level.request_class))
        case DeadlineError(has_run=True):
            return errors.DeadlineApiError(str(error))
        case DeadlineError():
            return errors.ExpiredApiError(engine.drain_s(level.request_class))
        case GenerationError():
            return errors.GenerationApiError(str(error))
        case ServiceUnavailableError():
            return errors.UnavailableError(api.service.phase)
    log.exception("request failed")
    return errors.InternalError()
