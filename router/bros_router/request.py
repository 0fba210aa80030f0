"""A request after validation, and the events that answer it: the vocabulary between the API and the engine."""

from __future__ import annotations

from collections.abc import AsyncIterator
from dataclasses import dataclass
from enum import Enum
from types import TracebackType
from typing import Protocol

from bros_shard.protocol import RankedToken, SamplingParams


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
class LatencyTargets:
    """How soon a real-time request wants its tokens."""

    #: From arrival to the first token.
    ttft_s: float
    #: Mean time between two tokens after the first.
    tpot_s: float
    #: Whether the client or the operator set them. Targets that nobody set only order the work: nothing is refused,
    #: or put last, because it would miss them.
    are_given: bool


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
    #: Whether the reply is cut where a stop sequence begins, as OpenAI does; TGI ends it behind one that ends a token.
    #: Sequences that cut are not empty.
    cuts_stop_sequences: bool = False
    #: An extension to TGI: go on past the end-of-sequence token (benchmarks with forced lengths).
    ignore_eos: bool = False
    #: Tell the log-probabilities of the prompt's tokens, with so many of the likeliest ones; `None`: do not.
    num_prompt_top_tokens: int | None = None
    #: What the generated text must match, as ranks take it (`bros_shard.grammar_compiler`); `None`: anything.
    grammar: str | None = None
    #: Which of the model's adapters its tokens go through, counted from 0; `None`: none.
    adapter: int | None = None
    request_class: RequestClass = RequestClass.RT
    #: Targets of a real-time request, as the client or else the operator set them; `None`: nobody did.
    ttft_s: float | None = None
    tpot_s: float | None = None
    #: Seconds from arrival after which nobody wants the reply any more; `None`: any time is fine.
    deadline_s: float | None = None


class Admission(str, Enum):
    """What admission made of a request that it accepted."""

    AS_ASKED = "as_asked"
    #: Its target cannot be met: it is served after those that can meet theirs.
    DEGRADED = "degraded"
    #: Its target could not be met, and is now the earliest that can.
    RELAXED = "relaxed"


@dataclass(frozen=True, slots=True)
class Terms:
    """How an accepted request will be served."""

    request_class: RequestClass
    #: `None` where nobody waits for the reply: best-effort.
    targets: LatencyTargets | None = None
    admission: Admission = Admission.AS_ASKED

    @property
    def is_degraded(self) -> bool:
        """Whether the request is late from the beginning."""
        return self.admission is Admission.DEGRADED


@dataclass(frozen=True, slots=True)
class Token:
    """One generated token as clients see it."""

    token_id: int
    #: The text this token completed; empty while its bytes are an incomplete UTF-8 sequence.
    text: str
    #: `None` where the model gave no finite value.
    logprob: float | None
    is_special: bool
    #: The likeliest tokens in its place, where asked for. Each has its text on its own.
    top_tokens: tuple[Token, ...] = ()


@dataclass(frozen=True, slots=True)
class PromptDetails:
    """How likely the model finds the tokens of a prompt."""

    #: Of each token; `None` for the first, which follows nothing, and where the model gave no finite value.
    logprobs: list[float | None]
    #: For each token, the likeliest ones in its place; empty lists where none are asked for.
    top_tokens: list[list[RankedToken]]


@dataclass(frozen=True, slots=True)
class Finish:
    """How a generation ended well."""

    reason: FinishReason
    #: The joined `shown` of the events.
    generated_text: str
    num_generated_tokens: int
    #: `time.monotonic()` at which the first step of the sequence was sent, and of the last token.
    first_scheduled_s: float
    finished_s: float


@dataclass(frozen=True, slots=True)
class TokenEvent:
    """One step of a reply. The last event of a reply, and no other, carries `finish`."""

    token: Token
    #: What the reply that clients read grows by: no special tokens, and of stop sequences what their rule leaves.
    shown: str
    finish: Finish | None = None
    #: With the first event of a reply, where it was asked for.
    prompt: PromptDetails | None = None


class GenerationError(Exception):
    """The engine could not finish an accepted request. The message is public: it names no internals."""


class DeadlineError(GenerationError):
    """The deadline that the client gave has passed; nobody wants the reply any more."""

    def __init__(self, *, has_run: bool) -> None:
        """`has_run`: whether any step computed a token of the request."""
        super().__init__("the deadline has passed")
        self.has_run = has_run


class ServiceUnavailableError(Exception):
    """The engine takes no new requests now (starting, restarting, draining)."""


class OverloadedError(Exception):
    """There is no room for another request of this class: every permit is taken, or the queue is full."""


class RefusedError(Exception):
    """The target that the client or the operator set cannot be met."""

    def __init__(self, retry_after_s: float) -> None:
        """`retry_after_s`: predicted seconds until it could be."""
        super().__init__(f"the target cannot be met for {retry_after_s:.3f} s")
        self.retry_after_s = retry_after_s


class Generation(Protocol):
    """One accepted request's reply. Leaving the `with` block ends the sequence if it has not ended yet.

        with engine.submit(request) as generation:
            async for event in generation: ...

    Iteration ends after the event that carries `finish`; it raises `GenerationError` where there will be none.
    """

    @property
    def terms(self) -> Terms:
        """What the request was accepted on."""
        ...

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
            OverloadedError: the queue of its class is full.
            RefusedError: its target cannot be met, and the operator wants such requests refused.
        """
        ...

    def drain_s(self, request_class: RequestClass) -> float:
        """Predicted seconds until what waits in a class now has begun: when to try again after an overload."""
        ...

    @property
    def is_healthy(self) -> bool:
        """Whether a request submitted now would be served: judged by the progress of steps, not by a probe."""
        ...
