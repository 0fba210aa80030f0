"""What a model computes with: every operation that some device has a faster way for, and who does it.

This package knows nothing of models, plans or processes.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final, Protocol

import structlog
import torch
from torch import Tensor

from bros_kernels.attn_meta import AttnMeta
from bros_kernels.cpu_kernels import CpuKernels
from bros_kernels.fused_layer import FusedLayer
from bros_kernels.linear import Activation, Linear, LowRank, RMSNorm
from bros_kernels.native import NativeLibraryError, load_library
from bros_kernels.paged_attention import AttentionLayer, PagedAttention
from bros_kernels.torch_kernels import TorchKernels

log = structlog.get_logger()

NAMES: Final = ("auto", "cpu", "torch")
#: What the C kernels compute in.
_CPU_DTYPES: Final = (torch.bfloat16, torch.float32)


class Kernels(Protocol):
    """One implementation. Numbers are in the dtype that it was chosen for, unless said otherwise."""

    name: str

    def attention(self, meta: AttnMeta) -> PagedAttention:
        """The attention of one step."""

    def linear(
        self, weight: Tensor, bias: Tensor | None = None, norm: RMSNorm | None = None, is_exact: bool = False
    ) -> Linear:
        """A product with a weight that never changes. The weight may be freed: the function keeps what it needs.

        Args:
            weight: (out_features, in_features).
            bias: (out_features), or None.
            norm: of the inputs, or None.
            is_exact: the weight is not rounded to int8 where others are.
        """

    def gated_linear(self, weight: Tensor, bias: Tensor | None, activation: Activation, norm: RMSNorm | None) -> Linear:
        """The function activation(gate(norm(x))) * up(norm(x)).

        Its residual is added before the activation: (rows, 2 * out_features), the features of gate, then those of up.

        Args:
            weight: (2 * out_features, in_features): the rows of gate, then those of up; `bias` alike.
        """

    def add_low_ranks(
        self, parts: Sequence[tuple[LowRank, Tensor]], x: Tensor, residual: Tensor | None, out_features: int
    ) -> Tensor:
        """`residual`, or zeros, with what each part adds to some of its rows.

        Args:
            parts: products of these kernels, and the rows of each, int64; no row is in two. At least one.
            x: (rows, in_features), the numbers of a row side by side.
            residual: (rows, out_features), contiguous.

        Returns:
            (rows, out_features), contiguous; new.
        """

    def fuse_layer(
        self, layer: AttentionLayer, qkv: Linear, output: Linear, gated: Linear, down: Linear
    ) -> FusedLayer | None:
        """A layer of these attention and products, which these kernels made, in one call; None: there is none."""

    def rms_norm(self, x: Tensor, norm: RMSNorm) -> Tensor:
        """norm(x), of (rows, size). Contiguous."""

    def most_likely(self, logits: Tensor) -> tuple[Tensor, Tensor]:
        """The first of the largest logits of each row, and its log-softmax.

        Args:
            logits: (rows, vocab_size), of this dtype or float32.

        Returns:
            int64 (rows), always in range; float32 (rows), not finite where a row holds NaN or +inf, or only -inf.
        """


class UnknownKernelsError(Exception):
    """No kernels have this name, or they do not run here."""


def select_kernels(
    name: str, device: torch.device, dtype: torch.dtype, num_threads: int, has_int8_weights: bool = False
) -> Kernels:
    """The kernels called `name`, or the fastest that run here where the name is `auto`.

    They have `num_threads` threads of the CPU; PyTorch has as many, or one beside kernels that have their own: threads
    of two pools would wait for work on the same cores.

    Args:
        has_int8_weights: weights, and inputs of products, are rounded to int8 (`bros_kernels.int8`).

    Raises:
        UnknownKernelsError: nothing has this name, or it does not run here.
    """
    torch.set_num_threads(num_threads)
    if name not in NAMES:
        raise UnknownKernelsError(f"no kernels are called {name!r}: there are {', '.join(NAMES)}")
    if has_int8_weights and device.type != "cpu":
        raise UnknownKernelsError(f"int8 weights are for the CPU, not for {device.type}")
    is_possible = device.type == "cpu" and dtype in _CPU_DTYPES
    if name == "torch" or (name == "auto" and not is_possible):
        return TorchKernels(dtype, has_int8_weights)
    if not is_possible:
        raise UnknownKernelsError(
            f"the cpu kernels compute in bfloat16 and float32 on the CPU, not in {dtype} on {device.type}"
        )
    try:
        kernels = CpuKernels(load_library(num_threads), dtype, has_int8_weights)
        torch.set_num_threads(1)
        return kernels
    except NativeLibraryError as error:
        if name == "cpu":
            raise UnknownKernelsError(f"the cpu kernels do not run here: {error}") from None
        log.warning("running on PyTorch's kernels, which are slower", reason=str(error))
        return TorchKernels(dtype, has_int8_weights)
