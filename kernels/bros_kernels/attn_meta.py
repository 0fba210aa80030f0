"""What one step's attention must know of its sequences: the input of every backend."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class AttnMeta:
    """Who attends to what in one step: the same for all layers. N sequences bring T new tokens.

    The first `n_decode` sequences have exactly one query token. Query token i of sequence n, of its nq, has the
    logical position `seq_lens[n] - nq + i` and sees the keys up to and including that position.
    """

    block_table: Tensor  # int32 (N, M): signed entries, padded with any valid entry
    seq_lens: Tensor  # int32 (N): keys of each sequence, this step's tokens included
    cu_q: Tensor  # int32 (N + 1): prefix sums of the sequences' query tokens
    slot_mapping: Tensor  # int64 (T): slot of each new token
    max_q: int
    max_k: int
    n_decode: int
    block_size: int
