"""Writes what clients ask for as a grammar that llguidance compiles. Only the helper process imports this."""

from __future__ import annotations

from typing import Any, Final

import jsonschema
import msgspec
from llguidance import LLMatcher, regex_to_lark

from bros_router.grammars.protocol import (
    NO_TOOL,
    CallableTool,
    GrammarSource,
    RegexSource,
    Rule,
    SchemaSource,
    SchemaTextSource,
    ToolsSource,
)
from bros_router.grammars.schema import closed

#: TGI's whitespace, which is Outlines': at most one space where JSON may have any.
_WHITESPACE: Final = "[ ]?"
#: Digits, word characters and spaces are ASCII's, as in TGI.
_ASCII: Final = "dws"
_EXTENSION: Final = "x-guidance"


class RefusedGrammarError(Exception):
    """There is no grammar. The message is public."""

    def __init__(self, rule: Rule, reason: str = "") -> None:
        super().__init__(reason)
        self.rule: Rule = rule


def write(source: GrammarSource) -> str:
    """The grammar. Raises `RefusedGrammarError`."""
    match source:
        case RegexSource(regex):
            return LLMatcher.grammar_from_lark(f"start: /{regex_to_lark(regex, _ASCII)}/")
        case SchemaTextSource(text):
            return _of_schema(_parsed(text), needs_properties=True)
        case SchemaSource(schema, needs_properties):
            return _of_schema(schema, needs_properties=needs_properties)
        case ToolsSource(tools, may_decline, max_calls):
            return _of_tools(tools, max_calls, may_decline=may_decline)


def warm_up() -> None:
    """Load what is loaded late."""
    write(SchemaSource({"properties": {"a": {"type": "string"}}}))


def _parsed(text: str) -> Any:
    try:
        return msgspec.json.decode(text)
    except (msgspec.DecodeError, RecursionError) as error:
        raise RefusedGrammarError("invalid", str(error)) from None


def _of_schema(schema: Any, *, needs_properties: bool) -> str:
    _check_schema(schema)
    if not isinstance(schema, dict) or (needs_properties and "properties" not in schema):
        raise RefusedGrammarError("invalid", "Grammar must have a 'properties' field")
    return msgspec.json.encode({"grammars": [{"json_schema": _as_written(schema)}]}).decode()


def _of_tools(tools: list[CallableTool], max_calls: int, *, may_decline: bool) -> str:
    """Each schema is a grammar of its own, so that what it refers to is found in it."""
    rules = [f"start: call{{1,{max_calls}}}" + (" | decline" if may_decline else "")]
    rules.append("call: " + " | ".join(f"HEAD tool_{index} TAIL" for index in range(len(tools))))
    rules += [f"tool_{index}: %json {_json_of_call(tool)}" for index, tool in enumerate(tools)]
    if may_decline:
        rules += ["decline: HEAD no_tool TAIL", f"no_tool: %json {_json_of_call(CallableTool(NO_TOOL, {}))}"]
    # Each one lexeme: a space that stood alone before an inner grammar would be taken for part of it.
    rules += [rf'HEAD: /\{{{_WHITESPACE}"function"{_WHITESPACE}:{_WHITESPACE}/', rf"TAIL: /{_WHITESPACE}\}}/"]
    return LLMatcher.grammar_from_lark("\n".join(rules))


def _json_of_call(tool: CallableTool) -> str:
    """The schema of a call: its name, then its arguments."""
    schema: dict[str, Any] = tool.schema if isinstance(tool.schema, dict) else {}
    if isinstance(schema.get("additionalProperties"), str):  # the one form that TGI knows
        schema = schema | {"additionalProperties": schema["additionalProperties"] == "true"}
    _check_schema(schema)
    name = {"_name": {"type": "string", "const": tool.name}}
    call = {
        "type": "object",
        "properties": name | {key: value for key, value in schema.get("properties", {}).items() if key not in name},
        "required": ["_name", *schema.get("required", ())],
    }
    return msgspec.json.encode(_as_written(schema | call)).decode()


def _check_schema(schema: Any) -> None:
    """Raises `RefusedGrammarError` where it is no schema of JSON Schema's draft 2020-12."""
    try:
        jsonschema.Draft202012Validator.check_schema(schema)
    except jsonschema.SchemaError as error:
        raise RefusedGrammarError("invalid", error.message) from None


def _as_written(schema: dict[str, Any]) -> dict[str, Any]:
    """The schema as llguidance is to read it. What a client says to llguidance is dropped."""
    written: dict[str, Any] = closed(schema)
    return written | {_EXTENSION: {"whitespace_pattern": _WHITESPACE}}
