"""The replies of the routes under /v1: names, order and nulls are the wire contract, TGI's reading of OpenAI's."""

from __future__ import annotations

import time
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, Final, Literal

import msgspec
from msgspec import UNSET, Struct, UnsetType

from bros_router.about import server_version
from bros_router.api.errors import ApiError
from bros_router.api.types import SimpleToken
from bros_router.request import Token

#: What every stream ends with.
LAST_EVENT: Final = b"[DONE]"
#: TGI tells this for every error of a stream, whatever it would be without one.
_STREAM_ERROR_STATUS: Final = 422
#: TGI's: the version, and how it was built.
_SYSTEM_FINGERPRINT: Final = f"{server_version()}-native"


class Usage(Struct, frozen=True):
    """Tokens that a request took."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int


class TopLogprob(Struct, frozen=True):
    """A token that might have been generated."""

    token: str
    logprob: float | None


class TokenLogprob(Struct, frozen=True):
    """One generated token. `token` is its own text, whatever of it the reply shows."""

    token: str
    logprob: float | None
    top_logprobs: list[TopLogprob]


class Logprobs(Struct, frozen=True):
    """The tokens of a reply, or the one of a chunk."""

    content: list[TokenLogprob]


class CalledFunction(Struct, frozen=True):
    """A function that the model calls. `arguments` is a text of JSON."""

    description: None
    name: str
    arguments: str


class ToolCall(Struct, frozen=True):
    """One call."""

    id: str
    type: Literal["function"]
    function: CalledFunction


class AssistantMessage(Struct, frozen=True):
    """What the model says, or calls."""

    role: str
    content: str | UnsetType | None
    tool_calls: list[ToolCall] | UnsetType = UNSET


class ChatChoice(Struct, frozen=True):
    """One reply to a chat."""

    index: int
    message: AssistantMessage
    logprobs: Logprobs | None
    finish_reason: str


class ChatCompletion(Struct, frozen=True, tag_field="object", tag="chat.completion"):
    """Reply of `/v1/chat/completions`."""

    id: str
    created: int
    model: str
    system_fingerprint: str
    choices: list[ChatChoice]
    usage: Usage


class FunctionDelta(Struct, frozen=True):
    """What a call grows by."""

    name: str | UnsetType | None
    arguments: str


class ToolCallDelta(Struct, frozen=True):
    """What one of the calls grows by."""

    index: int
    id: str | UnsetType
    type: Literal["function"] | UnsetType
    function: FunctionDelta


class Delta(Struct, frozen=True, kw_only=True):
    """What a message grows by: a text, or calls of tools."""

    role: str | UnsetType = UNSET
    content: str | UnsetType = UNSET
    tool_calls: list[ToolCallDelta] | UnsetType = UNSET


class ChatChunkChoice(Struct, frozen=True):
    """One token of a reply to a chat."""

    index: int
    delta: Delta
    logprobs: Logprobs | None
    finish_reason: str | None


class ChatChunk(Struct, frozen=True, tag_field="object", tag="chat.completion.chunk"):
    """One event of a streamed chat. That which tells the usage has no choices."""

    id: str
    created: int
    model: str
    system_fingerprint: str
    choices: list[ChatChunkChoice]
    usage: Usage | None = None


class ChatTokenizeReply(Struct, frozen=True):
    """Reply of `/chat_tokenize`: the tokens of the prompt that a template made, and the prompt."""

    tokenize_response: list[SimpleToken]
    templated_text: str


class CompletionLogprobs(Struct, frozen=True):
    """The tokens of a completion, or of a chunk of it: four lists of one length."""

    tokens: list[str]
    token_logprobs: list[float | None]
    #: The token itself and the likeliest ones, by their texts; null for the first token of a prompt.
    top_logprobs: list[dict[str, float | None] | None]
    #: Where each token begins in the text of the choice, in characters.
    text_offset: list[int]


class CompletionChoice(Struct, frozen=True):
    """One reply to a prompt, or one token of it. Those of the first prompt come before those of the second."""

    index: int
    text: str
    logprobs: CompletionLogprobs | None
    finish_reason: str | None


class Completion(Struct, frozen=True, tag_field="object", tag="text_completion"):
    """Reply of `/v1/completions`; also the last event of each prompt's reply."""

    id: str
    created: int
    model: str
    system_fingerprint: str
    choices: list[CompletionChoice]
    usage: Usage


class CompletionChunk(Struct, frozen=True, tag_field="object", tag="text_completion"):
    """Any other event of streamed completions."""

    id: str
    created: int
    choices: list[CompletionChoice]
    model: str
    system_fingerprint: str


class StreamFailure(Struct, frozen=True):
    """What went wrong."""

    message: str
    http_status_code: int
    #: Ours: why, where TGI has no such error.
    code: str | UnsetType = UNSET


class StreamFailureEvent(Struct, frozen=True):
    """The event of a stream that tells an error."""

    error: StreamFailure


@dataclass(frozen=True, slots=True)
class ReplyHead:
    """What is the same in every event of a reply."""

    id: str
    model: str
    #: Unix time, in seconds.
    created: int = field(default_factory=lambda: int(time.time()))
    system_fingerprint: str = _SYSTEM_FINGERPRINT

    def fields(self) -> dict[str, Any]:
        """As the arguments of a reply, or of an event of one."""
        return {
            "id": self.id,
            "created": self.created,
            "model": self.model,
            "system_fingerprint": self.system_fingerprint,
        }


def usage(num_prompt_tokens: int, num_generated_tokens: int) -> Usage:
    """What a request took."""
    return Usage(num_prompt_tokens, num_generated_tokens, num_prompt_tokens + num_generated_tokens)


def logprobs(tokens: Iterable[Token]) -> Logprobs:
    """The tokens' own texts and log-probabilities."""
    return Logprobs(
        [
            TokenLogprob(token.text, token.logprob, [TopLogprob(top.text, top.logprob) for top in token.top_tokens])
            for token in tokens
        ]
    )


def error_event(error: ApiError) -> bytes:
    """How a stream tells an error."""
    return msgspec.json.encode(StreamFailureEvent(StreamFailure(str(error), _STREAM_ERROR_STATUS, error.code)))
