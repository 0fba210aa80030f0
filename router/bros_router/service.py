"""What the HTTP side knows of the server as a whole: the phase it is in, and the model once there is one."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

from bros_router.chat_templates.source import ChatTemplate
from bros_router.grammars.vetter import GuidedVocabulary
from bros_router.request import Engine
from bros_router.tokenizer import Tokenizer


class Phase(str, Enum):
    """Where the server stands. Requests are served in `READY` alone."""

    RESOLVING = "resolving"  # finding or downloading the model
    LOADING = "loading"  # ranks read weights
    WARMING = "warming"  # ranks measure themselves
    READY = "ready"
    RESTARTING = "restarting"  # a rank failed: all are replaced, accepted requests wait and go on
    FAILED = "failed"  # they fail again and again: nobody waits any more, restarts go on
    DRAINING = "draining"  # SIGTERM: finish what runs, accept nothing


@dataclass(frozen=True, slots=True)
class ServedModel:
    """The model being served, and the limits that follow from it and from the KV region."""

    model_id: str
    model_sha: str | None
    pipeline_tag: str | None
    tokenizer: Tokenizer
    #: `None`: the model was not made for chats.
    chat_template: ChatTemplate | None
    #: Token ids that the model knows are below this.
    vocab_size: int
    eos_token_ids: frozenset[int]
    #: TGI's `--max-input-tokens` and `--max-total-tokens`, given or computed.
    max_input_tokens: int
    max_total_tokens: int
    #: TGI's `x-compute-type`: `{num_shard}-{device name}`.
    compute_type: str
    #: What grammars are compiled for; `None`: nothing is guided.
    guided: GuidedVocabulary | None = None
    #: Its adapters as clients name them, in the order in which ranks count them.
    adapter_ids: tuple[str, ...] = ()

    def adapter_index(self, adapter_id: str | None) -> int | None:
        """Which adapter is meant; `None`, the model alone, by any name that none of them has: TGI's rule."""
        return self.adapter_ids.index(adapter_id) if adapter_id in self.adapter_ids else None


class Service:
    """The one mutable thing that handlers look at. The lifecycle writes it; handlers read it."""

    def __init__(self) -> None:
        self.phase = Phase.RESOLVING
        #: Share of the phase that is done, 0.0 to 1.0, for `/health/startup`.
        self.progress = 0.0
        self.model: ServedModel | None = None
        self.engine: Engine | None = None

    @property
    def is_ready(self) -> bool:
        """Whether a request sent now would be served."""
        return self.phase is Phase.READY and self.engine is not None and self.engine.is_healthy
