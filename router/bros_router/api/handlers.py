"""TGI's own routes: one function a route, from HTTP to HTTP."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from importlib.metadata import version
from typing import Final, TypeVar

import msgspec
from aiohttp import web

from bros_router.api import errors
from bros_router.api.body import read_json
from bros_router.api.call import API, Api, Call, inference_call
from bros_router.api.headers import compute_headers, terms_headers, timing_headers
from bros_router.api.service_level import ServiceLevel, service_level
from bros_router.api.sse import EventStream
from bros_router.api.types import (
    CompatGenerateRequest,
    Details,
    GenerateReply,
    GenerateRequest,
    Info,
    ModelInfo,
    ModelList,
    StartupReply,
    StreamDetails,
    StreamEvent,
    TokenReply,
)
from bros_router.request import Finish, Token

T = TypeVar("T")

_VERSION: Final = version("bros")
_generate_decoder = msgspec.json.Decoder(GenerateRequest)
_compat_decoder = msgspec.json.Decoder(CompatGenerateRequest)


# --- inference


async def generate(request: web.Request) -> web.StreamResponse:
    """`POST /generate`: the whole reply as one object."""
    reply, headers = await _generate(request, await _read_for_inference(request, _generate_decoder))
    return _json(reply, headers)


async def generate_stream(request: web.Request) -> web.StreamResponse:
    """`POST /generate_stream`: one event a token."""
    return await _stream(request, await _read_for_inference(request, _generate_decoder))


async def compat_generate(request: web.Request) -> web.StreamResponse:
    """`POST /`: as the body's `stream` says; a whole reply comes as an array of one."""
    body = await _read_for_inference(request, _compat_decoder)
    if body.parameters.return_full_text is None:
        # The hub's text-generation pipeline repeats the prompt, and an unknown pipeline is taken for that one.
        is_full_text = request.app[API].model().pipeline_tag in (None, "text-generation")
        parameters = msgspec.structs.replace(body.parameters, return_full_text=is_full_text)
        body = msgspec.structs.replace(body, parameters=parameters)
    if body.stream:
        return await _stream(request, body)
    reply, headers = await _generate(request, body)
    return _json([reply], headers)


async def tokenize(request: web.Request) -> web.StreamResponse:
    """`POST /tokenize`: the input's tokens. Nothing is validated, no permit is taken."""
    api = request.app[API]
    tokenizer = api.model().tokenizer
    body = await _read(request, _generate_decoder)
    return _json(await api.validator.tokenize(body.inputs, tokenizer))


async def _generate(request: web.Request, body: GenerateRequest) -> tuple[GenerateReply, dict[str, str]]:
    api = request.app[API]
    level = _service_level(request, body)
    headers = compute_headers(api.model(), body.inputs, level.request_class)
    async with inference_call(api, body, level, is_stream=False) as call:
        tokens: list[Token] = []
        finish: Finish | None = None
        async for event in call.generation:
            tokens.append(event.token)
            finish = event.finish
        if finish is None:
            raise errors.IncompleteGenerationError
        timings = call.succeeded(finish)
    headers |= terms_headers(call) | timing_headers(call, finish, timings)
    if not body.parameters.details:
        return GenerateReply(_full_text(body, finish)), headers
    details = Details(
        finish_reason=finish.reason.value,
        generated_tokens=finish.num_generated_tokens,
        seed=call.seed,
        prefill=[],
        tokens=[_token_reply(token) for token in tokens],
    )
    return GenerateReply(_full_text(body, finish), details), headers


async def _stream(request: web.Request, body: GenerateRequest) -> web.StreamResponse:
    """Answer 200 once the request is admitted or refused; whatever goes wrong is an event."""
    api = request.app[API]
    level = _service_level(request, body)
    headers = compute_headers(api.model(), body.inputs, level.request_class)
    stream = EventStream(request, keep_alive_s=api.timeouts.keep_alive_s, write_deadline_s=api.timeouts.write_s)
    with contextlib.suppress(ConnectionError):  # the client is gone
        async with stream:
            try:
                await _send_events(api, body, level, stream, headers)
            except errors.ApiError as error:
                if not stream.is_open:
                    await stream.open(headers | error.headers())
                await stream.send(error.body())
    return stream.response


async def _send_events(
    api: Api, body: GenerateRequest, level: ServiceLevel, stream: EventStream, headers: dict[str, str]
) -> None:
    async with inference_call(api, body, level, is_stream=True) as call:
        await stream.open(headers | terms_headers(call))
        finish: Finish | None = None
        index = 0
        async for event in call.generation:
            index += 1
            finish = event.finish
            token = _token_reply(event.token)
            if finish is None:
                await stream.send_json(StreamEvent(index, token))
            else:
                call.succeeded(finish)
                details = _stream_details(call, finish) if body.parameters.details else None
                await stream.send_json(StreamEvent(index, token, _full_text(body, finish), details))
        if finish is None:
            raise errors.IncompleteStreamError


def _stream_details(call: Call, finish: Finish) -> StreamDetails:
    return StreamDetails(
        finish_reason=finish.reason.value,
        generated_tokens=finish.num_generated_tokens,
        seed=call.seed,
        input_length=len(call.request.prompt_token_ids),
    )


def _full_text(body: GenerateRequest, finish: Finish) -> str:
    prompt = body.inputs if body.parameters.return_full_text else ""
    return prompt + finish.generated_text


def _token_reply(token: Token) -> TokenReply:
    return TokenReply(token.token_id, token.text, token.logprob, token.is_special)


def _service_level(request: web.Request, body: GenerateRequest) -> ServiceLevel:
    return service_level(request.headers, body.parameters, request.app[API].config)


# --- about the server


async def health(request: web.Request) -> web.StreamResponse:
    """`GET /health`, `/ping`, `/`: whether a request sent now would be served."""
    if not request.app[API].service.is_ready:
        raise errors.UnhealthyError
    return web.Response()


async def health_live(request: web.Request) -> web.StreamResponse:
    """`GET /health/live`: the event loop turns. Independent of load and of ranks."""
    return web.Response()


async def health_startup(request: web.Request) -> web.StreamResponse:
    """`GET /health/startup`: how far the start has come; 200 once the model has been served."""
    service = request.app[API].service
    is_started = service.engine is not None
    return _json(StartupReply(service.phase.value, service.progress), status=200 if is_started else 503)


async def info(request: web.Request) -> web.StreamResponse:
    """`GET /info`: the model and the limits."""
    api = request.app[API]
    model, config = api.model(), api.config
    return _json(
        Info(
            model_id=model.model_id,
            model_sha=model.model_sha,
            model_pipeline_tag=model.pipeline_tag,
            max_concurrent_requests=config.max_concurrent_requests,
            max_best_of=config.max_best_of,
            max_stop_sequences=config.max_stop_sequences,
            max_input_tokens=model.max_input_tokens,
            max_total_tokens=model.max_total_tokens,
            validation_workers=config.validation_workers,
            max_client_batch_size=config.max_client_batch_size,
            version=_VERSION,
            sha=None,
            docker_label=None,
        )
    )


async def models(request: web.Request) -> web.StreamResponse:
    """`GET /v1/models`: a list of one."""
    model_id = request.app[API].model().model_id
    return _json(ModelList(data=[ModelInfo(id=model_id, owned_by=model_id)]))


async def prometheus(request: web.Request) -> web.StreamResponse:
    """`GET /metrics`."""
    return web.Response(body=request.app[API].metrics.render(), content_type="text/plain", charset="utf-8")


# --- HTTP


async def _read_for_inference(request: web.Request, decoder: msgspec.json.Decoder[T]) -> T:
    """Refuse while nothing is served: before the body is read, and again after the time that took."""
    api = request.app[API]
    api.served()
    body = await _read(request, decoder)
    api.served()
    return body


async def _read(request: web.Request, decoder: msgspec.json.Decoder[T]) -> T:
    api = request.app[API]
    return await read_json(request, decoder, limit_bytes=api.config.payload_limit, deadline_s=api.timeouts.body_s)


def _json(value: object, headers: Mapping[str, str] | None = None, status: int = 200) -> web.Response:
    body = msgspec.json.encode(value)
    return web.Response(status=status, body=body, headers=headers, content_type="application/json")
