"""The C kernels, for bfloat16 on a CPU with AVX-512: weights packed once, attention that reads the pages in place."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from typing import Final

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from bros_kernels.attn_meta import AttnMeta
from bros_kernels.native import Step
from bros_kernels.paged_attention import PagedAttention
from bros_kernels.reference_attention import ReferenceAttention
from bros_kernels.torch_kernels import TorchKernels

#: Columns of a packed weight's panel (`native/gemm.h`).
_PANEL: Final = 32
#: What a packed sum becomes: `enum bros_epilogue`.
_STORE, _SILU_MUL = 0, 1
#: Most query rows and numbers of a head in `native/attention.h`, and what a head's size must divide by.
_MAX_QUERY_ROWS, _MAX_HEAD_DIM, _HEAD_DIM_UNIT = 48, 256, 32


class CpuKernels:
    """Implements `Kernels`. Shapes that the C code does not know are left to PyTorch."""

    name = "cpu"

    def __init__(self, library: ctypes.CDLL) -> None:
        self._library = library
        self._torch = TorchKernels(torch.bfloat16)

    def attention(self, meta: AttnMeta) -> PagedAttention:
        """See `Kernels.attention`."""
        return CpuAttention(self._library, meta)

    def linear(self, weight: Tensor, bias: Tensor | None = None) -> Callable[[Tensor], Tensor]:
        """See `Kernels.linear`."""
        if weight.shape[1] % 2:
            return self._torch.linear(weight, bias)
        return _PackedLinear(self._library, weight, bias, _STORE)

    def gated_linear(
        self, weight: Tensor, bias: Tensor | None, activation: Callable[[Tensor], Tensor]
    ) -> Callable[[Tensor], Tensor]:
        """See `Kernels.gated_linear`."""
        if activation is not F.silu or weight.shape[1] % 2 or weight.shape[0] % _PANEL:
            return self._torch.gated_linear(weight, bias, activation)
        # A panel holds 16 rows of gate and the 16 of up that they are multiplied with.
        interleaved = weight.view(2, -1, _PANEL // 2, weight.shape[1]).transpose(0, 1).reshape(weight.shape)
        if bias is not None:
            bias = bias.view(2, -1, _PANEL // 2).transpose(0, 1).reshape(bias.shape)
        return _PackedLinear(self._library, interleaved, bias, _SILU_MUL)

    def rms_norm(self, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        """See `Kernels.rms_norm`."""
        size = len(weight)
        rows = x.reshape(-1, size)
        out = torch.empty(x.shape, dtype=x.dtype)
        self._library.bros_rms_norm(
            rows.data_ptr(), rows.stride(0), len(rows), size, weight.data_ptr(), eps, out.data_ptr()
        )
        return out

    def rotate(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """See `Kernels.rotate`."""
        num_tokens, num_heads, head_dim = x.shape
        if head_dim % _HEAD_DIM_UNIT:
            return self._torch.rotate(x, cos, sin)
        x = _with_dense_tokens(x)
        self._library.bros_rotate(
            x.data_ptr(), x.stride(0), num_tokens, num_heads, head_dim, cos.data_ptr(), sin.data_ptr()
        )
        return x


class _PackedLinear:
    """x @ weight.T + bias, with what becomes of it in the same call."""

    def __init__(self, library: ctypes.CDLL, weight: Tensor, bias: Tensor | None, epilogue: int) -> None:
        self._library = library
        self._out_features, self._in_features = weight.shape
        num_panels = -(-self._out_features // _PANEL)
        self._packed = torch.empty(num_panels * _PANEL * self._in_features, dtype=torch.bfloat16)
        assert self._packed.data_ptr() % 64 == 0, "PyTorch aligns what it allocates"
        library.bros_pack_weight(
            weight.contiguous().data_ptr(), self._out_features, self._in_features, self._packed.data_ptr()
        )
        self._bias = None if bias is None else bias.float().contiguous()
        self._epilogue = epilogue
        self._num_columns = self._out_features // 2 if epilogue == _SILU_MUL else self._out_features
        # Looked up once: a decode step makes a hundred calls.
        self._packed_ptr = self._packed.data_ptr()
        self._bias_ptr = None if self._bias is None else self._bias.data_ptr()

    def __call__(self, x: Tensor) -> Tensor:
        if x.stride(1) != 1:
            x = x.contiguous()
        num_rows = len(x)
        out = torch.empty(num_rows, self._num_columns, dtype=torch.bfloat16)
        self._library.bros_linear(
            *(x.data_ptr(), x.stride(0), num_rows),
            *(self._packed_ptr, self._out_features, self._in_features, self._bias_ptr),
            *(out.data_ptr(), self._num_columns, self._epilogue),
        )
        return out


class CpuAttention:
    """Implements `PagedAttention`."""

    def __init__(self, library: ctypes.CDLL, meta: AttnMeta) -> None:
        self._library = library
        self._meta = meta
        self._slots_ptr = meta.slot_mapping.data_ptr()
        self._steps: dict[int, tuple[Step, np.ndarray]] = {}
        self._reference: ReferenceAttention | None = None

    def write_kv(self, k: Tensor, v: Tensor, k_new: Tensor, v_new: Tensor) -> None:
        """See `PagedAttention.write_kv`."""
        num_tokens, num_kv_heads, head_dim = k_new.shape
        k_new, v_new = _with_dense_tokens(k_new), _with_dense_tokens(v_new)
        self._library.bros_write_kv(
            *(k_new.data_ptr(), k_new.stride(0), v_new.data_ptr(), v_new.stride(0)),
            *(num_tokens, num_kv_heads * head_dim, self._slots_ptr, k.data_ptr(), v.data_ptr()),
        )

    def attend(self, q: Tensor, k: Tensor, v: Tensor, scale: float, window: int | None = None) -> Tensor:
        """See `PagedAttention.attend`."""
        num_tokens, num_heads, head_dim = q.shape
        num_kv_heads = k.shape[2]
        group = num_heads // num_kv_heads
        if head_dim % _HEAD_DIM_UNIT or head_dim > _MAX_HEAD_DIM or group > _MAX_QUERY_ROWS:
            if self._reference is None:
                self._reference = ReferenceAttention(self._meta, q.dtype)
            return self._reference.attend(q, k, v, scale, window)
        if group not in self._steps:
            self._steps[group] = self._make_step(_MAX_QUERY_ROWS // group)
        step, _ = self._steps[group]
        q = _with_dense_tokens(q)
        out = torch.empty(num_tokens, num_heads, head_dim, dtype=q.dtype)
        self._library.bros_attend(
            *(ctypes.addressof(step), q.data_ptr(), q.stride(0), k.data_ptr(), v.data_ptr()),
            *(num_heads, num_kv_heads, head_dim, scale, window or 0, out.data_ptr()),
        )
        return out

    def _make_step(self, max_tokens: int) -> tuple[Step, np.ndarray]:
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
        table = meta.block_table
        step = Step(queries.ctypes.data, len(queries), table.data_ptr(), table.stride(0), meta.block_size)
        return step, queries


def _with_dense_tokens(x: Tensor) -> Tensor:
    """x: (T, heads, head_dim), copied where the numbers of a token do not lie side by side."""
    return x if x.stride(2) == 1 and x.stride(1) == x.shape[2] else x.contiguous()
