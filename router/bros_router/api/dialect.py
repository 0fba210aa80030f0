"""How the routes under /v1 talk: as OpenAI's clients expect, or in TGI's very bytes (`--strict-tgi`)."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, Protocol, TypeVar

import msgspec
from msgspec import UNSET, UnsetType

from bros_router.api.chat_message import ASSISTANT, Message
from bros_router.api.tool_reply import OpenAIToolReply, TgiToolReply, ToolReply
from bros_router.api.tools import ToolsInPlay
from bros_router.api.v1_bodies import (
    AnyChatBody,
    AnyCompletionBody,
    ChatBody,
    CompletionBody,
    TgiChatBody,
    TgiCompletionBody,
)
from bros_router.chat_templates.source import ChatTemplate
from bros_router.request import FinishReason, TokenEvent

T = TypeVar("T")


class Dialect(Protocol):
    """One way to read the bodies and to write the replies."""

    @property
    def chat_body(self) -> type[AnyChatBody]:
        """What `chat_decoder` makes."""
        ...

    @property
    def completion_body(self) -> type[AnyCompletionBody]:
        """What `completion_decoder` makes."""
        ...

    @property
    def chat_decoder(self) -> msgspec.json.Decoder[AnyChatBody]:
        """Of `/v1/chat/completions` and `/chat_tokenize`."""
        ...

    @property
    def completion_decoder(self) -> msgspec.json.Decoder[AnyCompletionBody]:
        """Of `/v1/completions`."""
        ...

    @property
    def lists_adapters(self) -> bool:
        """Whether `/v1/models` has the adapters too."""
        ...

    @property
    def cuts_stop_sequences(self) -> bool:
        """As in `ValidRequest`."""
        ...

    def reply_id(self, kind: str, request_id: str) -> str:
        """The `id` of a reply; `kind` is OpenAI's prefix."""
        ...

    def finish_reason(self, reason: FinishReason) -> str:
        """Why a whole reply, or a streamed chat, ended."""
        ...

    def chunk_finish_reason(self, event: TokenEvent) -> str | None:
        """The same for one event of streamed completions."""
        ...

    def chunk_text(self, event: TokenEvent) -> str:
        """What one event of streamed completions shows."""
        ...

    def delta_role(self, *, is_first: bool) -> str | UnsetType:
        """Who speaks, in one event of a streamed chat."""
        ...

    @property
    def tells_of_declined_tools(self) -> bool:
        """Whether a whole reply's usage and end are those of the attempt to call a tool that came before it."""
        ...

    def template_message(self, message: Message, template: ChatTemplate) -> dict[str, Any]:
        """What a template sees of a message."""
        ...

    def template_tools(self, tools: ToolsInPlay) -> list[dict[str, Any]]:
        """What a template sees of the tools."""
        ...

    def tool_reply(self, messages: Sequence[Message]) -> ToolReply:
        """How a reply to `messages` tells the tools that it calls."""
        ...

    def in_order(self, finished: Iterable[tuple[int, T]]) -> list[tuple[int, T]]:
        """Replies to several prompts with their indices, which come as they finished, in the order of the choices."""
        ...


class OpenAIDialect:
    """What OpenAI's clients expect. Where they do not care, TGI's bytes."""

    chat_body: type[AnyChatBody] = ChatBody
    completion_body: type[AnyCompletionBody] = CompletionBody
    chat_decoder: msgspec.json.Decoder[AnyChatBody] = msgspec.json.Decoder(ChatBody)
    completion_decoder: msgspec.json.Decoder[AnyCompletionBody] = msgspec.json.Decoder(CompletionBody)
    lists_adapters = True
    cuts_stop_sequences = True
    tells_of_declined_tools = False

    def reply_id(self, kind: str, request_id: str) -> str:
        """One that the log knows too."""
        return f"{kind}-{request_id}"

    def finish_reason(self, reason: FinishReason) -> str:
        """There are two: who stopped the reply, model or client, is all one."""
        return "length" if reason is FinishReason.LENGTH else "stop"

    def chunk_finish_reason(self, event: TokenEvent) -> str | None:
        """Null before the end."""
        return None if event.finish is None else self.finish_reason(event.finish.reason)

    def chunk_text(self, event: TokenEvent) -> str:
        """The texts of the events join to the text of the whole reply."""
        return event.shown

    def delta_role(self, *, is_first: bool) -> str | UnsetType:
        """Once: clients join what comes more often."""
        return ASSISTANT if is_first else UNSET

    def template_message(self, message: Message, template: ChatTemplate) -> dict[str, Any]:
        """With its tool calls, where the template knows what they are."""
        if template.knows_tool_calls:
            return message.as_openai()
        return {"role": message.role, "content": message.text}

    def template_tools(self, tools: ToolsInPlay) -> list[dict[str, Any]]:
        """As models were trained on them."""
        return tools.as_openai()

    def tool_reply(self, messages: Sequence[Message]) -> ToolReply:
        """With unique ids, and an end."""
        return OpenAIToolReply()

    def in_order(self, finished: Iterable[tuple[int, T]]) -> list[tuple[int, T]]:
        """As the prompts were given."""
        return sorted(finished, key=lambda reply: reply[0])


class TgiDialect:
    """TGI's bytes, odd ones included."""

    chat_body: type[AnyChatBody] = TgiChatBody
    completion_body: type[AnyCompletionBody] = TgiCompletionBody
    chat_decoder: msgspec.json.Decoder[AnyChatBody] = msgspec.json.Decoder(TgiChatBody)
    completion_decoder: msgspec.json.Decoder[AnyCompletionBody] = msgspec.json.Decoder(TgiCompletionBody)
    lists_adapters = False
    cuts_stop_sequences = False
    tells_of_declined_tools = True

    def reply_id(self, kind: str, request_id: str) -> str:
        """Always empty."""
        return ""

    def finish_reason(self, reason: FinishReason) -> str:
        """A stop sequence keeps TGI's own word."""
        return "stop" if reason is FinishReason.EOS_TOKEN else reason.value

    def chunk_finish_reason(self, event: TokenEvent) -> str | None:
        """TGI's own words, and an empty one before the end."""
        return "" if event.finish is None else event.finish.reason.value

    def chunk_text(self, event: TokenEvent) -> str:
        """Special tokens are text here, though not in whole replies."""
        return event.token.text

    def delta_role(self, *, is_first: bool) -> str | UnsetType:
        """In every event."""
        return ASSISTANT

    def template_message(self, message: Message, template: ChatTemplate) -> dict[str, Any]:
        """Messages are flat texts."""
        return {"role": message.role, "content": message.text}

    def template_tools(self, tools: ToolsInPlay) -> list[dict[str, Any]]:
        """With schemas as texts."""
        return tools.as_tgi()

    def tool_reply(self, messages: Sequence[Message]) -> ToolReply:
        """One call."""
        return TgiToolReply(messages)

    def in_order(self, finished: Iterable[tuple[int, T]]) -> list[tuple[int, T]]:
        """As they finished."""
        return [*finished]
