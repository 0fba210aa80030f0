"""Moves of sequences' tails from block to block."""

from __future__ import annotations

import torch
from torch import Tensor

from bros_kernels.slots import slots_of


def copy_tails(kv: Tensor, source_entries: Tensor, destination_entries: Tensor, counts: Tensor) -> None:
    """Copy the first `counts[c]` logical tokens of each source entry's block to its destination's, in all layers.

    No slot may be both read and written, or written twice.

    Args:
        kv: (num_layers, 2, num_blocks, block_size, num_kv_heads, head_dim).
        source_entries, destination_entries: signed block-table entries, int32 (C), as is `counts`.
    """
    block_size = kv.shape[3]
    copy = torch.arange(len(counts), device=counts.device).repeat_interleave(counts.long())
    offsets = torch.arange(len(copy), device=counts.device) - (counts.cumsum(0) - counts)[copy]
    slots = kv.flatten(2, 3)
    source = slots_of(source_entries[copy], offsets, block_size)
    destination = slots_of(destination_entries[copy], offsets, block_size)
    slots.index_copy_(2, destination, slots.index_select(2, source))
