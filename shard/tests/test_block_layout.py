"""Slot arithmetic of signed block tables."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bros_shard.block_layout import (
    block_of,
    forward_entry,
    is_reversed,
    num_blocks_for,
    reversed_entry,
    slot_of,
    slots_of,
)

block_sizes = st.sampled_from([16, 32, 64, 128, 256])


@given(st.integers(0, 10_000), block_sizes)
def test_each_direction_maps_a_block_onto_its_own_slots(block_id, block_size):
    own = list(range(block_id * block_size, (block_id + 1) * block_size))
    assert [slot_of(forward_entry(block_id), o, block_size) for o in range(block_size)] == own
    assert [slot_of(reversed_entry(block_id), o, block_size) for o in range(block_size)] == own[::-1]


@given(st.integers(0, 100), block_sizes, st.data())
def test_two_tails_of_a_block_are_disjoint_exactly_while_they_fit(block_id, block_size, data):
    num_forward = data.draw(st.integers(0, block_size))
    num_reversed = data.draw(st.integers(0, block_size))
    forward = {slot_of(forward_entry(block_id), o, block_size) for o in range(num_forward)}
    backward = {slot_of(reversed_entry(block_id), o, block_size) for o in range(num_reversed)}
    assert forward.isdisjoint(backward) == (num_forward + num_reversed <= block_size)


@given(st.integers(0, 10_000))
def test_entry_names_its_block_and_direction(block_id):
    assert block_of(forward_entry(block_id)) == block_of(reversed_entry(block_id)) == block_id
    assert not is_reversed(forward_entry(block_id))
    assert is_reversed(reversed_entry(block_id))


def test_slots_of_a_mixed_table_are_in_logical_order():
    assert slots_of([2, ~0], 1, 6, block_size=4) == [9, 10, 11, 3, 2]


@pytest.mark.parametrize(("num_tokens", "num_blocks"), [(0, 0), (1, 1), (16, 1), (17, 2), (32, 2)])
def test_num_blocks_for(num_tokens, num_blocks):
    assert num_blocks_for(num_tokens, 16) == num_blocks
