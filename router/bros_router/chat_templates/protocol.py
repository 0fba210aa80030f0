"""What the router asks its template helper, and what it is answered (`bros_router.helper.frame`)."""

from __future__ import annotations

from typing import Any, Final, TypeAlias

from msgspec import Struct

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
