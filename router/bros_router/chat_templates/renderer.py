"""The router's side of the template helper: starts it, asks it, and replaces it where it dies."""

from __future__ import annotations

import asyncio
import contextlib
import signal
import sys
from asyncio.subprocess import DEVNULL, PIPE, Process
from collections.abc import Mapping
from typing import Any, Final

import msgspec
import structlog

from bros_router.chat_templates.protocol import (
    LENGTH_BYTES,
    MAX_REPLY_BYTES,
    Refused,
    Rendered,
    RenderReply,
    RenderRequest,
    body_length,
    to_frame,
)
from bros_router.chat_templates.source import ChatTemplate
from bros_router.child_environment import child_environment
from bros_router.request import OverloadedError

#: Chats that may wait for the helper, each with its body in memory.
_MAX_PENDING: Final = 1024
#: The helper limits its own processor time; this is for one that does not run at all.
_DEADLINE_S: Final = 10.0
#: A helper that closed its pipes is about to end: by itself, so that its status says why.
_EXIT_GRACE_S: Final = 5.0
_PROGRAM: Final = (sys.executable, "-m", "bros_router.chat_templates.helper")

_reply_decoder: msgspec.json.Decoder[RenderReply] = msgspec.json.Decoder(RenderReply)

log = structlog.get_logger()


class TemplateError(Exception):
    """A chat template gave no prompt. The message is public."""


class TemplateRenderer:
    """Renders chat templates in a helper process, which is started by the first chat: one template after another.

    All methods belong to the event loop's thread, which must be the main one (`bros_shard.lifeline`).
    """

    def __init__(self) -> None:
        self._process: Process | None = None
        self._turn = asyncio.Lock()
        self._pending: set[asyncio.Task[RenderReply]] = set()

    async def render(self, template: ChatTemplate, variables: Mapping[str, Any]) -> str:
        """The prompt that `template` makes of `variables`, which are JSON.

        Raises:
            TemplateError: the template is none, refuses the messages, or takes too much time or memory.
            OverloadedError: too many chats wait for the helper.
        """
        if len(self._pending) >= _MAX_PENDING:
            raise OverloadedError
        try:
            frame = to_frame(RenderRequest(template.source, {**template.special_tokens, **variables}))
        except UnicodeEncodeError:
            raise TemplateError("the template is not Unicode") from None
        asking = asyncio.create_task(self._ask(frame))
        self._pending.add(asking)
        asking.add_done_callback(self._pending.discard)
        # A client that leaves must not leave the helper in the middle of a frame.
        match await asyncio.shield(asking):
            case Rendered(prompt):
                return prompt
            case Refused(reason):
                raise TemplateError(reason)

    async def close(self) -> None:
        """End the helper. Chats that wait for it are given up."""
        for asking in self._pending:
            asking.cancel()
        await self._end()

    async def _ask(self, frame: bytes) -> RenderReply:
        async with self._turn:
            try:
                return await asyncio.wait_for(self._exchange(frame), _DEADLINE_S)
            except (OSError, EOFError, asyncio.TimeoutError, msgspec.DecodeError) as error:
                status = await self._end(grace_s=_EXIT_GRACE_S if isinstance(error, EOFError) else 0.0)
                log.error("template helper ended", status=status, reason=type(error).__name__)
                return Refused("rendering takes too long" if status == -signal.SIGPROF else "rendering failed")

    async def _exchange(self, frame: bytes) -> RenderReply:
        process = await self._running_process()
        assert process.stdin is not None and process.stdout is not None
        process.stdin.write(frame)
        await process.stdin.drain()
        num_bytes = body_length(await process.stdout.readexactly(LENGTH_BYTES))
        if num_bytes > MAX_REPLY_BYTES:
            raise ConnectionError  # whatever this is, nothing that follows it can be understood
        return _reply_decoder.decode(await process.stdout.readexactly(num_bytes))

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
            *_PROGRAM,
            env=child_environment(),
            stdin=PIPE,
            stdout=PIPE,
            stderr=DEVNULL,
            start_new_session=True,
            limit=MAX_REPLY_BYTES,
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
