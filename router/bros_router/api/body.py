"""Reading a request's body: its declared type, its size, its time, and JSON as strictly as TGI's stack reads it."""

from __future__ import annotations

import asyncio
import re
from itertools import accumulate, takewhile
from typing import Final, Protocol, TypeVar

import msgspec
from aiohttp import web

from bros_router.api import errors

T = TypeVar("T")
T_co = TypeVar("T_co", covariant=True)

#: TGI's parser refuses deeper nesting.
_MAX_DEPTH: Final = 128
#: Steps in depth, read as signed bytes.
_DEPTH_STEPS: Final = bytes.maketrans(b"[{]}", b"\x01\x01\xff\xff")
_NOT_BRACKETS: Final = bytes(set(range(256)) - set(b"[{]}"))
#: The library's way to say that one value was read and something follows, the first byte of which is number 1.
_TRAILING: Final = re.compile(r".* trailing characters \(byte (?P<number>\d+)\)")
#: The library's way to say where: ` - at `$.parameters.stop[0]``.
_PATH = re.compile(r"(?P<reason>.*) - at `\$\.?(?P<path>.*)`", re.DOTALL)


class Decoder(Protocol[T_co]):
    """What makes a value of JSON, as `msgspec.json.Decoder` does."""

    def decode(self, body: bytes, /) -> T_co:
        """The value. Raises `msgspec.DecodeError` or `UnicodeDecodeError` where the body is none."""
        ...


async def read_json(request: web.Request, decoder: Decoder[T], *, limit_bytes: int, deadline_s: float) -> T:
    """The decoded body.

    Args:
        limit_bytes: longest body.
        deadline_s: how long the whole body may take to arrive.

    Raises:
        Rejection: the type, size, framing, syntax or shape is wrong.
        BodyTimeoutError: the body did not arrive in time.
    """
    _check_declared_type(request)
    # Not `wait_for`: where the body ends just as the client leaves, it would swallow the cancellation (before 3.12).
    reading = asyncio.ensure_future(_read(request, limit_bytes))
    try:
        await asyncio.wait([reading], timeout=deadline_s)
        if not reading.done():
            raise errors.BodyTimeoutError
        return decode_json(decoder, reading.result())
    except web.RequestPayloadError:
        raise errors.unreadable_body() from None
    finally:
        reading.cancel()


def _check_declared_type(request: web.Request) -> None:
    kind, _, subtype = request.content_type.partition("/")
    if kind != "application" or not (subtype == "json" or subtype.endswith("+json")):
        raise errors.unsupported_content_type()
    if request.headers.get("Content-Encoding", "identity") != "identity":
        raise errors.unsupported_content_encoding()


async def _read(request: web.Request, limit_bytes: int) -> bytes:
    if (request.content_length or 0) > limit_bytes:
        raise errors.body_too_large()
    body = bytearray()
    async for chunk in request.content.iter_any():
        body += chunk
        if len(body) > limit_bytes:
            raise errors.body_too_large()
    return bytes(body)


def decode_json(decoder: Decoder[T], body: bytes) -> T:
    """Decode the first JSON value of `body`; what follows it is ignored, as TGI does.

    Raises:
        Rejection: 400 where it is not JSON, 422 where it is not what the decoder wants.
    """
    if _is_too_deep(body):
        raise errors.invalid_syntax("recursion limit exceeded")
    try:
        try:
            return decoder.decode(body)
        except msgspec.DecodeError as error:
            trailing = _TRAILING.fullmatch(str(error))
            if trailing is None:
                raise
            return decoder.decode(body[: int(trailing["number"]) - 1])
    except msgspec.ValidationError as error:
        reason = str(error)
        # No shape can hold such a number: TGI's parser refuses it while it reads.
        if reason.startswith("Number out of range"):
            raise errors.invalid_syntax(reason) from None
        raise errors.invalid_shape(_with_path_first(reason)) from None
    except msgspec.DecodeError as error:
        raise errors.invalid_syntax(str(error)) from None
    except UnicodeDecodeError:
        raise errors.invalid_syntax("invalid UTF-8") from None


def _is_too_deep(body: bytes) -> bool:
    """Whether the first value nests too deeply. Bodies with few brackets, nearly all, are not looked into."""
    if body.count(b"[") + body.count(b"{") <= _MAX_DEPTH:
        return False
    without_escapes = body.replace(rb"\\", b"").replace(rb"\"", b"")
    outside_strings = b"".join(without_escapes.split(b'"')[::2])
    steps = memoryview(outside_strings.translate(_DEPTH_STEPS, _NOT_BRACKETS)).cast("b")
    return max(takewhile(bool, accumulate(steps)), default=0) > _MAX_DEPTH


def _with_path_first(reason: str) -> str:
    """The library's message in TGI's order: `parameters.top_k: reason`."""
    match = _PATH.fullmatch(reason)
    if match is None or not match["path"]:
        return reason
    return f"{match['path']}: {match['reason']}"
