"""Vertex AI's route: several prompts or chats in one body, a text for each."""

from __future__ import annotations

import msgspec
from aiohttp import web
from msgspec import Struct

from bros_router.api import chat, errors
from bros_router.api.call import API, Api, preparation, whole_replies
from bros_router.api.exchange import json_response, read_for_inference
from bros_router.api.invocations import UntaggedDecoder
from bros_router.api.service_level import service_level
from bros_router.api.together import together
from bros_router.api.types import GenerateParameters
from bros_router.api.v1_bodies import AnyChatBody
from bros_router.api.validation import InferenceRequest


class GenerateInstance(Struct, frozen=True, kw_only=True):
    """A prompt. Of its parameters TGI uses the number of new tokens and the seed; it always samples."""

    inputs: str
    parameters: GenerateParameters | None = None


class VertexBody(Struct, frozen=True):
    """Body of `/vertex`."""

    instances: list[msgspec.Raw]


class VertexReply(Struct, frozen=True):
    """Reply of `/vertex`: generated texts, in the order of the instances."""

    predictions: list[str]


_decoder = msgspec.json.Decoder(VertexBody)
_generate_decoder = msgspec.json.Decoder(GenerateInstance)


async def vertex(request: web.Request) -> web.StreamResponse:
    """`POST /vertex`: all instances at once. Where one fails, the request does."""
    api = request.app[API]
    body = await read_for_inference(request, _decoder)
    with preparation(api, service_level(request.headers, None, api.config)):
        if not body.instances:
            raise errors.NoInstancesError
        api.check_room(len(body.instances))
    instances = [_decoded(api, instance) for instance in body.instances]
    return json_response(VertexReply(await together(_prediction(request, instance) for instance in instances)))


def _decoded(api: Api, instance: msgspec.Raw) -> GenerateInstance | AnyChatBody:
    decoder = UntaggedDecoder[GenerateInstance | AnyChatBody](
        "VertexInstance", (_generate_decoder, api.dialect.chat_decoder)
    )
    try:
        return decoder.decode(bytes(instance))
    except msgspec.ValidationError as error:
        raise errors.invalid_shape(f"instances: {error}") from None


async def _prediction(request: web.Request, instance: GenerateInstance | AnyChatBody) -> str:
    if not isinstance(instance, GenerateInstance):
        return await chat.chat_text(request, instance)
    api = request.app[API]
    given = instance.parameters or GenerateParameters()
    parameters = GenerateParameters(do_sample=True, max_new_tokens=given.max_new_tokens, seed=given.seed)
    level = service_level(request.headers, given.priority, api.config)
    (reply,) = await whole_replies(api, InferenceRequest(instance.inputs, parameters), level)
    return reply.finish.generated_text
