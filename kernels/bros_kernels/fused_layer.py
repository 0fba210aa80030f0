"""A decoder layer in one call, for kernels that have one: a model of 30 layers otherwise calls 150 times a step."""

from __future__ import annotations

from typing import Protocol

from torch import Tensor

from bros_kernels.paged_attention import Angles, PagedAttention


class FusedLayer(Protocol):
    """h = hidden + output(attend(qkv(hidden))), then h + down(gated(h)), to the last bit what its parts give."""

    def __call__(
        self, hidden: Tensor, angles: Angles | None, k: Tensor, v: Tensor, attention: PagedAttention
    ) -> Tensor:
        """Compute it.

        Args:
            hidden: (T, size), contiguous; may be overwritten.
            angles, k, v: see `PagedAttention.attend`.
            attention: of the step, by the same kernels.

        Returns:
            (T, size), contiguous.
        """
