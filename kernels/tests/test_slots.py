"""Slot arithmetic: every logical position has one slot, and the two ends of a block meet only when it is full."""

from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st

from bros_kernels.slots import slots_at, slots_of

block_sizes = st.sampled_from([16, 32, 64, 128, 256])


def test_slots_of_both_directions() -> None:
    entries = torch.tensor([0, 3, ~0, ~3], dtype=torch.int32)[:, None]
    offsets = torch.tensor([0, 1, 15])
    assert slots_of(entries, offsets, 16).tolist() == [[0, 1, 15], [48, 49, 63], [15, 14, 0], [63, 62, 48]]


def test_slots_at_walks_a_mixed_block_table() -> None:
    table = torch.tensor([[2, ~5], [~1, 7]], dtype=torch.int32)
    positions = torch.tensor([[0, 15, 16, 18], [0, 1, 16, 31]])
    assert slots_at(table, positions, 16).tolist() == [[32, 47, 95, 93], [31, 30, 112, 127]]


@given(block_sizes, st.integers(0, 2**20))
def test_either_direction_fills_exactly_its_block(block_size: int, block: int) -> None:
    offsets = torch.arange(block_size)
    slots = list(range(block * block_size, (block + 1) * block_size))
    assert slots_of(torch.tensor(block), offsets, block_size).tolist() == slots
    assert slots_of(torch.tensor(~block), offsets, block_size).tolist() == slots[::-1]


@given(block_sizes, st.data())
def test_two_tails_overlap_only_beyond_the_block(block_size: int, data: st.DataObject) -> None:
    num_forward = data.draw(st.integers(1, block_size))
    num_reversed = data.draw(st.integers(1, block_size))
    forward = set(slots_of(torch.tensor(4), torch.arange(num_forward), block_size).tolist())
    backward = set(slots_of(torch.tensor(~4), torch.arange(num_reversed), block_size).tolist())
    assert forward.isdisjoint(backward) == (num_forward + num_reversed <= block_size)
