"""The bodies of TGI's own routes, in and out: names, order and defaults are the wire contract."""

from __future__ import annotations

from typing import Annotated, Final, TypeAlias

from msgspec import UNSET, Meta, Struct, UnsetType, field

from bros_router.api.grammar import Grammar
from bros_router.request import RequestClass

U32: TypeAlias = Annotated[int, Meta(ge=0, le=2**32 - 1)]
I32: TypeAlias = Annotated[int, Meta(ge=-(2**31), le=2**31 - 1)]
#: TGI's usize, a bit shorter: the library has no bounds beyond 63 bits.
Usize: TypeAlias = Annotated[int, Meta(ge=0, le=2**63 - 1)]

_MAX_SEED: Final = 2**64 - 1


def check_seed(seed: int | None) -> None:
    """What no bound can say. Raises `ValueError`, which a decoder turns into its own error."""
    if seed is not None and seed > _MAX_SEED:
        raise ValueError(f"Expected `seed` <= {_MAX_SEED}")


class GenerateParameters(Struct, frozen=True, kw_only=True):
    """How to generate. A present object means greedy unless it says otherwise."""

    best_of: Usize | None = None
    temperature: float | None = None
    repetition_penalty: float | None = None
    frequency_penalty: float | None = None
    top_k: I32 | None = None
    top_p: float | None = None
    typical_p: float | None = None
    do_sample: bool = False
    max_new_tokens: U32 | None = None
    return_full_text: bool | None = None
    stop: list[str] = field(default_factory=list)
    truncate: Usize | None = None
    watermark: bool = False
    details: bool = False
    decoder_input_details: bool = False
    seed: Annotated[int, Meta(ge=0)] | None = None
    top_n_tokens: U32 | None = None
    grammar: Grammar | None = None
    adapter_id: str | None = None
    #: Ours: which class the request belongs to.
    priority: RequestClass | None = None
    #: Ours: go on past the end-of-sequence token.
    ignore_eos: bool = False

    def __post_init__(self) -> None:
        """Raises `ValueError` for a seed that is too large."""
        check_seed(self.seed)


class GenerateRequest(Struct, frozen=True, kw_only=True):
    """Body of `/generate`, `/generate_stream` and `/tokenize`."""

    inputs: str
    #: Absent parameters mean sampling; an empty object means greedy.
    parameters: GenerateParameters = field(default_factory=lambda: GenerateParameters(do_sample=True))


class CompatGenerateRequest(GenerateRequest, frozen=True, kw_only=True):
    """Body of `POST /`."""

    stream: bool = False


class TokenReply(Struct, frozen=True):
    """One generated token."""

    id: int
    text: str
    logprob: float | None
    special: bool


class PrefillToken(Struct, frozen=True):
    """One token of the prompt."""

    id: int
    text: str
    logprob: float | None  # null for the first


class BestOfSequence(Struct, frozen=True, kw_only=True):
    """A sequence that was generated and not chosen."""

    generated_text: str
    finish_reason: str
    generated_tokens: int
    seed: int | None
    prefill: list[PrefillToken]
    tokens: list[TokenReply]
    top_tokens: list[list[TokenReply]] | UnsetType = UNSET


class Details(Struct, frozen=True, kw_only=True):
    """What a reply tells of its generation, where asked to."""

    finish_reason: str
    generated_tokens: int
    seed: int | None  # null when greedy
    prefill: list[PrefillToken]  # empty unless asked for, of a server that was started for it
    tokens: list[TokenReply]
    best_of_sequences: list[BestOfSequence] | UnsetType = UNSET
    top_tokens: list[list[TokenReply]] | UnsetType = UNSET  # of each token


class GenerateReply(Struct, frozen=True):
    """Reply of `/generate`."""

    generated_text: str
    details: Details | UnsetType = UNSET


class StreamDetails(Struct, frozen=True):
    """What the last event of a stream tells of its generation, where asked to."""

    finish_reason: str
    generated_tokens: int
    seed: int | None
    input_length: int


class StreamEvent(Struct, frozen=True):
    """One event of `/generate_stream`. The last one carries the whole text."""

    index: int
    token: TokenReply
    top_tokens: list[TokenReply] | UnsetType = UNSET  # where asked for
    generated_text: str | None = None
    details: StreamDetails | None = None


class SimpleToken(Struct, frozen=True):
    """One token of `/tokenize`. `start` and `stop` are offsets into the UTF-8 bytes of the input."""

    id: int
    text: str
    start: int
    stop: int


class Info(Struct, frozen=True, kw_only=True):
    """Reply of `/info`."""

    model_id: str
    model_sha: str | None
    model_pipeline_tag: str | None
    max_concurrent_requests: int
    max_best_of: int
    max_stop_sequences: int
    max_input_tokens: int
    max_total_tokens: int
    validation_workers: int
    max_client_batch_size: int
    router: str = "text-generation-router"
    version: str
    sha: str | None
    docker_label: str | None


class ModelInfo(Struct, frozen=True, kw_only=True):
    """One entry of `/v1/models`."""

    id: str
    object: str = "model"
    created: int = 0
    owned_by: str


class ModelList(Struct, frozen=True, kw_only=True):
    """Reply of `/v1/models`."""

    object: str = "list"
    data: list[ModelInfo]


class StartupReply(Struct, frozen=True):
    """Reply of `/health/startup`: the phase, and the share of it that is done."""

    phase: str
    progress: float


class ErrorReply(Struct, frozen=True):
    """Every JSON error."""

    error: str
    error_type: str
    #: Ours: why, where TGI has no such error.
    code: str | UnsetType = UNSET
