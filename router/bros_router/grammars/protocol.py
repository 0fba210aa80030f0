"""What the router asks its grammar helper, and what it is answered (`bros_router.helper.frame`)."""

from __future__ import annotations

from typing import Any, Final, Literal, TypeAlias

from msgspec import Struct

from bros_shard.protocol import MAX_GRAMMAR_BYTES

#: Longest reason that is told to a client.
MAX_REASON_CHARACTERS: Final = 1000
#: A character takes six bytes at most, as `\u0000`.
MAX_REPLY_BYTES: Final = 6 * MAX_GRAMMAR_BYTES + 8192


#: What a model calls that calls none of its tools: TGI's name.
NO_TOOL: Final = "no_tool"


class SchemaSource(Struct, frozen=True, tag="schema"):
    """JSON that a schema describes."""

    schema: Any
    #: TGI takes no schema without properties.
    needs_properties: bool = True


class SchemaTextSource(Struct, frozen=True, tag="schema_text"):
    """The same, with the schema as a text of JSON."""

    text: str


class RegexSource(Struct, frozen=True, tag="regex"):
    """A text that a regular expression matches as a whole."""

    regex: str


class CallableTool(Struct, frozen=True):
    """A function, and the schema of its arguments."""

    name: str
    schema: Any


class ToolsSource(Struct, frozen=True, tag="tools"):
    """Calls of tools, in TGI's form."""

    tools: list[CallableTool]
    #: Whether the text may name `NO_TOOL` instead.
    may_decline: bool
    max_calls: int


GrammarSource: TypeAlias = SchemaSource | SchemaTextSource | RegexSource | ToolsSource

#: Which of TGI's rules a grammar breaks: the model cannot be guided, this is no grammar, it cannot be compiled.
Rule: TypeAlias = Literal["unsupported", "invalid", "uncompilable"]


class Vetted(Struct, frozen=True, tag="vetted"):
    """Helper to router: the grammar as ranks take it, which was compiled within all limits."""

    grammar: str


class Refused(Struct, frozen=True, tag="refused"):
    """Helper to router: there is no grammar. The reason is public."""

    rule: Rule
    reason: str = ""


VetReply: TypeAlias = Vetted | Refused
