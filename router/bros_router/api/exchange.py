"""What every route shares of HTTP: reading a body, answering JSON, streaming events."""

from __future__ import annotations

import contextlib
from collections.abc import Awaitable, Callable, Mapping
from typing import TypeVar

import msgspec
from aiohttp import web

from bros_router.api import errors
from bros_router.api.body import Decoder, read_json
from bros_router.api.call import API
from bros_router.api.sse import EventStream

T = TypeVar("T")


async def read_body(request: web.Request, decoder: Decoder[T]) -> T:
    """The decoded body. Raises `Rejection` or `ApiError` where there is none."""
    api = request.app[API]
    return await read_json(request, decoder, limit_bytes=api.config.payload_limit, deadline_s=api.timeouts.body_s)


async def read_for_inference(request: web.Request, decoder: Decoder[T]) -> T:
    """As `read_body`. Refuses while nothing is served: before the body is read, and again after the time that took."""
    api = request.app[API]
    api.served()
    body = await read_body(request, decoder)
    api.served()
    return body


def json_response(value: object, headers: Mapping[str, str] | None = None, status: int = 200) -> web.Response:
    """A whole reply."""
    body = msgspec.json.encode(value)
    return web.Response(status=status, body=body, headers=headers, content_type="application/json")


async def stream_response(
    request: web.Request,
    headers: Mapping[str, str],
    send_events: Callable[[EventStream], Awaitable[None]],
    *,
    error_event: Callable[[errors.ApiError], bytes] = errors.ApiError.body,
    last_event: bytes | None = None,
) -> web.StreamResponse:
    """Answer 200; whatever goes wrong is an event.

    Args:
        headers: those of a stream that `send_events` could not open.
        send_events: opens the stream and sends what there is to send. May raise `ApiError`.
        error_event: how such an error is told, as one line.
        last_event: what every stream ends with, if with anything.
    """
    timeouts = request.app[API].timeouts
    stream = EventStream(request, keep_alive_s=timeouts.keep_alive_s, write_deadline_s=timeouts.write_s)
    with contextlib.suppress(ConnectionError):  # the client is gone
        async with stream:
            try:
                await send_events(stream)
            except errors.ApiError as error:
                await stream.open({**headers, **error.headers()})
                await stream.send(error_event(error))
            if last_event is not None:
                await stream.send(last_event)
    return stream.response
