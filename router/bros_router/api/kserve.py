"""KServe's routes, its open inference protocol version 2: texts in and out as bytes, and who is there."""

from __future__ import annotations

from typing import Annotated, TypeAlias

import msgspec
from aiohttp import web
from msgspec import Meta, Struct, field

from bros_router.about import server_version
from bros_router.api import errors, handlers
from bros_router.api.call import API, preparation
from bros_router.api.exchange import json_response, read_for_inference
from bros_router.api.service_level import service_level
from bros_router.api.together import together
from bros_router.api.types import GenerateParameters, GenerateRequest, Usize

Byte: TypeAlias = Annotated[int, Meta(ge=0, le=255)]


class Input(Struct, frozen=True):
    """One prompt: UTF-8. What is said of its shape and type is not looked at."""

    name: str
    shape: list[Usize]
    datatype: str
    data: list[Byte]


class RequestedOutput(Struct, frozen=True):
    """What the reply to a prompt is to be called."""

    name: str


class InferenceBody(Struct, frozen=True, kw_only=True):
    """Body of the inference route: as many outputs as inputs."""

    id: str
    #: Absent parameters mean sampling, as in `GenerateRequest`.
    parameters: GenerateParameters = field(default_factory=lambda: GenerateParameters(do_sample=True))
    inputs: list[Input]
    outputs: list[RequestedOutput]


class Output(Struct, frozen=True):
    """One reply: UTF-8, `(1, bytes)`."""

    name: str
    shape: tuple[int, int]
    datatype: str
    data: list[int]


class InferenceReply(Struct, frozen=True):
    """Reply of the inference route, in the order of the inputs."""

    id: str
    outputs: list[Output]


class Metadata(Struct, frozen=True):
    """What a server, or a model of it, is called and can do."""

    name: str
    version: str
    extensions: list[str]


class Live(Struct, frozen=True):
    """Something is there. TGI says so of what is ready, too."""

    live: bool = True


_decoder = msgspec.json.Decoder(InferenceBody)


async def server_metadata(request: web.Request) -> web.StreamResponse:
    """`GET /v2`: TGI's own name, which clients may ask for."""
    return json_response(Metadata("text-generation-inference", server_version(), ["health", "models", "metrics"]))


async def health_live(request: web.Request) -> web.StreamResponse:
    """`GET /v2/health/live`: the event loop turns."""
    return json_response(Live())


async def health_ready(request: web.Request) -> web.StreamResponse:
    """`GET /v2/health/ready` and that of a model: whether a request sent now would be served."""
    if not request.app[API].service.is_ready:
        raise errors.UnhealthyError
    return json_response(Live())


async def model_metadata(request: web.Request) -> web.StreamResponse:
    """`GET /v2/models/{name}/versions/{version}`: there is one model, whatever it is called."""
    return json_response(Metadata(request.match_info["name"], request.match_info["version"], ["infer", "ready"]))


async def infer(request: web.Request) -> web.StreamResponse:
    """`POST /v2/models/{name}/versions/{version}/infer`: all inputs at once. Where one fails, the request does."""
    api = request.app[API]
    body = await read_for_inference(request, _decoder)
    with preparation(api, service_level(request.headers, body.parameters.priority, api.config)):
        api.check_room(len(body.inputs))
        texts = [_text(each) for each in body.inputs]
        if len(texts) != len(body.outputs):
            raise errors.LengthMismatchError

    async def output(text: str, requested: RequestedOutput) -> Output:
        reply, _ = await handlers.generate_reply(request, GenerateRequest(inputs=text, parameters=body.parameters))
        data = list(reply.generated_text.encode())
        return Output(requested.name, (1, len(data)), "BYTES", data)

    outputs = await together(output(*pair) for pair in zip(texts, body.outputs, strict=True))
    return json_response(InferenceReply(body.id, outputs))


def _text(prompt: Input) -> str:
    try:
        return bytes(prompt.data).decode()
    except UnicodeDecodeError as error:
        raise errors.Utf8Error(error) from None
