"""Grammars as TGI's clients write them: a type, and what is of that type."""

from __future__ import annotations

from typing import Any, TypeAlias

from msgspec import UNSET, Struct, UnsetType


class JsonGrammar(Struct, frozen=True, tag_field="type", tag="json"):
    """A JSON schema: an object, or a text that holds one."""

    value: Any


class JsonObjectGrammar(Struct, frozen=True, tag_field="type", tag="json_object"):
    """The same by another name."""

    value: Any


class SchemaConfig(Struct, frozen=True):
    """A JSON schema with a name."""

    schema: Any
    name: str | None = None


class JsonSchemaGrammar(Struct, frozen=True, tag_field="type", tag="json_schema"):
    """A JSON schema with a name."""

    value: SchemaConfig


class RegexGrammar(Struct, frozen=True, tag_field="type", tag="regex"):
    """A regular expression for the whole text."""

    value: str


Grammar: TypeAlias = JsonGrammar | JsonObjectGrammar | JsonSchemaGrammar | RegexGrammar


# --- as OpenAI's clients write them, and TGI's


class TextFormat(Struct, frozen=True, tag_field="type", tag="text"):
    """Anything."""


class JsonObjectFormat(Struct, frozen=True, tag_field="type", tag="json_object"):
    """Any object; or TGI's JSON schema."""

    value: Any = UNSET


class JsonSchemaFormat(Struct, frozen=True, tag_field="type", tag="json_schema"):
    """A JSON schema with a name: in OpenAI's field, or in TGI's."""

    json_schema: SchemaConfig | UnsetType = UNSET
    value: SchemaConfig | UnsetType = UNSET

    def __post_init__(self) -> None:
        """Raises `ValueError` where there is neither; the decoder turns it into its own error."""
        if self.json_schema is UNSET and self.value is UNSET:
            raise ValueError("Object missing required field `json_schema`")


ResponseFormat: TypeAlias = TextFormat | JsonObjectFormat | JsonSchemaFormat | JsonGrammar | RegexGrammar
