"""Paged attention over blocks filled from either end: what every implementation of it offers.

The region of one layer is two tensors, keys and values, of shape (num_blocks, block_size, num_kv_heads, head_dim).
Where a sequence's tokens lie in it is said by signed block-table entries (`bros_kernels.slots`). Every implementation
walks keys in logical order and masks by logical position, so its result does not depend, to the last bit, on which
directions store a sequence.
"""

from __future__ import annotations

from typing import Protocol

from torch import Tensor


class PagedAttention(Protocol):
    """One step's attention: what all layers share is computed once, when it is built from an `AttnMeta`."""

    def write_kv(self, k: Tensor, v: Tensor, k_new: Tensor, v_new: Tensor) -> None:
        """Store the new tokens' keys and values, (T, num_kv_heads, head_dim) each, in a layer's region."""

    def attend(self, q: Tensor, k: Tensor, v: Tensor, scale: float, window: int | None = None) -> Tensor:
        """Softmax attention of the new tokens, whose keys and values are already written.

        Args:
            q: (T, num_heads, head_dim); query head h reads kv head h // (num_heads // num_kv_heads).
            k, v: one layer's region.
            window: a token sees itself and the `window - 1` tokens before it; None: all of them.

        Returns:
            (T, num_heads, head_dim), contiguous, in the dtype of q.
        """
