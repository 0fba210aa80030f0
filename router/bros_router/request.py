"""A request after validation, and the events that answer it: the vocabulary between the API and the engine."""

from __future__ import annotations

from collections.abc import AsyncIterator
from dataclasses import dataclass
from enum import Enum
from types import TracebackType
from typing import Protocol

from bros_shard.protocol import SamplingParams


class RequestClass(str, Enum):
    """Real-time requests carry latency targets; best-effort requests want throughput."""

    RT = "rt"
    BE = "be"


class FinishReason(str, Enum):
    """Why a generation ended well: TGI's values, in TGI's order of precedence."""

    LENGTH = "length"
    EOS_TOKEN = "eos_token"
    STOP_SEQUENCE = "stop_sequence"


@dataclass(frozen=True, slots=True)
class ValidRequest:
    """A request that passed every rule of the contract. Only this type can be queued."""

    request_id: str
    #: Prompt tokens as the model will see them (special tokens added, truncated). Never empty.
    prompt_token_ids: tuple[int, ...]
    sampling: SamplingParams
    #: At least 1; `len(prompt_token_ids) + max_new_tokens` is within the server's limit.
    max_new_tokens: int
    stop_sequences: tuple[str, ...] = ()
    #: An extension to TGI: go on past the end-of-sequence token (benchmarks with forced lengths).
    ignore_eos: bool = False
    request_class: RequestClass = RequestClass.RT


@dataclass(frozen=True, slots=True)
class Token:
    """One generated token as clients see it."""

    token_id: int
    #: The text this token completed; empty while its bytes are an incomplete UTF-8 sequence.
    text: str
    #: `None` where the model gave no finite value.
    logprob: float | None
    is_special: bool


@dataclass(frozen=True, slots=True)
class Finish:
    """How a generation ended well."""

    reason: FinishReason
    #: The joined text of the tokens that are not special.
    generated_text: str
    num_generated_tokens: int
    #: `time.monotonic()` at which the first step of the sequence was sent, and of the last token.
    first_scheduled_s: float
    finished_s: float


@dataclass(frozen=True, slots=True)
class TokenEvent:
    """One step of a reply. The last event of a reply, and no other, carries `finish`."""

    token: Token
    finish: Finish | None = None


class GenerationError(Exception):
    """The engine could not finish an accepted request. The message is public: it names no internals."""


class ServiceUnavailableError(Exception):
    """The engine takes no new requests now (starting, restarting, draining)."""


class Generation(Protocol):
    """One accepted request's reply. Leaving the `with` block ends the sequence if it has not ended yet.

        with engine.submit(request) as generation:
            async for event in generation: ...

    Iteration ends after the event that carries `finish`; it raises `GenerationError` where there will be none.
    """

    def __enter__(self) -> Generation: ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...

    def __aiter__(self) -> AsyncIterator[TokenEvent]: ...


class Engine(Protocol):
    """What the API knows of the engine."""

    def submit(self, request: ValidRequest) -> Generation:
        """Queue a request.

        Raises:
            ServiceUnavailableError: nothing is accepted now.
        """
        ...

    @property
    def is_healthy(self) -> bool:
        """Whether a request submitted now would be served: judged by the progress of steps, not by a probe."""
        ...
