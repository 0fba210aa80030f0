"""How one reply tells the tools that it calls: as OpenAI's clients expect, or in TGI's very bytes."""

from __future__ import annotations

import contextlib
import json
import uuid
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import msgspec
from msgspec import UNSET

from bros_router.api.chat_message import ASSISTANT, Message
from bros_router.api.errors import ToolApiError
from bros_router.api.tool_call_reader import CallPiece, ToolCallReader
from bros_router.api.v1_replies import (
    AssistantMessage,
    CalledFunction,
    Delta,
    FunctionDelta,
    ToolCall,
    ToolCallDelta,
)
from bros_router.grammars.protocol import NO_TOOL
from bros_router.request import FinishReason


@dataclass(frozen=True, slots=True)
class Calls:
    """What a whole reply calls."""

    #: Name and arguments, a text of JSON. That of the last one ends anywhere where the reply was cut off.
    calls: list[tuple[str, str]]
    is_complete: bool

    @property
    def has_declined(self) -> bool:
        """Whether the model chose to call none of its tools."""
        return any(name == NO_TOOL for name, _ in self.calls)

    @classmethod
    def read(cls, text: str) -> Calls:
        """The calls of a reply that matches the grammar of its tools."""
        reader = ToolCallReader()
        calls: list[tuple[str, str]] = []
        for piece in reader.feed(text):
            if piece.name is not None:
                calls.append((piece.name, piece.arguments))
            else:
                name, arguments = calls[-1]
                calls[-1] = name, arguments + piece.arguments
        return cls(calls, reader.is_complete)


class ToolReply(Protocol):
    """One reply, whole or streamed."""

    def message(self, calls: Calls, text: str) -> AssistantMessage:
        """The whole message; `text` is what the model said. Raises `ToolApiError` where that calls nothing."""
        ...

    def finish_reason(self, reason: FinishReason) -> str:
        """Why it ended."""
        ...

    def delta(self, pieces: Sequence[CallPiece], reason: FinishReason | None) -> Delta | None:
        """What the event of one token tells; `None`: there is none.

        Args:
            pieces: what the token completes.
            reason: why the reply ends with it, if it does.
        """
        ...


class OpenAIToolReply:
    """Each call has an id that nobody else has, told once; the reply ends because of its calls."""

    def __init__(self) -> None:
        self._is_first = True

    def message(self, calls: Calls, text: str) -> AssistantMessage:
        """A reply that was cut off shows what there is."""
        if not calls.calls:
            return AssistantMessage(ASSISTANT, "")
        return AssistantMessage(ASSISTANT, None, [_call(_new_id(), *call) for call in calls.calls])

    def finish_reason(self, reason: FinishReason) -> str:
        """The calls, unless it was cut off."""
        return "length" if reason is FinishReason.LENGTH else "tool_calls"

    def delta(self, pieces: Sequence[CallPiece], reason: FinishReason | None) -> Delta | None:
        """The last event may have no call in it."""
        if not pieces and reason is None:
            return None
        role = ASSISTANT if self._is_first else UNSET
        self._is_first = False
        calls = [
            ToolCallDelta(piece.index, UNSET, UNSET, FunctionDelta(UNSET, piece.arguments))
            if piece.name is None
            else ToolCallDelta(piece.index, _new_id(), "function", FunctionDelta(piece.name, piece.arguments))
            for piece in pieces
        ]
        return Delta(role=role, tool_calls=calls or UNSET)


class TgiToolReply:
    """One call, whose id is told with every token; a stream does not tell that it ended."""

    def __init__(self, messages: Sequence[Message]) -> None:
        """`messages` are those that the reply answers: streamed calls are numbered on from theirs."""
        self._stream_id = _next_id([call.id for message in messages for call in message.tool_calls or ()])

    def message(self, calls: Calls, text: str) -> AssistantMessage:
        """TGI reads the whole reply, so one that was cut off is an error."""
        if not calls.is_complete:
            raise ToolApiError(f"Failed to parse generated text: EOF while parsing {json.dumps(text)}")
        return AssistantMessage(ASSISTANT, UNSET, [_call("0", *call) for call in calls.calls])

    def finish_reason(self, reason: FinishReason) -> str:
        """As of any reply."""
        return "stop" if reason is FinishReason.EOS_TOKEN else reason.value

    def delta(self, pieces: Sequence[CallPiece], reason: FinishReason | None) -> Delta | None:
        """A token with nothing of a call in it has no event."""
        if not pieces:
            return None
        function = FunctionDelta(pieces[0].name, "".join(piece.arguments for piece in pieces))
        return Delta(role=ASSISTANT, tool_calls=[ToolCallDelta(0, self._stream_id, "function", function)])


def _call(call_id: str, name: str, arguments: str) -> ToolCall:
    with contextlib.suppress(msgspec.DecodeError):  # where it was cut off
        arguments = msgspec.json.encode(msgspec.json.decode(arguments)).decode()
    return ToolCall(call_id, "function", CalledFunction(None, name, arguments))


def _new_id() -> str:
    return f"call_{uuid.uuid4().hex}"


def _next_id(known: list[str]) -> str:
    """TGI's: one more than the largest, or any where some are no numbers."""
    try:
        return str(max((int(call_id) for call_id in known), default=-1) + 1)
    except ValueError:
        return str(uuid.uuid4())
