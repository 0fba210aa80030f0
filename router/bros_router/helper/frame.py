"""What the router and a helper process say to each other: JSON, its length first.

JSON, since what clients give to helpers is JSON: numbers of any size come through.
"""

from __future__ import annotations

from typing import Final

import msgspec

#: Unsigned, big-endian: how many bytes follow.
LENGTH_BYTES: Final = 4


def to_frame(message: msgspec.Struct) -> bytes:
    """The message behind its length. Raises `UnicodeEncodeError` where a text holds half a surrogate pair."""
    body = msgspec.json.encode(message)
    return len(body).to_bytes(LENGTH_BYTES, "big") + body


def body_length(header: bytes) -> int:
    """How many bytes follow a frame's header."""
    return int.from_bytes(header, "big")
