"""Which route is answered by what, and who may ask."""

from __future__ import annotations

import hmac
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from enum import Enum
from typing import Final

from aiohttp import web
from aiohttp.typedefs import Handler

from bros_router.api import chat, completions, docs, handlers, invocations, kserve, openapi, types, v1_replies, vertex
from bros_router.api.dialect import Dialect
from bros_router.api.openapi import BODY_FAILURES, INFERENCE_FAILURES, TEXT, Operation, Schema
from bros_router.config import ApiConfig

_SUMMARY: Final = "Language models for real-time and best-effort requests, behind TGI's API."


class Access(Enum):
    """Who needs the API key, where there is one."""

    KEY = "key"  # everybody
    OPEN = "open"  # nobody, unless the operator guards every route
    PROBE = "probe"  # nobody: those who check health, and Vertex AI, have no key


@dataclass(frozen=True, slots=True)
class Route:
    """One method of one path. `path` may have parts in braces."""

    method: str
    path: str
    handler: Handler
    access: Access
    #: What its description says; `None`: it has none.
    operation: Operation | None = None


def routes(config: ApiConfig, dialect: Dialect) -> list[Route]:
    """Every route of a server."""
    every = [*_tgi_routes(dialect), *_docs_routes()]
    if config.kserve:
        every += _kserve_routes()
    every += _vertex_routes(config, every)
    # What Vertex AI was told to ask goes before what else is there.
    return [*{(route.method, route.path): route for route in every}.values()]


def add_routes(app: web.Application, every: Iterable[Route], config: ApiConfig) -> None:
    """Let the application answer these routes; their paths with another method by 405, whatever else by 404."""
    guard = _key_guard(config.api_key)
    by_path: dict[str, list[Route]] = {}
    for route in every:
        by_path.setdefault(route.path, []).append(route)
    for path, of_path in by_path.items():
        by_method = {
            route.method: guard(route.handler) if needs_key(route, config) else route.handler for route in of_path
        }
        if "GET" in by_method:
            by_method["HEAD"] = by_method["GET"]
        # TGI asks for the key before it looks at the method.
        refuse = _method_not_allowed(sorted(by_method))
        by_method["*"] = guard(refuse) if any(needs_key(route, config) for route in of_path) else refuse
        resource = app.router.add_resource(path)
        for method, handler in by_method.items():
            resource.add_route(method, handler)


def description(every: Iterable[Route], config: ApiConfig) -> bytes:
    """The routes as OpenAPI."""
    operations = [
        (route.method, route.path, needs_key(route, config), route.operation)
        for route in every
        if route.operation is not None
    ]
    return openapi.document(operations, _SUMMARY)


def needs_key(route: Route, config: ApiConfig) -> bool:
    """Whether only those who have the API key may ask."""
    if config.api_key is None:
        return False
    return route.access is Access.KEY or (route.access is Access.OPEN and config.api_key_scope == "all")


# --- the routes


def _tgi_routes(dialect: Dialect) -> Iterator[Route]:
    def generating(path: str, handler: Handler, operation: Operation) -> Route:
        return Route("POST", path, handler, Access.KEY, replace(operation, failures=INFERENCE_FAILURES))

    inputs = {"inputs": "What is deep learning?", "parameters": {"max_new_tokens": 20}}
    messages = {"messages": [{"role": "user", "content": "What is deep learning?"}], "max_tokens": 20}
    prompt = {"prompt": "What is deep learning?", "max_tokens": 20}
    compat_replies = _json(_array(types.GenerateReply, length=1)) | _events(types.StreamEvent, types.ErrorReply)
    failure, last = v1_replies.StreamFailureEvent, v1_replies.LAST_EVENT.decode()
    chat_replies = _json(v1_replies.ChatCompletion) | _events(v1_replies.ChatChunk, failure, last=last)
    completion_replies = _json(v1_replies.Completion) | _events(
        v1_replies.CompletionChunk, v1_replies.Completion, failure, last=last
    )
    yield generating(
        "/",
        handlers.compat_generate,
        Operation(
            name="compat_generate",
            summary="Go on from a prompt: a whole reply, or a stream where the body says so",
            body=types.CompatGenerateRequest,
            example=inputs | {"stream": False},
            replies=compat_replies,
        ),
    )
    yield generating(
        "/generate",
        handlers.generate,
        Operation(
            name="generate",
            summary="Go on from a prompt",
            body=types.GenerateRequest,
            example=inputs,
            replies=_json(types.GenerateReply),
        ),
    )
    yield generating(
        "/generate_stream",
        handlers.generate_stream,
        Operation(
            name="generate_stream",
            summary="Go on from a prompt, a token at a time; errors are events too",
            body=types.GenerateRequest,
            example=inputs,
            replies=_events(types.StreamEvent, types.ErrorReply),
        ),
    )
    yield generating(
        "/v1/chat/completions",
        chat.chat_completions,
        Operation(
            name="chat_completions",
            summary="Answer a chat: whole, or as a stream where the body says so",
            body=dialect.chat_body,
            example=messages,
            replies=chat_replies,
        ),
    )
    yield generating(
        "/v1/completions",
        completions.completions,
        Operation(
            name="completions",
            summary="Go on from one prompt or several: whole, or as a stream where the body says so",
            body=dialect.completion_body,
            example=prompt,
            replies=completion_replies,
        ),
    )
    yield generating(
        "/invocations",
        invocations.invocations,
        Operation(
            name="sagemaker_compatibility",
            summary="SageMaker: the body and the reply of `/`, `/v1/chat/completions` or `/v1/completions`",
            body={"anyOf": [types.CompatGenerateRequest, dialect.chat_body, dialect.completion_body]},
            example=inputs,
            replies=_either(compat_replies, chat_replies, completion_replies),
        ),
    )
    yield generating("/vertex", vertex.vertex, _vertex_operation(dialect.chat_body))
    yield Route(
        "POST",
        "/tokenize",
        handlers.tokenize,
        Access.KEY,
        Operation(
            name="tokenize",
            summary="The tokens of a prompt",
            body=types.GenerateRequest,
            example=inputs,
            replies=_json(_array(types.SimpleToken)),
            failures=BODY_FAILURES,
        ),
    )
    yield Route(
        "POST",
        "/chat_tokenize",
        chat.chat_tokenize,
        Access.OPEN,
        Operation(
            name="get_chat_tokenize",
            summary="The prompt that the template makes of a chat, and its tokens",
            body=dialect.chat_body,
            example=messages,
            replies=_json(v1_replies.ChatTokenizeReply),
            failures=(*BODY_FAILURES, 429),
        ),
    )
    for path, name in (("/", "health_root"), ("/health", "health"), ("/ping", "ping")):
        yield Route("GET", path, handlers.health, Access.PROBE, _health_operation(name))
    yield Route(
        "GET",
        "/health/live",
        handlers.health_live,
        Access.PROBE,
        Operation(name="health_live", summary="Whether the process lives"),
    )
    yield Route(
        "GET",
        "/health/startup",
        handlers.health_startup,
        Access.PROBE,
        Operation(
            name="health_startup",
            summary="How far the start has come; 503 before the model was first served",
            replies=_json(types.StartupReply),
            failures=(503,),
        ),
    )
    yield Route(
        "GET",
        "/info",
        handlers.info,
        Access.OPEN,
        Operation(
            name="get_model_info", summary="The model and the limits", replies=_json(types.Info), failures=(503,)
        ),
    )
    yield Route(
        "GET",
        "/v1/models",
        handlers.models,
        Access.OPEN,
        Operation(
            name="openai_get_model_info",
            summary="The model, and its adapters",
            replies=_json(types.ModelList),
            failures=(503,),
        ),
    )
    yield Route(
        "GET",
        "/metrics",
        handlers.prometheus,
        Access.OPEN,
        Operation(name="metrics", summary="Measurements for Prometheus", replies={"text/plain": TEXT}),
    )


def _docs_routes() -> Iterator[Route]:
    yield Route("GET", "/api-doc/openapi.json", docs.openapi_json, Access.OPEN)
    yield Route("GET", "/docs", docs.to_folder, Access.OPEN)
    yield Route("GET", "/docs/", docs.page, Access.OPEN)
    for name in docs.ASSETS:
        yield Route("GET", f"/docs/{name}", docs.asset(name), Access.OPEN)


def _kserve_routes() -> Iterator[Route]:
    model = "/v2/models/{name}/versions/{version}"
    metadata, live = _json(kserve.Metadata), _json(kserve.Live)
    yield Route(
        "GET",
        "/v2",
        kserve.server_metadata,
        Access.OPEN,
        Operation(name="kserve_server", summary="KServe: the server", replies=metadata),
    )
    yield Route(
        "GET",
        model,
        kserve.model_metadata,
        Access.OPEN,
        Operation(name="kserve_model", summary="KServe: the model", replies=metadata),
    )
    yield Route(
        "GET",
        "/v2/health/live",
        kserve.health_live,
        Access.PROBE,
        Operation(name="kserve_live", summary="KServe: whether the process lives", replies=live),
    )
    for path, name in (("/v2/health/ready", "kserve_ready"), (f"{model}/ready", "kserve_model_ready")):
        yield Route(
            "GET",
            path,
            kserve.health_ready,
            Access.PROBE,
            Operation(name=name, summary="KServe: whether requests would be served now", replies=live, failures=(503,)),
        )
    yield Route(
        "POST",
        f"{model}/infer",
        kserve.infer,
        Access.KEY,
        Operation(
            name="kserve_infer",
            summary="KServe: go on from prompts given as bytes",
            body=kserve.InferenceBody,
            replies=_json(kserve.InferenceReply),
            failures=INFERENCE_FAILURES,
        ),
    )


def _vertex_routes(config: ApiConfig, others: Iterable[Route]) -> Iterator[Route]:
    if config.vertex_predict_route is not None:
        (operation,) = (route.operation for route in others if route.handler is vertex.vertex)
        assert operation is not None
        yield Route(
            "POST",
            config.vertex_predict_route,
            vertex.vertex,
            Access.PROBE,
            replace(operation, name="vertex_predict"),
        )
    if config.vertex_health_route is not None:
        yield Route(
            "GET", config.vertex_health_route, handlers.health, Access.PROBE, _health_operation("vertex_health")
        )


# --- what their descriptions share


def _health_operation(name: str) -> Operation:
    return Operation(name=name, summary="Whether a request sent now would be served", failures=(503,))


def _vertex_operation(chat_body: Schema) -> Operation:
    return Operation(
        name="vertex_compatibility",
        summary="Vertex AI: a text for each of several prompts or chats",
        body={
            "type": "object",
            "required": ["instances"],
            "properties": {"instances": _array({"anyOf": [vertex.GenerateInstance, chat_body]})},
        },
        example={"instances": [{"inputs": "What is deep learning?", "parameters": {"max_new_tokens": 20}}]},
        replies=_json(vertex.VertexReply),
    )


def _json(schema: Schema) -> dict[str, Schema]:
    return {"application/json": schema}


def _events(*data: Schema, last: str | None = None) -> dict[str, Schema]:
    """One event, whose data is JSON of one of these schemas; `last`: what the last one says instead."""
    text: Schema = {"type": "string", "contentMediaType": "application/json", "contentSchema": {"anyOf": [*data]}}
    if last is not None:
        text = {"anyOf": [text, {"type": "string", "const": last}]}
    return {"text/event-stream": {"type": "object", "required": ["data"], "properties": {"data": text}}}


def _array(items: Schema, *, length: int | None = None) -> Schema:
    bounds = {} if length is None else {"minItems": length, "maxItems": length}
    return {"type": "array", "items": items, **bounds}


def _either(*replies: dict[str, Schema]) -> dict[str, Schema]:
    """What any of several routes may answer."""
    return {kind: {"anyOf": [each[kind] for each in replies]} for kind in replies[0]}


# --- the key


def _key_guard(api_key: str | None) -> Callable[[Handler], Handler]:
    """What puts a handler behind the API key: without it, 401 and nothing else."""
    expected = f"Bearer {api_key}".encode()

    def guard(handler: Handler) -> Handler:
        async def guarded(request: web.Request) -> web.StreamResponse:
            given = request.headers.get("Authorization", "").encode(errors="surrogateescape")
            if not hmac.compare_digest(given, expected):
                return web.Response(status=401)
            return await handler(request)

        return guarded

    return guard


def _method_not_allowed(methods: list[str]) -> Handler:
    async def refuse(request: web.Request) -> web.StreamResponse:
        return web.Response(status=405, headers={"Allow": ",".join(methods)})

    return refuse
