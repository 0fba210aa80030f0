"""What the router and its template helper say to each other: one JSON object a frame, its length first.

JSON, since what clients give to a template is JSON: numbers of any size come through.
"""

from __future__ import annotations

from typing import Any, Final, TypeAlias

import msgspec
from msgspec import Struct

#: Unsigned, big-endian: how many bytes follow.
LENGTH_BYTES: Final = 4
#: Longest prompt that a template may render: more than a body holds, by default, and than any model reads.
MAX_PROMPT_CHARACTERS: Final = 4 * 2**20
#: Longest reason that is told to a client.
MAX_REASON_CHARACTERS: Final = 1000
#: A character takes six bytes at most, as `\u0000`.
MAX_REPLY_BYTES: Final = 6 * MAX_PROMPT_CHARACTERS + 1024


class RenderRequest(Struct, frozen=True):
    """Router to helper: a template, and what it sees."""

    source: str
    variables: dict[str, Any]


class Rendered(Struct, frozen=True, tag="rendered"):
    """Helper to router: the prompt."""

    prompt: str


class Refused(Struct, frozen=True, tag="refused"):
    """Helper to router: there is no prompt. The reason is public."""

    reason: str


RenderReply: TypeAlias = Rendered | Refused


def to_frame(message: RenderRequest | RenderReply) -> bytes:
    """The message behind its length. Raises `UnicodeEncodeError` where a text holds half a surrogate pair."""
    body = msgspec.json.encode(message)
    return len(body).to_bytes(LENGTH_BYTES, "big") + body


def body_length(header: bytes) -> int:
    """How many bytes follow a frame's header."""
    return int.from_bytes(header, "big")
