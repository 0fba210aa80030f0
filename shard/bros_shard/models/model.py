"""What every model offers the rest of the rank."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Protocol, TypeAlias

from torch import Tensor

from bros_kernels.paged_attention import PagedAttention
from bros_shard.models.rotary import RopeOverride

#: Keys and values of one layer's region, (num_blocks, block_size, num_kv_heads, head_dim) each.
LayerKV: TypeAlias = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class KVShape:
    """What a rank stores for one token: 2 * num_layers * num_kv_heads * head_dim numbers."""

    num_layers: int
    num_kv_heads: int  # on this rank
    head_dim: int


@dataclass(frozen=True)
class ModelLimits:
    """What the operator decides about a model before it is loaded."""

    max_length: int = 0  # most tokens of a sequence; 0: what the model was made for
    rope_override: RopeOverride | None = None

    def extended(self, length: int) -> int:
        """The length a model made for `length` tokens reaches with the operator's scaling."""
        return length if self.rope_override is None else int(length * self.rope_override.factor)


class CausalLM(Protocol):
    """A decoder whose keys and values live in the paged region."""

    vocab_size: int
    max_length: int
    kv_shape: KVShape

    def forward(self, input_ids: Tensor, positions: Tensor, kv: Iterable[LayerKV], attention: PagedAttention) -> Tensor:
        """Run the T tokens of a step.

        Args:
            input_ids, positions: int64 (T).
            kv: the region of each layer, which gains the tokens' keys and values; taken when its layer's turn comes.

        Returns:
            (T, size): what `logits` takes rows of.
        """

    def logits(self, hidden: Tensor) -> Tensor | None:
        """Next-token logits (rows, vocab_size) of rows of `forward`'s result on rank 0; None on the others."""
