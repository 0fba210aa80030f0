"""Slot arithmetic of a signed block table: the one place that knows which slot a token lives in.

The KV region is `num_blocks` blocks of `block_size` slots; a slot holds the key and the value of one token.
A block can be filled from both ends at once: one sequence ascending, another descending. Which way a sequence
fills a block is a property of the *entry* in its block table, not of the sequence:

    entry >= 0   block `entry`, forward:   logical offset o of the block sits in slot  o
    entry <  0   block `~entry`, reversed: logical offset o of the block sits in slot  block_size - 1 - o

    block 7, block_size 8:    | a0 a1 a2 -- -- b2 b1 b0 |     a: entry 7 (3 tokens), b: entry ~7 (3 tokens)

Torch-free: the router imports this module, and `bros_kernels` states the same arithmetic on tensors.
"""

from __future__ import annotations

from collections.abc import Sequence


def forward_entry(block_id: int) -> int:
    """The block-table entry under which a sequence fills `block_id` from its low end."""
    assert block_id >= 0
    return block_id


def reversed_entry(block_id: int) -> int:
    """The block-table entry under which a sequence fills `block_id` from its high end."""
    assert block_id >= 0
    return ~block_id


def block_of(entry: int) -> int:
    """The block id that an entry of either direction names."""
    return entry if entry >= 0 else ~entry


def is_reversed(entry: int) -> bool:
    """Whether the entry's block is filled from its high end."""
    return entry < 0


def slot_of(entry: int, offset: int, block_size: int) -> int:
    """Index into the region's `num_blocks * block_size` slots of logical `offset` within the entry's block."""
    assert 0 <= offset < block_size
    if entry >= 0:
        return entry * block_size + offset
    return ~entry * block_size + block_size - 1 - offset


def slots_of(block_table: Sequence[int], start: int, stop: int, block_size: int) -> list[int]:
    """The slots of logical positions [start, stop) of a sequence, in logical order."""
    return [
        slot_of(block_table[position // block_size], position % block_size, block_size)
        for position in range(start, stop)
    ]


def num_blocks_for(num_tokens: int, block_size: int) -> int:
    """How many block-table entries `num_tokens` tokens need."""
    return -(-num_tokens // block_size)
