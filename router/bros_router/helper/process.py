"""The router's side of a helper process: starts it, asks it, and replaces it where it dies."""

from __future__ import annotations

import asyncio
import contextlib
import signal
import sys
from asyncio.subprocess import DEVNULL, PIPE, Process
from collections.abc import Sequence
from typing import Final, Generic, TypeVar

import msgspec
import structlog

from bros_router.child_environment import child_environment
from bros_router.helper.frame import LENGTH_BYTES, body_length
from bros_router.request import OverloadedError

#: Questions that may wait for a helper, each with its body in memory.
_MAX_PENDING: Final = 1024
#: A helper limits its own processor time; this is for one that does not run at all.
_DEADLINE_S: Final = 10.0
#: A helper that closed its pipes is about to end: by itself, so that its status says why.
_EXIT_GRACE_S: Final = 5.0

Reply = TypeVar("Reply")

log = structlog.get_logger()


class HelperError(Exception):
    """The helper ended without an answer. The next question starts another."""

    def __init__(self, *, took_too_long: bool) -> None:
        """`took_too_long`: the answer took more processor time than it may."""
        super().__init__("the helper ended")
        self.took_too_long = took_too_long


class HelperProcess(Generic[Reply]):
    """A helper (`bros_router.helper.loop`), which is started by the first question: one question after another.

    All methods belong to the event loop's thread, which must be the main one (`bros_shard.lifeline`).
    """

    def __init__(
        self, module: str, arguments: Sequence[str] = (), *, decoder: msgspec.json.Decoder[Reply], max_reply_bytes: int
    ) -> None:
        """`module` is run with `arguments`. A reply that is too long, or not what `decoder` wants, ends the helper."""
        self._module = module
        self._program = (sys.executable, "-m", module, *arguments)
        self._decoder = decoder
        self._max_reply_bytes = max_reply_bytes
        self._process: Process | None = None
        self._turn = asyncio.Lock()
        self._pending: set[asyncio.Task[Reply]] = set()

    @property
    def pid(self) -> int | None:
        """Of the process that runs now, if one does."""
        return None if self._process is None else self._process.pid

    async def ask(self, frame: bytes) -> Reply:
        """The answer to a frame.

        Raises:
            HelperError: there is none.
            OverloadedError: too many questions wait for the helper.
        """
        if len(self._pending) >= _MAX_PENDING:
            raise OverloadedError
        asking = asyncio.create_task(self._ask(frame))
        self._pending.add(asking)
        asking.add_done_callback(self._pending.discard)
        # A client that leaves must not leave the helper in the middle of a frame.
        return await asyncio.shield(asking)

    async def close(self) -> int | None:
        """End the helper, if there is one, and give up the questions that wait for it. Returns its exit status."""
        for asking in self._pending:
            asking.cancel()
        return await self._end()

    async def _ask(self, frame: bytes) -> Reply:
        async with self._turn:
            try:
                return await asyncio.wait_for(self._exchange(frame), _DEADLINE_S)
            except (OSError, EOFError, asyncio.TimeoutError, msgspec.DecodeError) as error:
                status = await self._end(grace_s=_EXIT_GRACE_S if isinstance(error, EOFError) else 0.0)
                log.error("helper ended", helper=self._module, status=status, reason=type(error).__name__)
                raise HelperError(took_too_long=status == -signal.SIGPROF) from None

    async def _exchange(self, frame: bytes) -> Reply:
        process = await self._running_process()
        assert process.stdin is not None and process.stdout is not None
        process.stdin.write(frame)
        await process.stdin.drain()
        num_bytes = body_length(await process.stdout.readexactly(LENGTH_BYTES))
        if num_bytes > self._max_reply_bytes:
            raise ConnectionError  # whatever this is, nothing that follows it can be understood
        return self._decoder.decode(await process.stdout.readexactly(num_bytes))

    async def _running_process(self) -> Process:
        """The helper; another one where it died since it was last asked."""
        if self._process is not None:
            assert self._process.stdout is not None
            if not self._process.stdout.at_eof():
                return self._process
            await self._end()
        # A session of its own: Ctrl-C on the terminal reaches the launcher alone. With a buffer that holds any reply
        # reading is never paused, so the end of the process is always seen.
        self._process = await asyncio.create_subprocess_exec(
            *self._program,
            env=child_environment(),
            stdin=PIPE,
            stdout=PIPE,
            stderr=DEVNULL,
            start_new_session=True,
            limit=self._max_reply_bytes,
        )
        return self._process

    async def _end(self, grace_s: float = 0.0) -> int | None:
        """Kill the helper, unless it ends by itself in time. Its exit status, or the negative number of its signal."""
        process, self._process = self._process, None
        if process is None:
            return None
        if grace_s > 0.0:
            with contextlib.suppress(asyncio.TimeoutError):
                return await asyncio.wait_for(process.wait(), grace_s)
        with contextlib.suppress(ProcessLookupError):
            process.kill()
        return await process.wait()
