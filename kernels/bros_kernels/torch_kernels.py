"""PyTorch's kernels, on any device and in any dtype: the specification of the others, and where none of them runs."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from bros_kernels.attn_meta import AttnMeta
from bros_kernels.onednn import packed_linear
from bros_kernels.paged_attention import PagedAttention
from bros_kernels.reference_attention import ReferenceAttention


class TorchKernels:
    """Implements `Kernels`."""

    name = "torch"

    def __init__(self, dtype: torch.dtype) -> None:
        self._dtype = dtype

    def attention(self, meta: AttnMeta) -> PagedAttention:
        """See `Kernels.attention`."""
        return ReferenceAttention(meta, self._dtype)

    def linear(self, weight: Tensor, bias: Tensor | None = None) -> Callable[[Tensor], Tensor]:
        """See `Kernels.linear`."""
        if weight.device.type == "cpu" and weight.dtype == torch.bfloat16:
            packed = packed_linear(weight, bias)
            if packed is not None:
                return packed
        return lambda x: F.linear(x, weight, bias)

    def gated_linear(
        self, weight: Tensor, bias: Tensor | None, activation: Callable[[Tensor], Tensor]
    ) -> Callable[[Tensor], Tensor]:
        """See `Kernels.gated_linear`."""
        gate_up = self.linear(weight, bias)

        def gated(x: Tensor) -> Tensor:
            gate, up = gate_up(x).chunk(2, -1)
            return activation(gate).mul_(up)

        return gated

    def rms_norm(self, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        """See `Kernels.rms_norm`."""
        return F.rms_norm(x, weight.shape, weight, eps)

    def rotate(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """See `Kernels.rotate`."""
        return torch.addcmul(x * cos, x.roll(x.shape[-1] // 2, -1), sin)
