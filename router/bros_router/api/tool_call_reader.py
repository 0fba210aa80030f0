"""Finds tool calls in a reply, as it grows: `{"function": {"_name": "f", "x": 1}}` calls `f` with `{"x": 1}`."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Final

import msgspec

_HEAD: Final = re.compile(r'\s*\{\s*"function"\s*:\s*\{\s*"_name"\s*:\s*("(?:[^"\\]|\\.)*")\s*([,}])')


@dataclass(frozen=True, slots=True)
class CallPiece:
    """What a call grows by."""

    #: Which call of the reply, from 0.
    index: int
    #: With the first piece of a call alone.
    name: str | None
    #: Text of JSON; the pieces of a call join to an object.
    arguments: str


class ToolCallReader:
    """Reads one reply that matches the grammar of its tools. The model's own spacing is kept."""

    def __init__(self) -> None:
        self._index = 0
        #: What was not understood yet: the head of a call, or the brace behind one.
        self._head = ""
        #: Objects and arrays that are open in the arguments; 0 outside.
        self._depth = 0
        self._is_in_string = False
        self._is_escaped = False

    @property
    def is_complete(self) -> bool:
        """Whether the reply ended behind a call."""
        return self._index > 0 and self._depth == 0 and self._head.strip() in ("", "}")

    def feed(self, text: str) -> list[CallPiece]:
        """The pieces that `text`, which follows what was fed before, completes."""
        pieces = []
        while text:
            if self._depth:
                index = self._index
                arguments, text = self._split(text)
                pieces.append(CallPiece(index, None, arguments))
                continue
            self._head += text
            # Behind a call stands the brace that closes what stands around it.
            match = _HEAD.match(self._head, len(self._head) - len(self._head.lstrip(" \n}")))
            if match is None:
                break
            text, self._head = self._head[match.end() :], ""
            name = msgspec.json.decode(match[1], type=str)
            if match[2] == "}":
                pieces.append(CallPiece(self._index, name, "{}"))
                self._index += 1
            else:
                pieces.append(CallPiece(self._index, name, "{"))
                self._depth = 1
        return pieces

    def _split(self, text: str) -> tuple[str, str]:
        """What of `text` belongs to the arguments, and the rest."""
        for position, character in enumerate(text):
            if self._is_in_string:
                self._is_in_string = self._is_escaped or character != '"'
                self._is_escaped = character == "\\" and not self._is_escaped
            elif character == '"':
                self._is_in_string = True
            elif character in "{[":
                self._depth += 1
            elif character in "}]":
                self._depth -= 1
                if self._depth == 0:
                    self._index += 1
                    return text[: position + 1], text[position + 1 :]
        return text, ""
