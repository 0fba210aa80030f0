"""One streamed request over HTTP: when each of its tokens came, or why there were none."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Final

import aiohttp
import msgspec

#: Inside a JSON string the quotes would be escaped: no text that a model writes can look like this.
_ERROR_KEY: Final = b'"error_type"'


class ReplyError(Exception):
    """The server refused the request or gave it up."""

    def __init__(self, status: int, error_type: str, message: str) -> None:
        super().__init__(f"{status} {error_type}: {message}")
        self.status = status
        self.error_type = error_type

    @property
    def is_overload(self) -> bool:
        """Whether the request was refused for lack of room. Streams say so in an event, under status 200."""
        return self.status == 429 or self.error_type in ("overloaded", "slo_infeasible")


def open_session(*trace_configs: aiohttp.TraceConfig) -> aiohttp.ClientSession:
    """A session in which every request has a connection of its own, as many independent clients have."""
    return aiohttp.ClientSession(
        connector=aiohttp.TCPConnector(limit=0, force_close=True),
        timeout=aiohttp.ClientTimeout(total=None, sock_connect=30),
        trace_configs=list(trace_configs),
    )


def encode_body(prompt: str, num_new_tokens: int) -> bytes:
    """The body that asks for exactly `num_new_tokens` tokens, chosen greedily."""
    return msgspec.json.encode(
        {"inputs": prompt, "parameters": {"max_new_tokens": num_new_tokens, "ignore_eos": True, "do_sample": False}}
    )


async def stream_tokens(
    session: aiohttp.ClientSession,
    url: str,
    body: bytes,
    on_token: Callable[[], None],
    headers: Mapping[str, str] | None = None,
    trace_context: object = None,
) -> None:
    """POST to `/generate_stream`; calls `on_token` as each token comes, and returns after the last one.

    Raises:
        ReplyError: the server answered with an error, before or after some tokens.
        aiohttp.ClientError: the connection failed.
    """
    async with session.post(
        f"{url}/generate_stream",
        data=body,
        headers={"Content-Type": "application/json", **(headers or {})},
        trace_request_ctx=trace_context,
    ) as response:
        if response.status != 200:
            raise _error(response.status, await response.read())
        async for line in response.content:
            if not line.startswith(b"data:"):
                continue  # the blank line after an event, or a sign of life
            if _ERROR_KEY in line:
                raise _error(response.status, line[len(b"data:") :])
            on_token()


def _error(status: int, body: bytes) -> ReplyError:
    try:
        fields: Any = msgspec.json.decode(body)
        return ReplyError(status, str(fields["error_type"]), str(fields["error"]))
    except (msgspec.DecodeError, KeyError, TypeError):
        return ReplyError(status, "", body[:200].decode(errors="replace"))
