"""Attention on any device: gather the keys in logical order, then PyTorch's attention.

It is the specification that faster kernels are tested against, and the fallback where none of them runs.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from bros_kernels.attn_meta import AttnMeta
from bros_kernels.paged_attention import Angles, AttentionLayer
from bros_kernels.slots import slots_at


class ReferenceAttention:
    """Implements `PagedAttention` with one gather and one attention call per group of sequences.

    Decoding sequences of similar length share a call, padded to the longest; each prefill chunk has its own.
    """

    def __init__(self, meta: AttnMeta, dtype: torch.dtype) -> None:
        self._meta = meta
        self._dtype = dtype
        self._seq_lens = meta.seq_lens.tolist()
        self._cu_q = meta.cu_q.tolist()
        self._groups: dict[int | None, list[_Group]] = {}

    def attend(self, layer: AttentionLayer, qkv: Tensor, angles: Angles | None, k: Tensor, v: Tensor) -> Tensor:
        """See `PagedAttention.attend`."""
        heads = qkv.view(len(qkv), -1, layer.head_dim)
        q, k_new, v_new = heads.split_with_sizes((layer.num_heads, layer.num_kv_heads, layer.num_kv_heads), 1)
        if layer.q_norm is not None:
            q = layer.q_norm(q)
        if layer.k_norm is not None:
            k_new = layer.k_norm(k_new)
        if angles is not None:
            q, k_new = rotate(q, *angles), rotate(k_new, *angles)
        k, v = k.flatten(0, 1), v.flatten(0, 1)
        k.index_copy_(0, self._meta.slot_mapping, k_new)
        v.index_copy_(0, self._meta.slot_mapping, v_new)
        groups = self._groups_of(layer.window)
        if len(groups) == 1:
            return _attend_group(q, k, v, groups[0], layer).flatten(1)
        return torch.cat([_attend_group(q[group.tokens], k, v, group, layer) for group in groups]).flatten(1)

    def _groups_of(self, window: int | None) -> list[_Group]:
        if window is not None and window >= self._meta.max_k:
            window = None
        if window not in self._groups:
            self._groups[window] = self._group(window)
        return self._groups[window]

    def _group(self, window: int | None) -> list[_Group]:
        num_decodes, num_sequences = self._meta.n_decode, len(self._seq_lens)
        groups = [
            self._decode_group(start, stop, window)
            for start, stop in _runs_of_similar_length(self._seq_lens[:num_decodes])
        ]
        groups += [self._chunk(index, window) for index in range(num_decodes, num_sequences)]
        return groups

    def _decode_group(self, start: int, stop: int, window: int | None) -> _Group:
        """Sequences [start, stop), one query token each."""
        seq_lens = self._meta.seq_lens[start:stop].long()
        num_visible = seq_lens if window is None else seq_lens.clamp(max=window)
        longest = max(self._seq_lens[start:stop])
        longest = longest if window is None else min(longest, window)
        index = torch.arange(longest, device=seq_lens.device)
        # Past its end a row repeats the sequence's last key: masked, but never what an unused slot may hold.
        positions = torch.minimum((seq_lens - num_visible)[:, None] + index, seq_lens[:, None] - 1)
        slots = slots_at(self._meta.block_table[start:stop], positions, self._meta.block_size)
        mask = None
        if min(self._seq_lens[start:stop]) < longest:
            mask = self._additive_mask(index < num_visible[:, None])[:, None, None]
        return _Group(slice(start, stop), stop - start, slots.flatten(), mask, is_causal=False)

    def _chunk(self, index: int, window: int | None) -> _Group:
        """One sequence that brings several tokens."""
        start, stop = self._cu_q[index], self._cu_q[index + 1]
        seq_len = self._seq_lens[index]
        first_query = seq_len - (stop - start)
        first_key = 0 if window is None else max(0, first_query - window + 1)
        device = self._meta.seq_lens.device
        keys = torch.arange(first_key, seq_len, device=device)
        slots = slots_at(self._meta.block_table[index : index + 1], keys[None], self._meta.block_size)[0]
        tokens = slice(start, stop)
        if first_query == 0 and (window is None or window >= seq_len):
            return _Group(tokens, 1, slots, None, is_causal=True)
        queries = torch.arange(first_query, seq_len, device=device)[:, None]
        is_visible = keys <= queries
        if window is not None:
            is_visible &= keys > queries - window
        return _Group(tokens, 1, slots, self._additive_mask(is_visible)[None, None], is_causal=False)

    def _additive_mask(self, is_visible: Tensor) -> Tensor:
        mask = torch.zeros(is_visible.shape, dtype=self._dtype, device=is_visible.device)
        return mask.masked_fill_(~is_visible, -math.inf)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate the pairs (i, i + rotary_dim / 2) of x: (T, heads, head_dim) by `Angles`. What lies beyond them stays."""
    rotary_dim = cos.shape[-1]
    turned = x[..., :rotary_dim]
    turned = torch.addcmul(turned * cos, turned.roll(rotary_dim // 2, -1), sin)
    return turned if rotary_dim == x.shape[-1] else torch.cat([turned, x[..., rotary_dim:]], -1)


@dataclass(frozen=True)
class _Group:
    """Query tokens that share one attention call: one token each of `num_sequences`, or a chunk of one."""

    tokens: slice
    num_sequences: int
    slots: Tensor  # int64 (num_sequences * num_keys): the keys in logical order
    mask: Tensor | None  # additive, broadcasts to (batch, heads, queries, keys)
    is_causal: bool


def _attend_group(q: Tensor, k: Tensor, v: Tensor, group: _Group, layer: AttentionLayer) -> Tensor:
    """q: the group's (tokens, num_heads, head_dim). k, v: (slots, num_kv_heads, head_dim)."""
    num_tokens, num_heads, head_dim = q.shape
    num_kv_heads = k.shape[1]
    k = k.index_select(0, group.slots).view(group.num_sequences, -1, num_kv_heads, head_dim)
    v = v.index_select(0, group.slots).view(group.num_sequences, -1, num_kv_heads, head_dim)
    q = q.view(num_tokens, num_kv_heads, num_heads // num_kv_heads, head_dim)
    if group.num_sequences == num_tokens:
        # (sequence, kv head, query head of the group as rows, head_dim): a key is read once for all its heads.
        num_rows = q.shape[2]
        out = _softmax_attention(_with_even_rows(q), k.transpose(1, 2), v.transpose(1, 2), group, layer)
        return out[:, :, :num_rows].reshape(num_tokens, num_heads, head_dim)
    # (kv head, query head of the group, token, head_dim): keys are broadcast over the heads that share them.
    q = q.permute(1, 2, 0, 3)
    k = k[0].transpose(0, 1)[:, None].expand(-1, q.shape[1], -1, -1)
    v = v[0].transpose(0, 1)[:, None].expand(-1, q.shape[1], -1, -1)
    out = _softmax_attention(q, k, v, group, layer)
    return out.permute(2, 0, 1, 3).reshape(num_tokens, num_heads, head_dim)


def _softmax_attention(q: Tensor, k: Tensor, v: Tensor, group: _Group, layer: AttentionLayer) -> Tensor:
    """q: (..., queries, head_dim); k, v: (..., keys, head_dim). Returns (..., queries, head_dim)."""
    if layer.softcap is None:
        return F.scaled_dot_product_attention(
            q, k, v, attn_mask=group.mask, is_causal=group.is_causal, scale=layer.scale
        )
    # PyTorch's attention cannot cap. Scores are float32 here whatever the dtype, as they are there.
    scores = q.float() @ k.float().transpose(-2, -1)
    scores = scores.mul_(layer.scale / layer.softcap).tanh_().mul_(layer.softcap)
    if group.is_causal:
        is_later = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).triu_(1)
        scores.masked_fill_(is_later, -math.inf)
    if group.mask is not None:
        scores += group.mask
    return scores.softmax(-1).to(v.dtype) @ v


def _with_even_rows(q: Tensor) -> Tensor:
    """Add a row of zeros to q: (..., rows, head_dim) where a CPU multiplies one row more in less time.

    Measured with oneMKL on Zen 4, 32 sequences of 160 keys, one thread: 1 row of bfloat16 takes 2.6 times as long
    as 2, 3 rows take 1.25 times as long as 4 in bfloat16 and 1.5 times in float32. One row of float32 is fastest.
    """
    is_slow = q.shape[-2] % 2 == 1 and (q.shape[-2] > 1 or q.dtype != torch.float32)
    return F.pad(q, (0, 0, 0, 1)) if is_slow and q.device.type == "cpu" else q


def _runs_of_similar_length(seq_lens: list[int]) -> list[tuple[int, int]]:
    """Cut consecutive sequences into [start, stop) runs, so that padding costs less than a further call would.

    A run's lengths differ by at most a quarter of the longest, or by 256 keys: about what a call costs on a CPU.
    """
    runs: list[tuple[int, int]] = []
    start, shortest, longest = 0, 0, 0
    for index, seq_len in enumerate(seq_lens):
        new_shortest, new_longest = min(shortest, seq_len), max(longest, seq_len)
        if index == start:
            new_shortest = new_longest = seq_len
        elif new_longest - new_shortest > max(256, new_longest // 4):
            runs.append((start, index))
            start, new_shortest, new_longest = index, seq_len, seq_len
        shortest, longest = new_shortest, new_longest
    if seq_lens:
        runs.append((start, len(seq_lens)))
    return runs
