"""SageMaker's one route: whatever another route would take, told apart by its shape."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from typing import Generic, TypeVar

import msgspec
from aiohttp import web

from bros_router.api import chat, completions, handlers
from bros_router.api.body import Decoder
from bros_router.api.call import API
from bros_router.api.exchange import read_for_inference
from bros_router.api.types import CompatGenerateRequest
from bros_router.api.v1_bodies import AnyChatBody, AnyCompletionBody, ChatBody, TgiChatBody

T = TypeVar("T")

_any_json = msgspec.json.Decoder(msgspec.Raw)


class UntaggedDecoder(Generic[T]):
    """Decodes into the first of several types that fits."""

    def __init__(self, name: str, decoders: Sequence[Decoder[T]]) -> None:
        """`name`: what TGI calls such a value in its errors."""
        self._name = name
        self._decoders = decoders

    def decode(self, body: bytes, /) -> T:
        """The value. Raises `msgspec.DecodeError`, which is a `msgspec.ValidationError` where no type fits."""
        _any_json.decode(body)  # what is no JSON at all is said so, rather than that it does not fit
        for decoder in self._decoders:
            with contextlib.suppress(msgspec.ValidationError):
                return decoder.decode(body)
        raise msgspec.ValidationError(f"data did not match any variant of untagged enum {self._name}")


async def invocations(request: web.Request) -> web.StreamResponse:
    """`POST /invocations`: tries the body of `POST /`, of `/v1/chat/completions`, then of `/v1/completions`."""
    dialect = request.app[API].dialect
    decoder = UntaggedDecoder[CompatGenerateRequest | AnyChatBody | AnyCompletionBody](
        "SagemakerRequest", (handlers.COMPAT_DECODER, dialect.chat_decoder, dialect.completion_decoder)
    )
    body = await read_for_inference(request, decoder)
    if isinstance(body, CompatGenerateRequest):
        return await handlers.compat_reply(request, body)
    if isinstance(body, ChatBody | TgiChatBody):
        return await chat.chat_reply(request, body)
    return await completions.completions_reply(request, body)
