"""Server-sent events: one reply as a stream, kept alive while nothing happens, given up when nobody reads."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from types import TracebackType

import msgspec
from aiohttp import web

_KEEP_ALIVE = b":\n\n"
#: A write waits where 64 KiB are under way already, which is the loop's own limit: below half of that a deadline, which
#: takes longer to set than the event to write, is not needed.
_NEVER_BLOCKS_BELOW = 32 * 1024
_HEADERS = {
    "Content-Type": "text/event-stream",
    "Cache-Control": "no-cache",
    "X-Accel-Buffering": "no",
}


class EventStream:
    """The stream of one request. Leaving the `with` block ends what keeps it alive, not the response.

        async with EventStream(request, ...) as events:
            await events.open({"x-request-class": "rt"})
            await events.send(b'{"token": ...}')
        return events.response

    A write that stays blocked for `write_deadline_s` aborts the connection: its client reads too slowly. `send`
    then raises `ConnectionError`, as it does whenever the client is gone.
    """

    def __init__(
        self,
        request: web.Request,
        *,
        keep_alive_s: float,
        write_deadline_s: float,
    ) -> None:
        self.response = web.StreamResponse(headers=_HEADERS)
        self._request = request
        self._keep_alive_s = keep_alive_s
        self._write_deadline_s = write_deadline_s
        self._loop = asyncio.get_running_loop()
        self._last_write_s = self._loop.time()
        self._keep_alive_task: asyncio.Task[None] | None = None
        self._opening = asyncio.Lock()

    async def __aenter__(self) -> EventStream:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._keep_alive_task is not None:
            self._keep_alive_task.cancel()

    async def open(self, headers: Mapping[str, str]) -> None:
        """Send the status, which is 200, and the headers, unless they were sent: of several calls the first counts.

        Events may follow, and comments while there are none.
        """
        async with self._opening:
            if self._keep_alive_task is not None:
                return
            self.response.headers.update(headers)
            await self.response.prepare(self._request)
            self._last_write_s = self._loop.time()
            self._keep_alive_task = asyncio.create_task(self._keep_alive())

    async def send(self, data: bytes) -> None:
        """Send one event. `data` is one line. Raises `ConnectionError` where the client is gone."""
        await self._write(b"data: " + data + b"\n\n")

    async def send_json(self, event: msgspec.Struct) -> None:
        """Send one event as JSON. Raises `ConnectionError` where the client is gone."""
        await self.send(msgspec.json.encode(event))

    async def _write(self, data: bytes) -> None:
        transport = self._request.transport
        if transport is None:
            raise ConnectionResetError
        self._last_write_s = self._loop.time()
        if transport.get_write_buffer_size() + len(data) < _NEVER_BLOCKS_BELOW:
            await self.response.write(data)
            return
        deadline = self._loop.call_later(self._write_deadline_s, transport.abort)
        try:
            await self.response.write(data)
        finally:
            deadline.cancel()

    async def _keep_alive(self) -> None:
        """A comment after each period in which nothing was sent."""
        while True:
            idle_s = self._loop.time() - self._last_write_s
            if idle_s >= self._keep_alive_s:
                try:
                    await self._write(_KEEP_ALIVE)
                except ConnectionError:
                    return  # the handler finds out by itself
            else:
                await asyncio.sleep(self._keep_alive_s - idle_s)
