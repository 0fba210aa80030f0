"""PyTorch's kernels, on any device and in any dtype: the specification of the others, and where none of them runs."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from bros_kernels.attn_meta import AttnMeta
from bros_kernels.fused_layer import FusedLayer
from bros_kernels.int8 import Int8Weight
from bros_kernels.linear import Activation, Linear, LowRank, RMSNorm, add_low_ranks, gated
from bros_kernels.onednn import packed_linear
from bros_kernels.paged_attention import AttentionLayer, PagedAttention
from bros_kernels.reference_attention import ReferenceAttention


class TorchKernels:
    """Implements `Kernels`."""

    name = "torch"

    def __init__(self, dtype: torch.dtype, has_int8_weights: bool = False) -> None:
        self._dtype = dtype
        self._has_int8_weights = has_int8_weights

    def attention(self, meta: AttnMeta) -> PagedAttention:
        """See `Kernels.attention`."""
        return ReferenceAttention(meta, self._dtype)

    def linear(
        self, weight: Tensor, bias: Tensor | None = None, norm: RMSNorm | None = None, is_exact: bool = False
    ) -> Linear:
        """See `Kernels.linear`."""
        if self._has_int8_weights and not is_exact:
            return self._int8_linear(Int8Weight.of(weight), None if bias is None else bias.float(), norm)
        multiply = None
        if weight.device.type == "cpu" and weight.dtype == torch.bfloat16:
            multiply = packed_linear(weight, bias)
        if multiply is None:

            def multiply(x: Tensor) -> Tensor:
                return F.linear(x, weight, bias)

        def linear(x: Tensor, residual: Tensor | None = None) -> Tensor:
            product = multiply(x if norm is None else norm(x))
            return product if residual is None else product.add_(residual)

        return linear

    def _int8_linear(self, weight: Int8Weight, bias: Tensor | None, norm: RMSNorm | None) -> Linear:
        def linear(x: Tensor, residual: Tensor | None = None) -> Tensor:
            product = weight.multiply(x if norm is None else norm(x), bias)
            return (product if residual is None else product.add_(residual)).to(self._dtype)

        return linear

    def gated_linear(self, weight: Tensor, bias: Tensor | None, activation: Activation, norm: RMSNorm | None) -> Linear:
        """See `Kernels.gated_linear`."""
        return gated(self.linear(weight, bias, norm), activation)

    def add_low_ranks(
        self, parts: Sequence[tuple[LowRank, Tensor]], x: Tensor, residual: Tensor | None, out_features: int
    ) -> Tensor:
        """See `Kernels.add_low_ranks`."""
        return add_low_ranks(parts, x, residual, out_features)

    def fuse_layer(
        self, layer: AttentionLayer, qkv: Linear, output: Linear, gated: Linear, down: Linear
    ) -> FusedLayer | None:
        """See `Kernels.fuse_layer`."""
        return None

    def rms_norm(self, x: Tensor, norm: RMSNorm) -> Tensor:
        """See `Kernels.rms_norm`."""
        return norm(x)

    def most_likely(self, logits: Tensor) -> tuple[Tensor, Tensor]:
        """See `Kernels.most_likely`."""
        token_ids = logits.argmax(-1)
        # NaN or +inf anywhere, or -inf everywhere, makes the whole row NaN.
        logprobs = logits.log_softmax(-1, dtype=torch.float32).gather(1, token_ids[:, None])[:, 0]
        return token_ids, logprobs
