"""The C kernels, for bfloat16 on a CPU with AVX-512: weights packed once, attention that reads the pages in place."""

from __future__ import annotations

import ctypes
from typing import Final

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from bros_kernels.attn_meta import AttnMeta
from bros_kernels.linear import Activation, Linear, RMSNorm
from bros_kernels.native import CAttention, CLinear, CNorm, CStep
from bros_kernels.paged_attention import Angles, AttentionLayer, PagedAttention
from bros_kernels.reference_attention import ReferenceAttention
from bros_kernels.torch_kernels import TorchKernels

#: Columns of a packed weight's panel (`native/avx512.h`).
_PANEL: Final = 32
#: What a sum becomes: `enum bros_epilogue`.
_STORE, _SILU_MUL = 0, 1
#: Most query rows and numbers of a head in `native/attention.h`, and what a head's size must divide by.
_MAX_QUERY_ROWS, _MAX_HEAD_DIM, _HEAD_DIM_UNIT = 48, 256, 32


class CpuKernels:
    """Implements `Kernels`. Shapes that the C code does not know are left to PyTorch."""

    name = "cpu"

    def __init__(self, library: ctypes.CDLL) -> None:
        self._library = library
        self._torch = TorchKernels(torch.bfloat16)
        self._layers: dict[AttentionLayer, CAttention] = {}

    def attention(self, meta: AttnMeta) -> PagedAttention:
        """See `Kernels.attention`."""
        return CpuAttention(self._library, self._layers, meta)

    def linear(self, weight: Tensor, bias: Tensor | None = None, norm: RMSNorm | None = None) -> Linear:
        """See `Kernels.linear`."""
        if weight.shape[1] % 2:
            return self._torch.linear(weight, bias, norm)
        return _PackedLinear(self._library, weight, bias, norm, _STORE)

    def gated_linear(self, weight: Tensor, bias: Tensor | None, activation: Activation, norm: RMSNorm | None) -> Linear:
        """See `Kernels.gated_linear`."""
        if activation is not F.silu or weight.shape[1] % 2 or weight.shape[0] % _PANEL:
            return self._torch.gated_linear(weight, bias, activation, norm)
        # A panel holds 16 rows of gate and the 16 of up that they are multiplied with.
        interleaved = weight.view(2, -1, _PANEL // 2, weight.shape[1]).transpose(0, 1).reshape(weight.shape)
        if bias is not None:
            bias = bias.view(2, -1, _PANEL // 2).transpose(0, 1).reshape(bias.shape)
        return _PackedLinear(self._library, interleaved, bias, norm, _SILU_MUL)

    def rms_norm(self, x: Tensor, norm: RMSNorm) -> Tensor:
        """See `Kernels.rms_norm`."""
        out = torch.empty(x.shape, dtype=x.dtype)
        described = _describe_norm(norm)  # lives until the call returns
        self._library.bros_rms_norm(*(x.data_ptr(), x.stride(0), *x.shape, ctypes.addressof(described), out.data_ptr()))
        return out

    def most_likely(self, logits: Tensor) -> tuple[Tensor, Tensor]:
        """See `Kernels.most_likely`."""
        if logits.dtype != torch.bfloat16:
            return self._torch.most_likely(logits)
        num_rows, vocab_size = logits.shape
        token_ids = torch.empty(num_rows, dtype=torch.int64)
        logprobs = torch.empty(num_rows, dtype=torch.float32)
        self._library.bros_most_likely(
            *(logits.data_ptr(), logits.stride(0), num_rows, vocab_size, token_ids.data_ptr(), logprobs.data_ptr())
        )
        return token_ids, logprobs


class _PackedLinear:
    """Implements `Linear`, with an activation of the result in the same call."""

    def __init__(
        self, library: ctypes.CDLL, weight: Tensor, bias: Tensor | None, norm: RMSNorm | None, epilogue: int
    ) -> None:
        self._multiply = library.bros_multiply
        num_rows, num_columns = weight.shape
        packed = torch.empty(-(-num_rows // _PANEL) * _PANEL * num_columns, dtype=torch.bfloat16)
        assert packed.data_ptr() % 64 == 0, "PyTorch aligns what it allocates"
        library.bros_pack_weight(weight.contiguous().data_ptr(), num_rows, num_columns, packed.data_ptr())
        bias = None if bias is None else bias.float().contiguous()
        self._kept_alive = packed, bias, norm
        self._linear = CLinear(
            packed.data_ptr(),
            num_rows,
            num_columns,
            None if bias is None else bias.data_ptr(),
            _describe_norm(norm),
            epilogue,
        )
        self._address = ctypes.addressof(self._linear)
        self._out_features = num_rows // 2 if epilogue == _SILU_MUL else num_rows

    def __call__(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        num_rows = len(x)
        out = torch.empty(num_rows, self._out_features, dtype=torch.bfloat16)
        residual_at = None if residual is None else residual.data_ptr()
        self._multiply(self._address, x.data_ptr(), x.stride(0), num_rows, residual_at, out.data_ptr())
        return out


class CpuAttention:
    """Implements `PagedAttention`."""

    def __init__(self, library: ctypes.CDLL, layers: dict[AttentionLayer, CAttention], meta: AttnMeta) -> None:
        """`layers`: what the library is told of each layer; those that are met for the first time are added."""
        self._attend = library.bros_attend
        self._layers = layers
        self._meta = meta
        #: By the number of heads that share a key head, with the memory that they refer to.
        self._steps: dict[int, tuple[CStep, np.ndarray]] = {}
        self._reference: ReferenceAttention | None = None

    def attend(self, layer: AttentionLayer, qkv: Tensor, angles: Angles | None, k: Tensor, v: Tensor) -> Tensor:
        """See `PagedAttention.attend`."""
        group = layer.num_heads // layer.num_kv_heads
        if layer.head_dim % _HEAD_DIM_UNIT or layer.head_dim > _MAX_HEAD_DIM or group > _MAX_QUERY_ROWS:
            if self._reference is None:
                self._reference = ReferenceAttention(self._meta, qkv.dtype)
            return self._reference.attend(layer, qkv, angles, k, v)
        if layer not in self._layers:
            self._layers[layer] = _describe(layer)
        if group not in self._steps:
            self._steps[group] = self._make_step(_MAX_QUERY_ROWS // group)
        step, _ = self._steps[group]
        cos, sin, rotary_dim = None, None, 0
        if angles is not None:
            cos, sin, rotary_dim = angles[0].data_ptr(), angles[1].data_ptr(), angles[0].shape[-1]
        out = torch.empty(len(qkv), layer.num_heads * layer.head_dim, dtype=qkv.dtype)
        self._attend(
            *(ctypes.addressof(step), ctypes.addressof(self._layers[layer]), qkv.data_ptr()),
            *(cos, sin, rotary_dim, k.data_ptr(), v.data_ptr(), out.data_ptr()),
        )
        return out

    def _make_step(self, max_tokens: int) -> tuple[CStep, np.ndarray]:
        """Query tokens in parts of at most `max_tokens` of one sequence, those that take longest first."""
        meta = self._meta
        seq_lens, cu_q = meta.seq_lens.numpy(), meta.cu_q.numpy()
        num_new = np.diff(cu_q)
        num_parts = -(-num_new // max_tokens)
        sequence = np.repeat(np.arange(len(num_new)), num_parts)
        start = (np.arange(len(sequence)) - (np.cumsum(num_parts) - num_parts)[sequence]) * max_tokens
        num_tokens = np.minimum(max_tokens, num_new[sequence] - start)
        position = (seq_lens - num_new)[sequence] + start
        longest_first = np.argsort(-(position + num_tokens) * num_tokens, kind="stable")
        parts = np.stack([sequence, cu_q[sequence] + start, num_tokens, position], axis=1)
        queries = np.ascontiguousarray(parts[longest_first], dtype=np.int32)
        table, slots = meta.block_table, meta.slot_mapping
        step = CStep(
            *(len(slots), slots.data_ptr(), queries.ctypes.data, len(queries)),
            *(table.data_ptr(), table.stride(0), meta.block_size),
        )
        return step, queries


def _describe_norm(norm: RMSNorm | None) -> CNorm:
    """It refers to the weight's memory."""
    return CNorm(None, 0.0, 0.0) if norm is None else CNorm(norm.weight.data_ptr(), norm.eps, norm.offset)


def _describe(layer: AttentionLayer) -> CAttention:
    return CAttention(
        layer.num_heads,
        layer.num_kv_heads,
        layer.head_dim,
        layer.window or 0,
        _describe_norm(layer.q_norm),
        _describe_norm(layer.k_norm),
        layer.scale,
        layer.softcap or 0.0,
    )
