"""The API described as OpenAPI 3.1, from the very types that bodies are decoded into and replies encoded from."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Final, TypeAlias

import msgspec

from bros_router.about import server_version
from bros_router.api.types import ErrorReply

#: JSON Schema in which a type stands for its own schema.
Schema: TypeAlias = "type | Mapping[str, Any]"

TEXT: Final[Schema] = {"type": "string"}
#: Statuses of every route that reads a body, and what else one that generates may answer.
BODY_FAILURES: Final = (400, 408, 413, 415, 422, 503)
INFERENCE_FAILURES: Final = (*BODY_FAILURES, 424, 429, 500)

_KEY: Final = "key"
_IN_PATH: Final = re.compile(r"\{(\w+)\}")
_AS_JSON: Final = {"application/json": ErrorReply}
_AS_TEXT: Final = {"text/plain": TEXT}
#: By status: what it means, and how it is told.
_FAILURES: Final[Mapping[int, tuple[str, Mapping[str, Schema]]]] = {
    400: ("The body is not JSON.", _AS_TEXT),
    401: ("The API key is missing or wrong.", {}),
    408: ("The body did not arrive in time.", _AS_JSON),
    413: ("The body is longer than the payload limit.", _AS_TEXT),
    415: ("The body is not declared as JSON, or is compressed.", _AS_TEXT),
    422: ("The body has another shape (text), or breaks a rule (JSON).", _AS_JSON | _AS_TEXT),
    424: ("The generation failed, or its deadline passed.", _AS_JSON),
    429: ("There is no room for the request now.", _AS_JSON),
    500: ("A fault of the server.", _AS_JSON),
    503: ("A request sent now would not be served.", _AS_JSON),
}
_POSITIVE: Final[Schema] = {"type": "number", "exclusiveMinimum": 0}
_SERVICE_HEADERS: Final[Mapping[str, tuple[str, Schema]]] = {
    "x-request-class": ("Real-time or best-effort.", {"type": "string", "enum": ["rt", "be"]}),
    "x-slo-ttft-ms": ("Milliseconds to the first token that are wanted.", _POSITIVE),
    "x-slo-tpot-ms": ("Milliseconds a token after the first that are wanted.", _POSITIVE),
    "x-request-deadline-ms": ("Milliseconds after which nobody wants the reply.", _POSITIVE),
}


@dataclass(frozen=True, kw_only=True)
class Operation:
    """What the description says of one route."""

    #: What TGI's own description calls it, where it does: generated clients name their functions after it.
    name: str
    summary: str
    #: Of the JSON body; `None`: there is none.
    body: Schema | None = None
    #: A body to try.
    example: object = None
    #: Schemas of what status 200 is answered with, by content type; none: nothing.
    replies: Mapping[str, Schema] = field(default_factory=dict)
    #: Other statuses.
    failures: tuple[int, ...] = ()

    @property
    def schemas(self) -> Iterator[Schema]:
        """Those that are named here."""
        if self.body is not None:
            yield self.body
        yield from self.replies.values()


def document(operations: Iterable[tuple[str, str, bool, Operation]], summary: str) -> bytes:
    """The whole description, as JSON.

    Args:
        operations: method, path, whether the API key is asked for, and what is said of it.
        summary: of the server, in a sentence.
    """
    operations = list(operations)
    types = {ErrorReply} | {
        each for *_, operation in operations for schema in operation.schemas for each in _types_of(schema)
    }
    in_order = sorted(types, key=lambda each: each.__name__)
    references, components = msgspec.json.schema_components(in_order, ref_template="#/components/schemas/{name}")
    known = dict(zip(in_order, references, strict=True))
    paths: dict[str, dict[str, Any]] = {}
    for method, path, needs_key, operation in operations:
        paths.setdefault(path, {})[method.lower()] = _described(path, operation, needs_key=needs_key)
    described: dict[str, Any] = {
        "openapi": "3.1.0",
        "info": {
            "title": "Text Generation Inference",
            "summary": summary,
            "license": {"name": "Apache 2.0", "identifier": "Apache-2.0"},
            "version": server_version(),
        },
        "paths": paths,
        "components": {"schemas": components},
    }
    if any(needs_key for _, _, needs_key, _ in operations):
        described["components"]["securitySchemes"] = {_KEY: {"type": "http", "scheme": "bearer"}}
    return msgspec.json.encode(_resolved(described, known))


def _described(path: str, operation: Operation, *, needs_key: bool) -> dict[str, Any]:
    failures = (*operation.failures, 401) if needs_key else operation.failures
    responses = {"200": {"description": "Success.", **_content(operation.replies)}}
    for status in sorted(failures):
        meaning, contents = _FAILURES[status]
        responses[str(status)] = {"description": meaning, **_content(contents)}
    described: dict[str, Any] = {
        "operationId": operation.name,
        "summary": operation.summary,
        "responses": responses,
        "parameters": [_parameter("path", name, TEXT) for name in _IN_PATH.findall(path)],
    }
    if 424 in failures:
        described["parameters"] += [
            _parameter("header", name, schema, meaning) for name, (meaning, schema) in _SERVICE_HEADERS.items()
        ]
    if operation.body is not None:
        media: dict[str, Any] = {"schema": operation.body}
        if operation.example is not None:
            media["example"] = operation.example
        described["requestBody"] = {"required": True, "content": {"application/json": media}}
    if needs_key:
        described["security"] = [{_KEY: []}]
    return described


def _content(schemas: Mapping[str, Schema]) -> dict[str, Any]:
    return {"content": {kind: {"schema": schema} for kind, schema in schemas.items()}} if schemas else {}


def _parameter(place: str, name: str, schema: Schema, meaning: str = "") -> dict[str, Any]:
    said = {"description": meaning} if meaning else {}
    return {"in": place, "name": name, "required": place == "path", "schema": schema, **said}


def _types_of(value: object) -> Iterator[type]:
    """The types that stand in a schema."""
    if isinstance(value, type):
        yield value
    elif isinstance(value, Mapping):
        for each in value.values():
            yield from _types_of(each)
    elif isinstance(value, list):
        for each in value:
            yield from _types_of(each)


def _resolved(value: Any, known: Mapping[type, Any]) -> Any:
    """The same with references in place of types."""
    if isinstance(value, type):
        return known[value]
    if isinstance(value, Mapping):
        return {key: _resolved(each, known) for key, each in value.items()}
    if isinstance(value, list):
        return [_resolved(each, known) for each in value]
    return value
