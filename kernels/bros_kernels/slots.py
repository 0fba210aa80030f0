"""Slot arithmetic of signed block tables, on tensors.

    entry >= 0   block `entry`, forward:   logical offset o of the block sits in slot  o
    entry <  0   block `~entry`, reversed: logical offset o of the block sits in slot  block_size - 1 - o

A slot is an index into a region seen as `num_blocks * block_size` rows.
"""

from __future__ import annotations

import torch
from torch import Tensor


def slots_of(entries: Tensor, offsets: Tensor, block_size: int) -> Tensor:
    """Slots of logical `offsets` in [0, block_size) within the blocks of `entries`; the two broadcast. int64."""
    entries, offsets = entries.long(), offsets.long()
    forward = entries * block_size + offsets
    backward = ~entries * block_size + (block_size - 1) - offsets
    return torch.where(entries >= 0, forward, backward)


def slots_at(block_table: Tensor, positions: Tensor, block_size: int) -> Tensor:
    """Slots of logical `positions` (N, S) of the sequences whose block-table rows are (N, M). int64 (N, S)."""
    positions = positions.long()
    entries = block_table.gather(1, positions // block_size)
    return slots_of(entries, positions % block_size, block_size)
