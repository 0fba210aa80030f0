"""TGI's own routes: one function a route, from HTTP to HTTP."""

from __future__ import annotations

from typing import Any

import msgspec
from aiohttp import web
from msgspec import UNSET

from bros_router.about import server_version
from bros_router.api import errors
from bros_router.api.call import API, Api, Call, WholeReply, inference_call, whole_replies
from bros_router.api.exchange import json_response, read_body, read_for_inference, stream_response
from bros_router.api.headers import compute_headers, compute_time_header, terms_headers, timing_headers
from bros_router.api.likeliest import likeliest_first
from bros_router.api.service_level import ServiceLevel, service_level
from bros_router.api.sse import EventStream
from bros_router.api.types import (
    BestOfSequence,
    CompatGenerateRequest,
    Details,
    GenerateReply,
    GenerateRequest,
    Info,
    ModelInfo,
    ModelList,
    PrefillToken,
    StartupReply,
    StreamDetails,
    StreamEvent,
    TokenReply,
)
from bros_router.api.validation import InferenceRequest
from bros_router.request import Finish, Token

_generate_decoder = msgspec.json.Decoder(GenerateRequest)
COMPAT_DECODER = msgspec.json.Decoder(CompatGenerateRequest)


# --- inference


async def generate(request: web.Request) -> web.StreamResponse:
    """`POST /generate`: the whole reply as one object."""
    reply, headers = await generate_reply(request, await read_for_inference(request, _generate_decoder))
    return json_response(reply, headers)


async def generate_stream(request: web.Request) -> web.StreamResponse:
    """`POST /generate_stream`: one event a token."""
    return await _stream(request, await read_for_inference(request, _generate_decoder))


async def compat_generate(request: web.Request) -> web.StreamResponse:
    """`POST /`: as the body's `stream` says."""
    return await compat_reply(request, await read_for_inference(request, COMPAT_DECODER))


async def compat_reply(request: web.Request, body: CompatGenerateRequest) -> web.StreamResponse:
    """What `POST /` answers to a body: a stream, or a whole reply as an array of one."""
    if body.parameters.return_full_text is None:
        # The hub's text-generation pipeline repeats the prompt, and an unknown pipeline is taken for that one.
        is_full_text = request.app[API].model().pipeline_tag in (None, "text-generation")
        parameters = msgspec.structs.replace(body.parameters, return_full_text=is_full_text)
        body = msgspec.structs.replace(body, parameters=parameters)
    if body.stream:
        return await _stream(request, body)
    reply, headers = await generate_reply(request, body)
    return json_response([reply], headers)


async def tokenize(request: web.Request) -> web.StreamResponse:
    """`POST /tokenize`: the input's tokens. Nothing is validated, no permit is taken."""
    api = request.app[API]
    tokenizer = api.model().tokenizer
    body = await read_body(request, _generate_decoder)
    return json_response(await api.validator.tokenize(body.inputs, tokenizer))


async def generate_reply(request: web.Request, body: GenerateRequest) -> tuple[GenerateReply, dict[str, str]]:
    """The whole reply to a body, and its headers. Raises `ApiError`."""
    api = request.app[API]
    level = _service_level(request, body)
    headers = compute_headers(api.model(), len(body.inputs), level.request_class)
    replies = await whole_replies(api, InferenceRequest(body.inputs, body.parameters), level)
    best = likeliest_first(replies)[0]
    headers |= terms_headers(best.call) | compute_time_header(best) | timing_headers([best])
    generated_text = _full_text(body, best.finish)
    if not (body.parameters.details or body.parameters.decoder_input_details):
        return GenerateReply(generated_text), headers
    others = [
        BestOfSequence(generated_text=_full_text(body, other.finish), **await _details(api, body, other))
        for other in replies
        if other is not best
    ]
    details = Details(**await _details(api, body, best), best_of_sequences=others or UNSET)
    return GenerateReply(generated_text, details), headers


async def _details(api: Api, body: GenerateRequest, reply: WholeReply) -> dict[str, Any]:
    """What is told of every sequence."""
    return {
        "finish_reason": reply.finish.reason.value,
        "generated_tokens": reply.finish.num_generated_tokens,
        "seed": reply.call.seed,
        "prefill": await _prefill(api, reply),
        "tokens": [_token_reply(token) for token in reply.tokens],
        "top_tokens": [_top_token_replies(token) for token in reply.tokens] if body.parameters.top_n_tokens else UNSET,
    }


async def _prefill(api: Api, reply: WholeReply) -> list[PrefillToken]:
    """The tokens of the prompt, where they are told."""
    if reply.prompt is None:
        return []
    token_ids = reply.call.request.prompt_token_ids
    texts = await api.validator.in_thread(api.model().tokenizer.texts, token_ids)
    return [*map(PrefillToken, token_ids, texts, reply.prompt.logprobs)]


async def _stream(request: web.Request, body: GenerateRequest) -> web.StreamResponse:
    """The stream begins once the request is admitted or refused."""
    api = request.app[API]
    level = _service_level(request, body)
    headers = compute_headers(api.model(), len(body.inputs), level.request_class)

    async def send_events(stream: EventStream) -> None:
        inference = InferenceRequest(body.inputs, body.parameters)
        async with inference_call(api, inference, level, is_stream=True) as call:
            await stream.open(headers | terms_headers(call))
            index = 0
            async for event in call.events():
                index += 1
                token, finish = _token_reply(event.token), event.finish
                top_tokens = _top_token_replies(event.token) or UNSET
                if finish is None:
                    await stream.send_json(StreamEvent(index, token, top_tokens))
                else:
                    details = _stream_details(call, finish) if body.parameters.details else None
                    await stream.send_json(StreamEvent(index, token, top_tokens, _full_text(body, finish), details))

    return await stream_response(request, headers, send_events)


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


def _top_token_replies(token: Token) -> list[TokenReply]:
    return [_token_reply(top_token) for top_token in token.top_tokens]


def _service_level(request: web.Request, body: GenerateRequest) -> ServiceLevel:
    return service_level(request.headers, body.parameters.priority, request.app[API].config)


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
    return json_response(StartupReply(service.phase.value, service.progress), status=200 if is_started else 503)


async def info(request: web.Request) -> web.StreamResponse:
    """`GET /info`: the model and the limits."""
    api = request.app[API]
    model, config = api.model(), api.config
    return json_response(
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
            version=server_version(),
            sha=None,
            docker_label=None,
        )
    )


async def models(request: web.Request) -> web.StreamResponse:
    """`GET /v1/models`: what `model` may be in a body; of TGI's, a list of one."""
    api = request.app[API]
    model = api.model()
    names = [model.model_id, *(model.adapter_ids if api.dialect.lists_adapters else ())]
    return json_response(ModelList(data=[ModelInfo(id=name, owned_by=model.model_id) for name in names]))


async def prometheus(request: web.Request) -> web.StreamResponse:
    """`GET /metrics`."""
    return web.Response(body=request.app[API].metrics.render(), content_type="text/plain", charset="utf-8")
