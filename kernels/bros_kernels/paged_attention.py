"""Paged attention over blocks filled from either end: what every implementation of it offers.

The region of one layer is two tensors, keys and values, of shape (num_blocks, block_size, num_kv_heads, head_dim).
Where a sequence's tokens lie in it is said by signed block-table entries (`bros_kernels.slots`). Every implementation
walks keys in logical order and masks by logical position, so its result does not depend, to the last bit, on which
directions store a sequence.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol, TypeAlias

from torch import Tensor

from bros_kernels.linear import RMSNorm

#: cos and sin of the new tokens' positions, (T, 1, rotary_dim) each; sin is negative in the first half. rotary_dim is
#: even, and the size of a head or less.
Angles: TypeAlias = tuple[Tensor, Tensor]


@dataclass(frozen=True, eq=False, kw_only=True)
class AttentionLayer:
    """What the attention of one layer is like, on this rank."""

    num_heads: int  # query head h reads key head h // (num_heads // num_kv_heads)
    num_kv_heads: int
    head_dim: int
    scale: float  # of the scores
    window: int | None = None  # a token sees itself and the `window - 1` tokens before it; None: all of them
    softcap: float | None = None  # a score s becomes softcap * tanh(s / softcap); None: it stays
    q_norm: RMSNorm | None = None  # of each head's query; None: it is not normalised
    k_norm: RMSNorm | None = None


class PagedAttention(Protocol):
    """The attention of one step: what all layers share is computed once, when it is built from an `AttnMeta`."""

    def attend(self, layer: AttentionLayer, qkv: Tensor, angles: Angles | None, k: Tensor, v: Tensor) -> Tensor:
        """Softmax attention of the new tokens to what their sequences hold, themselves included.

        Their queries and keys are normalised and rotated first, their keys and values stored.

        Args:
            qkv: (T, (num_heads + 2 * num_kv_heads) * head_dim): query, key and value heads; may be overwritten.
            angles: pairs (i, i + rotary_dim / 2) of a head's first rotary_dim numbers are rotated by these; None: they
                are not.
            k, v: the layer's region.

        Returns:
            (T, num_heads * head_dim), contiguous, in the dtype of qkv.
        """
