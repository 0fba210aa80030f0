"""The bodies of the routes under /v1: as OpenAI's clients write them, and, named `Tgi…`, as TGI takes them.

TGI refuses, ignores or reinterprets some of what those clients send. What it ignores is no field of its bodies.
Handlers ask both kinds the same questions: which prompt, which class of request, which parameters in the words of TGI's
own routes.
"""

from __future__ import annotations

from dataclasses import replace
from enum import Enum
from typing import Annotated, Any, Final, TypeAlias

from msgspec import Meta, Struct

from bros_router.api.chat_message import Message
from bros_router.api.errors import ToolApiError, ValidationError
from bros_router.api.grammar import Grammar, ResponseFormat
from bros_router.api.guidance import grammar_of_format
from bros_router.api.tools import Tool, ToolChoice, ToolsInPlay, tools_in_play
from bros_router.api.types import U32, GenerateParameters, check_seed
from bros_router.api.validation import OpenAIParameters
from bros_router.grammars.protocol import GrammarSource
from bros_router.request import RequestClass

#: TGI's words.
_EXCLUSIVE: Final = "Grammar and tools are mutually exclusive"

#: TGI's word for the model that is served, whichever it is.
_PLACEHOLDER_MODEL: Final = "tgi"

_Tokens: TypeAlias = list[U32]


class StreamOptions(Struct, frozen=True):
    """What a stream tells besides the reply."""

    include_usage: bool = False


class ServiceTier(str, Enum):
    """OpenAI's classes of service, which are ours by other names."""

    AUTO = "auto"
    DEFAULT = "default"
    PRIORITY = "priority"
    FLEX = "flex"
    BATCH = "batch"

    @property
    def request_class(self) -> RequestClass | None:
        """`None`: as the operator says."""
        if self is ServiceTier.AUTO:
            return None
        return RequestClass.BE if self in (ServiceTier.FLEX, ServiceTier.BATCH) else RequestClass.RT


# --- what both routes share


class _Body(Struct, frozen=True, kw_only=True):
    model: str | None = None
    frequency_penalty: float | None = None
    max_tokens: U32 | None = None
    seed: Annotated[int, Meta(ge=0)] | None = None
    stream: bool = False
    temperature: float | None = None
    top_p: float | None = None

    def __post_init__(self) -> None:
        """Raises `ValueError` for a seed that is too large."""
        check_seed(self.seed)

    @property
    def named_model(self) -> str | None:
        """The model, or the adapter of it, that is asked for by name."""
        return None if self.model == _PLACEHOLDER_MODEL else self.model

    @property
    def openai(self) -> OpenAIParameters:
        """What TGI does not know."""
        return OpenAIParameters()

    @property
    def _is_greedy(self) -> bool:
        """Sampling is on unless the temperature is exactly zero."""
        return self.temperature == 0.0

    def _parameters(self, **others: Any) -> GenerateParameters:
        """What is the same for every body; `others` are fields of `GenerateParameters`."""
        return GenerateParameters(
            temperature=None if self._is_greedy else self.temperature,
            do_sample=not self._is_greedy,
            frequency_penalty=self.frequency_penalty,
            seed=self.seed,
            adapter_id=self.named_model,
            **others,
        )


class _OpenAIBody(_Body, frozen=True, kw_only=True):
    """With what TGI's bodies do not have, or have in another shape."""

    stop: str | list[str] | None = None
    stream_options: StreamOptions | None = None
    n: U32 | None = None
    logit_bias: dict[U32, float] | list[float] | None = None
    presence_penalty: float | None = None
    service_tier: ServiceTier | None = None

    @property
    def openai(self) -> OpenAIParameters:
        """What TGI does not know."""
        return OpenAIParameters(
            num_choices=1 if self.n is None else self.n,
            presence_penalty=self.presence_penalty or 0.0,
            logit_bias=self.logit_bias if isinstance(self.logit_bias, dict) else {},
        )

    @property
    def includes_usage(self) -> bool:
        """Whether a stream ends with what the whole request used."""
        return self.stream_options is not None and self.stream_options.include_usage

    @property
    def request_class(self) -> RequestClass | None:
        """The class that the body names, if it does."""
        return None if self.service_tier is None else self.service_tier.request_class

    @property
    def _stop_sequences(self) -> list[str]:
        return [self.stop] if isinstance(self.stop, str) else self.stop or []

    @property
    def _limiting_top_p(self) -> float | None:
        """All of the probability mass is no limit, and a greedy reply has none: TGI refuses that, and samples this."""
        top_p = self.top_p
        is_idle = top_p is not None and self._is_greedy and 0.0 < top_p < 1.0
        return None if top_p == 1.0 or is_idle else top_p

    def check_supported(self) -> None:
        """Refuse what this server cannot do. Raises `ValidationError`."""
        if "" in self._stop_sequences:
            raise ValidationError("`stop` must not hold an empty sequence")
        if isinstance(self.logit_bias, list) and self.logit_bias:  # TGI's shape of it, which TGI ignores
            raise ValidationError("`logit_bias` as a list is not supported by this server")


# --- chat


class ChatBody(_OpenAIBody, frozen=True, kw_only=True):
    """Body of `/v1/chat/completions` and `/chat_tokenize`."""

    messages: list[Message]
    logprobs: bool | None = None
    top_logprobs: U32 | None = None
    tools: list[Tool] | None = None
    tool_choice: ToolChoice = None
    tool_prompt: str | None = None
    #: Whether a reply may call several tools; TGI's never do.
    parallel_tool_calls: bool | None = None
    response_format: ResponseFormat | None = None
    #: Wins over `max_tokens`, its old name.
    max_completion_tokens: U32 | None = None
    #: The next three are other servers': variables for the template, and how the prompt ends.
    chat_template_kwargs: dict[str, Any] | None = None
    add_generation_prompt: bool = True
    #: `None`: if the assistant said the last message.
    continue_final_message: bool | None = None

    @property
    def template_variables(self) -> dict[str, Any]:
        """What the template is to see beside the messages."""
        return self.chat_template_kwargs or {}

    @property
    def continues_last_message(self) -> bool:
        """Whether the reply goes on with the last message, instead of answering it."""
        if self.continue_final_message is None:
            return _is_last_assistants(self.messages)
        return self.continue_final_message and bool(self.messages)

    def tools_in_play(self) -> ToolsInPlay | None:
        """The tools that the reply may call. Raises `ToolApiError`."""
        tools = tools_in_play(
            self.tools, self.tool_choice, self.tool_prompt, is_parallel=bool(self.parallel_tool_calls)
        )
        if tools is not None and self.grammar is not None:
            raise ToolApiError(_EXCLUSIVE)
        return tools

    @property
    def grammar(self) -> GrammarSource | Grammar | None:
        """What the reply must match."""
        return None if self.response_format is None else grammar_of_format(self.response_format)

    def parameters(self) -> GenerateParameters:
        """How to generate."""
        return self._parameters(
            top_p=self._limiting_top_p,
            max_new_tokens=self.max_tokens if self.max_completion_tokens is None else self.max_completion_tokens,
            stop=self._stop_sequences,
            top_n_tokens=self.top_logprobs,
        )


class TgiChatBody(_Body, frozen=True, kw_only=True):
    """The same as TGI takes it."""

    messages: list[Message]
    logprobs: bool | None = None
    top_logprobs: U32 | None = None
    tools: list[Tool] | None = None
    tool_choice: ToolChoice = None
    tool_prompt: str | None = None
    response_format: Grammar | None = None
    #: Another name for `max_tokens`.
    max_completion_tokens: U32 | None = None
    stop: list[str] | None = None
    stream_options: StreamOptions = StreamOptions()
    #: Has no effect.
    logit_bias: list[float] | None = None
    #: Becomes the repetition penalty, less 2.
    presence_penalty: float | None = None

    def __post_init__(self) -> None:
        """Raises `ValueError` for what a type cannot say."""
        check_seed(self.seed)
        if self.max_tokens is not None and self.max_completion_tokens is not None:
            raise ValueError("Duplicate field `max_tokens`")
        if any(not tool.function.has_schema for tool in self.tools or ()):
            raise ValueError("Object missing required field `arguments`")

    @property
    def includes_usage(self) -> bool:
        """Whether a stream ends with what the whole request used."""
        return self.stream_options.include_usage

    @property
    def request_class(self) -> RequestClass | None:
        """TGI knows no classes."""
        return None

    @property
    def template_variables(self) -> dict[str, Any]:
        """TGI's templates see the messages alone."""
        return {}

    @property
    def add_generation_prompt(self) -> bool:
        """TGI always does."""
        return True

    @property
    def continues_last_message(self) -> bool:
        """Whether the reply goes on with the last message, instead of answering it."""
        return _is_last_assistants(self.messages)

    def check_supported(self) -> None:
        """What TGI can do here, this server can."""

    def tools_in_play(self) -> ToolsInPlay | None:
        """The tools that the reply may call. Raises `ToolApiError`."""
        if self.tools is not None and self.response_format is not None:
            raise ToolApiError(_EXCLUSIVE)
        return tools_in_play(self.tools, self.tool_choice, self.tool_prompt)

    @property
    def grammar(self) -> Grammar | None:
        """What the reply must match."""
        return self.response_format

    def parameters(self) -> GenerateParameters:
        """How to generate."""
        return self._parameters(
            repetition_penalty=None if self.presence_penalty is None else self.presence_penalty + 2.0,
            top_p=self.top_p,
            max_new_tokens=self.max_tokens if self.max_completion_tokens is None else self.max_completion_tokens,
            stop=self.stop or [],
            top_n_tokens=self.top_logprobs,
        )


def _is_last_assistants(messages: list[Message]) -> bool:
    return bool(messages) and messages[-1].is_assistants


# --- completions


class CompletionBody(_OpenAIBody, frozen=True, kw_only=True):
    """Body of `/v1/completions`."""

    #: One text or several, one list of tokens or several.
    prompt: str | Annotated[list[str | U32 | _Tokens], Meta(min_length=1)]
    repetition_penalty: float | None = None
    suffix: str | None = None
    logprobs: U32 | None = None
    echo: bool | None = None
    best_of: U32 | None = None

    def __post_init__(self) -> None:
        """Raises `ValueError` for what a type cannot say."""
        check_seed(self.seed)
        if isinstance(self.prompt, list) and len({type(item) for item in self.prompt}) > 1:
            raise ValueError("Expected `prompt` to hold texts, or tokens, or lists of tokens")

    @property
    def prompts(self) -> list[str | list[int]]:
        """Texts, or tokens, to go on from: at least one."""
        if isinstance(self.prompt, str):
            return [self.prompt]
        tokens = [item for item in self.prompt if isinstance(item, int)]
        return [tokens] if tokens else [item for item in self.prompt if not isinstance(item, int)]

    @property
    def openai(self) -> OpenAIParameters:
        """What TGI does not know."""
        is_prompt_told = self.echo and self.logprobs is not None
        return replace(super().openai, num_prompt_top_tokens=self.logprobs if is_prompt_told else None)

    def check_supported(self) -> None:
        """Refuse what this server cannot do, and what makes no sense. Raises `ValidationError`."""
        super().check_supported()
        if self.best_of is not None and self.best_of < self.openai.num_choices:
            raise ValidationError("`best_of` must be >= `n`")

    def parameters(self) -> GenerateParameters:
        """How to generate."""
        return self._parameters(
            repetition_penalty=self.repetition_penalty,
            top_p=self._limiting_top_p,
            max_new_tokens=self.max_tokens,
            stop=self._stop_sequences,
            top_n_tokens=self.logprobs,
            # Of as many as are wanted, none is chosen: that can be streamed.
            best_of=None if self.best_of == self.openai.num_choices else self.best_of,
        )


class TgiCompletionBody(_Body, frozen=True, kw_only=True):
    """The same as TGI takes it."""

    prompt: str | Annotated[list[str], Meta(min_length=1)]
    repetition_penalty: float | None = None
    suffix: str | None = None
    stop: list[str] | None = None

    @property
    def logprobs(self) -> int | None:
        """TGI tells none here."""
        return None

    @property
    def echo(self) -> bool:
        """TGI never repeats the prompt here."""
        return False

    @property
    def prompts(self) -> list[str | list[int]]:
        """Texts to go on from: at least one."""
        return [self.prompt] if isinstance(self.prompt, str) else [*self.prompt]

    @property
    def includes_usage(self) -> bool:
        """TGI tells it where the reply to each prompt ends."""
        return False

    @property
    def request_class(self) -> RequestClass | None:
        """TGI knows no classes."""
        return None

    def check_supported(self) -> None:
        """What TGI can do here, this server can."""

    def parameters(self) -> GenerateParameters:
        """How to generate."""
        return self._parameters(
            repetition_penalty=self.repetition_penalty,
            top_p=self.top_p,
            max_new_tokens=self.max_tokens,
            stop=self.stop or [],
        )


AnyChatBody: TypeAlias = ChatBody | TgiChatBody
AnyCompletionBody: TypeAlias = CompletionBody | TgiCompletionBody
