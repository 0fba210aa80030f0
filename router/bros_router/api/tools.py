"""The tools of a chat: as clients offer them, as the model is told of them, and as its reply names them.

The model replies in TGI's form, `{"function": {"_name": "f", "x": 1}}`, which a grammar holds it to.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final, TypeAlias

import msgspec
from msgspec import UNSET, Struct

from bros_router.api.errors import ToolApiError
from bros_router.grammars.protocol import NO_TOOL, CallableTool, ToolsSource

#: What TGI tells the model after the tools.
DEFAULT_TOOL_PROMPT: Final = (
    "\nGiven the functions available, please respond with a JSON for a function call with its proper arguments that"
    " best answers the given prompt. Respond in the format {name: function name, parameters: dictionary of argument"
    " name and its value}.Do not use variables.\n"
)
#: Calls of a reply where a client asks for several.
_MAX_PARALLEL_CALLS: Final = 16


class FunctionDefinition(Struct, frozen=True):
    """A function that the model may call. `arguments` is another name for `parameters`, a JSON schema."""

    name: str
    description: str | None = None
    parameters: Any = UNSET
    arguments: Any = UNSET

    @property
    def has_schema(self) -> bool:
        """Whether it says what its arguments are."""
        return not (self.parameters is UNSET and self.arguments is UNSET)

    @property
    def schema(self) -> Any:
        """The schema of the arguments. OpenAI's clients may leave it out: there are none."""
        given = self.arguments if self.parameters is UNSET else self.parameters
        return {"type": "object", "properties": {}} if given is UNSET else given


class Tool(Struct, frozen=True):
    """A tool that the model may use: they are all functions."""

    type: str
    function: FunctionDefinition


class FunctionName(Struct, frozen=True):
    """Which function."""

    name: str


class FunctionChoice(Struct, frozen=True):
    """This function, and no other."""

    function: FunctionName


#: `auto`, `none`, `required`, or in TGI the name of a function.
ToolChoice: TypeAlias = str | FunctionChoice | None

#: TGI offers it beside the others where the model may choose not to call any.
_NO_TOOL: Final = Tool(
    "function",
    FunctionDefinition(NO_TOOL, "Open ended response with no specific tool selected", {"type": "object"}),
)


@dataclass(frozen=True, slots=True)
class ToolsInPlay:
    """The tools that one reply may call. There is at least one."""

    tools: list[Tool]
    #: Whether the model may call none of them.
    may_decline: bool
    #: What the model is told after the tools.
    prompt: str
    max_calls: int

    @property
    def source(self) -> ToolsSource:
        """What the reply must match."""
        callables = [CallableTool(tool.function.name, tool.function.schema) for tool in self.tools]
        return ToolsSource(callables, self.may_decline, self.max_calls)

    @property
    def _told(self) -> list[Tool]:
        return [*self.tools, _NO_TOOL] if self.may_decline else self.tools

    def as_openai(self) -> list[dict[str, Any]]:
        """As templates of models know them."""
        return [
            {
                "type": tool.type,
                "function": {
                    "name": tool.function.name,
                    "description": tool.function.description or "",
                    "parameters": tool.function.schema,
                },
            }
            for tool in self._told
        ]

    def as_tgi(self) -> list[dict[str, Any]]:
        """As TGI writes them: the schema is a text."""
        return [
            {
                "type": tool.type,
                "function": {
                    "description": tool.function.description,
                    "name": tool.function.name,
                    "arguments": msgspec.json.encode(tool.function.schema).decode(),
                },
            }
            for tool in self._told
        ]

    def appendix(self, *, template_knows_tools: bool) -> str:
        """What is added to the last message."""
        told = "" if template_knows_tools else msgspec.json.encode(self.as_tgi()).decode() + "\n"
        return f"\n---\n{told}{self.prompt}"


def tools_in_play(
    tools: Sequence[Tool] | None, choice: ToolChoice, prompt: str | None, *, is_parallel: bool = False
) -> ToolsInPlay | None:
    """The tools that a reply may call; `None`: there are none, and a choice without tools means nothing.

    Args:
        prompt: what the model is told after the tools; empty or `None`: TGI's own words.
        is_parallel: it may call several, where no function is chosen.

    Raises:
        ToolApiError: the function that is chosen is not among them.
    """
    if not tools or choice == "none":
        return None
    prompt = prompt or DEFAULT_TOOL_PROMPT
    if choice in (None, "auto", "required"):
        max_calls = _MAX_PARALLEL_CALLS if is_parallel else 1
        return ToolsInPlay([*tools], choice != "required", prompt, max_calls)
    name = choice if isinstance(choice, str) else choice.function.name
    chosen = next((tool for tool in tools if tool.function.name == name), None)
    if chosen is None:
        raise ToolApiError(f"Tool with name {name} not found")
    return ToolsInPlay([chosen], False, prompt, 1)
