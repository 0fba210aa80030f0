"""The C kernels, on a CPU with AVX-512: weights packed once, attention that reads the pages in place."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Sequence
from typing import Final

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from bros_kernels.attn_meta import AttnMeta
from bros_kernels.fused_layer import FusedLayer
from bros_kernels.int8 import Int8Weight
from bros_kernels.linear import Activation, Linear, LowRank, RMSNorm, add_low_ranks, gated
from bros_kernels.native import CAttention, CLayer, CLinear, CLowRank, CNorm, CStep
from bros_kernels.paged_attention import Angles, AttentionLayer, PagedAttention
from bros_kernels.reference_attention import ReferenceAttention
from bros_kernels.torch_kernels import TorchKernels

#: Columns of a packed weight's panel (`native/avx512.h`).
_PANEL: Final = 32
#: `enum bros_dtype`.
_DTYPES: Final = {torch.bfloat16: 0, torch.float32: 1}
#: What a sum becomes: `enum bros_epilogue`.
_STORE, _SILU_MUL = 0, 1
#: Most query rows and numbers of a head, and keys of a span, in `native/attention.h`.
_MAX_QUERY_ROWS, _MAX_HEAD_DIM, _SPAN_KEYS = 48, 256, 512


class CpuKernels:
    """Implements `Kernels`. Shapes that the C code does not know are left to PyTorch."""

    name = "cpu"

    def __init__(self, library: ctypes.CDLL, dtype: torch.dtype, has_int8_weights: bool) -> None:
        self._library = library
        self._dtype = dtype
        self._has_int8_weights = has_int8_weights
        self._torch = TorchKernels(dtype)
        self._layers: dict[AttentionLayer, CAttention] = {}

    def attention(self, meta: AttnMeta) -> PagedAttention:
        """See `Kernels.attention`."""
        return CpuAttention(self._library, self._dtype, self._described, meta)

    def linear(
        self, weight: Tensor, bias: Tensor | None = None, norm: RMSNorm | None = None, is_exact: bool = False
    ) -> Linear:
        """See `Kernels.linear`."""
        is_int8 = self._has_int8_weights and not is_exact
        if weight.shape[1] % 2 and self._dtype == torch.bfloat16 and not is_int8:
            return self._torch.linear(weight, bias, norm)
        return _PackedLinear(self._library, weight, bias, norm, is_int8, _STORE)

    def gated_linear(self, weight: Tensor, bias: Tensor | None, activation: Activation, norm: RMSNorm | None) -> Linear:
        """See `Kernels.gated_linear`."""
        if activation is not F.silu or weight.shape[1] % 2 or weight.shape[0] % _PANEL:
            return gated(self.linear(weight, bias, norm), activation)
        # A panel holds 16 rows of gate and the 16 of up that they are multiplied with.
        interleaved = weight.view(2, -1, _PANEL // 2, weight.shape[1]).transpose(0, 1).reshape(weight.shape)
        if bias is not None:
            bias = bias.view(2, -1, _PANEL // 2).transpose(0, 1).reshape(bias.shape)
        return _PackedLinear(self._library, interleaved, bias, norm, self._has_int8_weights, _SILU_MUL)

    def add_low_ranks(
        self, parts: Sequence[tuple[LowRank, Tensor]], x: Tensor, residual: Tensor | None, out_features: int
    ) -> Tensor:
        """See `Kernels.add_low_ranks`."""
        described = [
            CLowRank(down.address, up.address, rows.data_ptr(), len(rows))
            for low_rank, rows in parts
            if isinstance(down := low_rank.down, _PackedLinear) and isinstance(up := low_rank.up, _PackedLinear)
        ]
        if len(described) < len(parts):
            return add_low_ranks(parts, x, residual, out_features)
        out = torch.empty(len(x), out_features, dtype=x.dtype)
        self._library.bros_add_low_ranks(
            *((CLowRank * len(described))(*described), len(described), x.data_ptr(), x.stride(0), len(x)),
            *(None if residual is None else residual.data_ptr(), out.data_ptr()),
        )
        return out

    def fuse_layer(
        self, layer: AttentionLayer, qkv: Linear, output: Linear, gated: Linear, down: Linear
    ) -> FusedLayer | None:
        """See `Kernels.fuse_layer`."""
        linears = [each for each in (qkv, output, gated, down) if isinstance(each, _PackedLinear)]
        if len(linears) < 4 or not _is_known(layer, self._dtype):
            return None
        return _CpuLayer(self._library, layer, self._described(layer), linears)

    def _described(self, layer: AttentionLayer) -> CAttention:
        """What the library is told of a layer; it stays where it is as long as these kernels."""
        if layer not in self._layers:
            self._layers[layer] = _describe(layer, self._dtype)
        return self._layers[layer]

    def rms_norm(self, x: Tensor, norm: RMSNorm) -> Tensor:
        """See `Kernels.rms_norm`."""
        out = torch.empty(x.shape, dtype=x.dtype)
        described = _describe_norm(norm)  # lives until the call returns
        self._library.bros_rms_norm(
            *(x.data_ptr(), x.stride(0), *x.shape, ctypes.addressof(described), _DTYPES[x.dtype], out.data_ptr())
        )
        return out

    def most_likely(self, logits: Tensor) -> tuple[Tensor, Tensor]:
        """See `Kernels.most_likely`."""
        num_rows, vocab_size = logits.shape
        token_ids = torch.empty(num_rows, dtype=torch.int64)
        logprobs = torch.empty(num_rows, dtype=torch.float32)
        self._library.bros_most_likely(
            *(logits.data_ptr(), logits.stride(0), num_rows, vocab_size, _DTYPES[logits.dtype]),
            *(token_ids.data_ptr(), logprobs.data_ptr()),
        )
        return token_ids, logprobs


class _PackedLinear:
    """Implements `Linear`, with an activation of the result in the same call."""

    def __init__(
        self,
        library: ctypes.CDLL,
        weight: Tensor,
        bias: Tensor | None,
        norm: RMSNorm | None,
        is_int8: bool,
        epilogue: int,
    ) -> None:
        self._multiply = library.bros_multiply
        self._dtype = weight.dtype
        num_rows, num_columns = weight.shape
        scales = None
        if is_int8:
            rounded = Int8Weight.of(weight)
            weight, scales = rounded.values.view(torch.uint8) ^ 128, rounded.scales  # 128 more, as the library wants it
        row_bytes = num_columns * weight.element_size()
        num_units = -(-row_bytes // 4)
        packed = torch.empty(-(-num_rows // _PANEL) * _PANEL * num_units, dtype=torch.int32)
        assert packed.data_ptr() % 64 == 0, "PyTorch aligns what it allocates"
        library.bros_pack_weight(weight.contiguous().data_ptr(), num_rows, row_bytes, packed.data_ptr())
        bias = None if bias is None else bias.float().contiguous()
        self._kept_alive = packed, scales, bias, norm
        self._linear = CLinear(
            packed.data_ptr(),
            num_rows,
            num_columns,
            None if scales is None else scales.data_ptr(),
            None if bias is None else bias.data_ptr(),
            _describe_norm(norm),
            _DTYPES[self._dtype],
            epilogue,
        )
        self.address = ctypes.addressof(self._linear)
        self._out_features = num_rows // 2 if epilogue == _SILU_MUL else num_rows

    def __call__(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        num_rows = len(x)
        out = torch.empty(num_rows, self._out_features, dtype=self._dtype)
        residual_at = None if residual is None else residual.data_ptr()
        self._multiply(self.address, x.data_ptr(), x.stride(0), num_rows, residual_at, out.data_ptr())
        return out


class CpuAttention:
    """Implements `PagedAttention`."""

    def __init__(
        self,
        library: ctypes.CDLL,
        dtype: torch.dtype,
        described: Callable[[AttentionLayer], CAttention],
        meta: AttnMeta,
    ) -> None:
        """`described`: what the library is told of a layer."""
        self._attend = library.bros_attend
        self._dtype = dtype
        self._described = described
        self._meta = meta
        #: By the number of heads that share a key head.
        self._steps: dict[int, _Step] = {}
        self._reference: ReferenceAttention | None = None

    def attend(self, layer: AttentionLayer, qkv: Tensor, angles: Angles | None, k: Tensor, v: Tensor) -> Tensor:
        """See `PagedAttention.attend`."""
        if not _is_known(layer, self._dtype):
            if self._reference is None:
                self._reference = ReferenceAttention(self._meta, self._dtype)
            return self._reference.attend(layer, qkv, angles, k, v)
        out = torch.empty(len(qkv), layer.num_heads * layer.head_dim, dtype=qkv.dtype)
        self._attend(
            *(self.step_of(layer), ctypes.addressof(self._described(layer)), qkv.data_ptr()),
            *(*_angles(angles), k.data_ptr(), v.data_ptr(), out.data_ptr()),
        )
        return out

    def step_of(self, layer: AttentionLayer) -> int:
        """The address of what the library is told of the step, for such a layer."""
        group = layer.num_heads // layer.num_kv_heads
        if group not in self._steps:
            self._steps[group] = _Step(self._meta, group)
        return self._steps[group].address


class _CpuLayer:
    """Implements `FusedLayer`."""

    def __init__(
        self, library: ctypes.CDLL, layer: AttentionLayer, described: CAttention, linears: list[_PackedLinear]
    ) -> None:
        """`linears`: qkv, output, gated, down."""
        self._run = library.bros_run_layer
        self._attention_layer = layer
        self._kept_alive = described, linears
        self._layer = CLayer(ctypes.addressof(described), *(linear.address for linear in linears))
        self._address = ctypes.addressof(self._layer)

    def __call__(
        self, hidden: Tensor, angles: Angles | None, k: Tensor, v: Tensor, attention: PagedAttention
    ) -> Tensor:
        assert isinstance(attention, CpuAttention)
        step = attention.step_of(self._attention_layer)
        self._run(self._address, step, hidden.data_ptr(), *_angles(angles), k.data_ptr(), v.data_ptr())
        return hidden


class _Step:
    """A step's `struct bros_step` for layers in which `group` heads share a key head, and the memory it refers to."""

    def __init__(self, meta: AttnMeta, group: int) -> None:
        """Query tokens are computed in runs of one sequence, those that take longest first.

        A sequence whose new tokens are one run has its keys split into spans, so that threads share a long context.
        """
        max_tokens = _MAX_QUERY_ROWS // group
        seq_lens, cu_q = meta.seq_lens.numpy(), meta.cu_q.numpy()
        num_new = np.diff(cu_q)
        num_runs = -(-num_new // max_tokens)
        num_spans = np.where(num_runs == 1, -(-seq_lens // _SPAN_KEYS), 1)
        num_part_rows = np.where(num_spans > 1, num_spans * num_new * group, 0)
        first_part = np.cumsum(num_part_rows) - num_part_rows

        num_queries = num_runs * num_spans  # one of them is 1
        sequence = np.repeat(np.arange(len(num_new)), num_queries)
        index = np.arange(len(sequence)) - (np.cumsum(num_queries) - num_queries)[sequence]
        is_part = (num_spans > 1)[sequence]
        start = np.where(is_part, 0, index * max_tokens)
        num_tokens = np.minimum(max_tokens, num_new[sequence] - start)
        position = (seq_lens - num_new)[sequence] + start
        first_key = np.where(is_part, index * _SPAN_KEYS, 0)
        stop_key = np.minimum(position + num_tokens, np.where(is_part, first_key + _SPAN_KEYS, np.iinfo(np.int32).max))
        part = np.where(is_part, first_part[sequence] + index * (num_new * group)[sequence], -1)
        longest_first = np.argsort((first_key - stop_key) * num_tokens, kind="stable")
        queries = np.stack([sequence, cu_q[sequence] + start, num_tokens, position, first_key, stop_key, part], axis=1)
        self._queries = np.ascontiguousarray(queries[longest_first], dtype=np.int32)
        is_split = num_spans > 1
        splits = np.stack([cu_q[:-1], num_new, first_part, num_spans], axis=1)[is_split]
        self._splits = np.ascontiguousarray(splits, dtype=np.int32)
        self._meta = meta
        table, slots = meta.block_table, meta.slot_mapping
        self._step = CStep(
            *(len(slots), slots.data_ptr(), self._queries.ctypes.data, len(self._queries)),
            *(self._splits.ctypes.data, len(self._splits), int(num_part_rows.sum())),
            *(table.data_ptr(), table.stride(0), meta.block_size),
        )
        self.address = ctypes.addressof(self._step)


def _is_known(layer: AttentionLayer, dtype: torch.dtype) -> bool:
    """Whether the library can attend so."""
    is_odd = layer.head_dim % 2 == 1 and dtype == torch.bfloat16
    group = layer.num_heads // layer.num_kv_heads
    return not is_odd and layer.head_dim <= _MAX_HEAD_DIM and group <= _MAX_QUERY_ROWS


def _angles(angles: Angles | None) -> tuple[int | None, int | None, int]:
    """As the library takes them."""
    return (None, None, 0) if angles is None else (angles[0].data_ptr(), angles[1].data_ptr(), angles[0].shape[-1])


def _describe_norm(norm: RMSNorm | None) -> CNorm:
    """It refers to the weight's memory."""
    return CNorm(None, 0.0, 0.0) if norm is None else CNorm(norm.weight.data_ptr(), norm.eps, norm.offset)


def _describe(layer: AttentionLayer, dtype: torch.dtype) -> CAttention:
    return CAttention(
        layer.num_heads,
        layer.num_kv_heads,
        layer.head_dim,
        layer.window or 0,
        _describe_norm(layer.q_norm),
        _describe_norm(layer.k_norm),
        layer.scale,
        layer.softcap or 0.0,
        _DTYPES[dtype],
    )
