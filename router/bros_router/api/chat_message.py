"""The messages of a chat, as clients send them and as a template sees them."""

from __future__ import annotations

from typing import Any, Final, TypeAlias

import msgspec
from msgspec import UNSET, Struct

#: The role of the model.
ASSISTANT: Final = "assistant"


class TextChunk(Struct, frozen=True, tag_field="type", tag="text"):
    """A piece of a message: text."""

    text: str

    @property
    def as_text(self) -> str:
        """What a template sees of it."""
        return self.text


class ImageUrl(Struct, frozen=True):
    """Where an image is. Nothing is ever fetched."""

    url: str


class ImageChunk(Struct, frozen=True, tag_field="type", tag="image_url"):
    """A piece of a message: an image, which a model of text reads as Markdown."""

    image_url: ImageUrl

    @property
    def as_text(self) -> str:
        """What a template sees of it: TGI's form."""
        return f"![]({self.image_url.url})"


Chunk: TypeAlias = TextChunk | ImageChunk


class CalledFunction(Struct, frozen=True):
    """What a tool call of an earlier reply called. `parameters` is another name for `arguments`."""

    name: str
    description: str | None = None
    arguments: Any = UNSET
    parameters: Any = UNSET

    def __post_init__(self) -> None:
        """Raises `ValueError` without arguments; the decoder turns it into its own error."""
        if self.arguments is UNSET and self.parameters is UNSET:
            raise ValueError("Object missing required field `arguments`")

    @property
    def given_arguments(self) -> Any:
        """JSON, or a text of JSON."""
        return self.parameters if self.arguments is UNSET else self.arguments


class ToolCall(Struct, frozen=True):
    """A tool call of an earlier reply."""

    id: str
    type: str
    function: CalledFunction


class _TemplateFunction(Struct, frozen=True):
    description: str | None
    name: str
    arguments: str


class _TemplateToolCall(Struct, frozen=True):
    """A tool call as TGI writes it into a prompt: keys in its order, the arguments as a text of JSON."""

    id: str
    type: str
    function: _TemplateFunction


class Message(Struct, frozen=True):
    """One message: its content, or else its tool calls."""

    role: str
    content: str | list[Chunk] | None = None
    tool_calls: list[ToolCall] | None = None
    #: Which call the message answers.
    tool_call_id: str | None = None
    name: str | None = None

    def __post_init__(self) -> None:
        """Raises `ValueError` where there is neither; the decoder turns it into its own error."""
        if self.content is None and self.tool_calls is None:
            raise ValueError("Expected `content` or `tool_calls`")

    @property
    def text(self) -> str:
        """One flat text, as TGI gives it to templates."""
        if isinstance(self.content, str):
            return self.content
        if self.content is not None:
            return "".join(chunk.as_text for chunk in self.content)
        return msgspec.json.encode([_template_call(call) for call in self.tool_calls or ()]).decode()

    def as_openai(self) -> dict[str, Any]:
        """As templates that know tool calls see it: as it was sent, with the arguments of calls as JSON."""
        content = "" if self.content is None else self.text
        message: dict[str, Any] = {"role": self.role, "content": content}
        if self.tool_calls:
            message["tool_calls"] = [
                {
                    "id": call.id,
                    "type": call.type,
                    "function": {"name": call.function.name, "arguments": _parsed(call.function.given_arguments)},
                }
                for call in self.tool_calls
            ]
        told = {"tool_call_id": self.tool_call_id, "name": self.name}
        return message | {key: value for key, value in told.items() if value is not None}

    @property
    def is_assistants(self) -> bool:
        """Whether the model said it, or is to go on with it."""
        return self.role == ASSISTANT


def _template_call(call: ToolCall) -> _TemplateToolCall:
    function = call.function
    given = function.given_arguments
    # OpenAI's clients send the text already.
    arguments = given if isinstance(given, str) else msgspec.json.encode(given).decode()
    return _TemplateToolCall(call.id, call.type, _TemplateFunction(function.description, function.name, arguments))


def _parsed(arguments: Any) -> Any:
    """What the text of a call's arguments says, where it is an object."""
    if isinstance(arguments, str):
        try:
            value = msgspec.json.decode(arguments)
        except (msgspec.DecodeError, RecursionError):
            return arguments
        return value if isinstance(value, dict) else arguments
    return arguments


def cut_behind(prompt: str, last_message: Message) -> str:
    """The prompt up to the end of what the last message says, for the model to go on from.

    A template may trim what a message says and write marks behind it. Where its text is not found, the prompt stays.
    """
    text = last_message.text.strip()
    start = prompt.rfind(text)
    return prompt if start < 0 or not text else prompt[: start + len(text)]
