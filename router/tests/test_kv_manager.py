"""Who owns which slot: tables of what is asked and what comes back. `test_scheduler.py` has the properties."""

import pytest

from bros_router.kv.kv_manager import KVManager, Preemption
from bros_router.request import RequestClass
from bros_shard.block_layout import forward_entry, reversed_entry
from bros_shard.protocol import HostCopy, TailMove

RT, BE = RequestClass.RT, RequestClass.BE


@pytest.fixture
def kv():
    """Eight slots a block, and so little memory that tails share from the start."""
    kv = KVManager(num_blocks=4, block_size=8, num_host_blocks=3)
    kv.num_reserved_blocks = 4
    yield kv
    kv.check_integrity()


def grow(kv: KVManager, sequence_id: int, request_class: RequestClass, num_tokens: int) -> list[int]:
    """Grow as far as asked; returns the entries that are news to the ranks."""
    assert kv.shortfall(sequence_id, request_class, num_tokens) == 0
    kv.grow(sequence_id, request_class, num_tokens)
    kv.check_integrity()
    return kv.take_changes(sequence_id)[1]


def test_classes_grow_towards_each_other_while_there_is_room():
    kv = KVManager(num_blocks=4, block_size=8)
    assert grow(kv, 1, RT, 9) == [forward_entry(0), forward_entry(1)]
    assert grow(kv, 2, BE, 3) == [reversed_entry(3)]
    assert grow(kv, 3, RT, 1) == [forward_entry(2)]
    assert kv.num_shared_blocks == 0
    assert kv.num_free_blocks == 0


def test_tail_goes_beside_the_emptiest_tail_of_the_other_class_when_memory_is_short(kv):
    grow(kv, 1, RT, 5)
    grow(kv, 2, BE, 4)
    assert kv.num_shared_blocks == 0  # 5 + 4 does not fit 8
    assert grow(kv, 3, RT, 2) == [forward_entry(3)]  # beside sequence 2
    assert grow(kv, 4, BE, 1) == [reversed_entry(0)]  # beside sequence 1
    assert kv.num_shared_blocks == 2
    assert (kv.num_used_blocks(RT), kv.num_used_blocks(BE), kv.num_free_blocks) == (2, 0, 2)


def test_a_quarter_of_a_block_stays_between_two_tails_that_meet_anew(kv):
    grow(kv, 1, RT, 5)
    assert grow(kv, 2, BE, 2) == [reversed_entry(3)]  # 5 + 2 + 2 > 8
    assert grow(kv, 3, BE, 1) == [reversed_entry(0)]


def test_best_effort_tail_moves_when_the_real_time_one_meets_it(kv):
    grow(kv, 2, BE, 4)
    grow(kv, 1, RT, 2)
    grow(kv, 1, RT, 4)
    assert kv.take_copies().tail_moves == []
    assert grow(kv, 1, RT, 5) == []
    assert kv.take_changes(2) == (0, [reversed_entry(2)])
    assert kv.take_copies().tail_moves == [TailMove(reversed_entry(3), reversed_entry(2), 4)]
    assert kv.num_shared_blocks == 0


def test_best_effort_tail_moves_when_it_meets_the_real_time_one_itself(kv):
    grow(kv, 1, RT, 3)
    grow(kv, 2, BE, 3)
    assert grow(kv, 2, BE, 6) == [reversed_entry(3)]
    assert kv.take_copies().tail_moves == [TailMove(reversed_entry(0), reversed_entry(3), 3)]


def test_two_moves_of_a_tail_within_a_step_are_one(kv):
    grow(kv, 1, BE, 3)
    grow(kv, 2, RT, 3)
    grow(kv, 3, RT, 3)
    kv.take_copies()
    grow(kv, 2, RT, 6)  # sequence 1 leaves block 3 for a gap beside sequence 3, which then grows as well
    grow(kv, 3, RT, 6)
    moves = kv.take_copies().tail_moves
    assert len(moves) == 1
    assert (moves[0].source_entry, moves[0].num_tokens) == (reversed_entry(3), 3)
    assert moves[0].destination_entry == kv.take_changes(1)[1][0]


def test_nothing_moves_into_slots_that_a_tail_leaves_in_the_same_step(kv):
    grow(kv, 1, RT, 4)
    grow(kv, 2, BE, 2)
    grow(kv, 2, BE, 5)  # leaves block 0
    assert grow(kv, 3, BE, 1) == [reversed_entry(2)]
    kv.take_copies()
    assert grow(kv, 4, BE, 1) == [reversed_entry(0)]


def test_shortfall_counts_gaps_and_tails_that_must_leave(kv):
    grow(kv, 1, RT, 24)
    grow(kv, 2, BE, 4)
    assert kv.shortfall(3, RT, 2) == 0
    assert kv.shortfall(3, RT, 3) == 1
    grow(kv, 3, RT, 2)
    assert kv.shortfall(3, RT, 4) == 0
    assert kv.shortfall(3, RT, 5) == 1  # the tail of 2 has nowhere to go
    assert kv.shortfall(3, RT, 9) == 2
    kv.take_last_block(2, 4, is_saved=False)
    assert kv.shortfall(3, RT, 8) == 0


@pytest.mark.parametrize("preemption", [Preemption.BLOCK, Preemption.RECOMPUTE])
def test_classes_share_no_block_unless_told_to(preemption):
    kv = KVManager(num_blocks=2, block_size=8, preemption=preemption)
    kv.num_reserved_blocks = 2
    grow(kv, 1, RT, 1)
    grow(kv, 2, BE, 1)
    assert kv.num_shared_blocks == 0
    assert kv.shortfall(3, RT, 1) == 1


def test_newest_block_is_taken_first_and_only_what_was_computed_is_saved(kv):
    grow(kv, 1, BE, 20)
    assert kv.num_tokens_to_save(1, 18) == 2
    assert kv.take_last_block(1, 18, is_saved=True) == 16
    assert kv.num_tokens_to_save(1, 16) == 8
    assert kv.take_last_block(1, 16, is_saved=False) == 8
    assert kv.take_copies().out == [HostCopy(reversed_entry(1), 0, 2)]
    assert kv.num_owned_blocks(1) == 1


def test_what_was_saved_comes_back_in_order_up_to_the_first_gap(kv):
    grow(kv, 1, BE, 20)
    for num_computed_tokens in (20, 16):
        kv.take_last_block(1, num_computed_tokens, is_saved=True)
    kv.take_copies()
    assert kv.num_restorable_tokens(1, 8) == 12
    grow(kv, 2, RT, 8)
    grow(kv, 1, BE, 20)
    assert kv.restore(1, 8, 20) == 20
    assert kv.take_copies().in_ == [HostCopy(reversed_entry(2), 1, 8), HostCopy(reversed_entry(1), 0, 4)]


def test_block_with_a_copy_is_taken_at_no_cost_and_the_copy_is_used_again(kv):
    grow(kv, 1, BE, 16)
    assert kv.newest_unsaved_block(1, 16) == 1
    kv.checkpoint(1, 1)
    assert kv.newest_unsaved_block(1, 16) == 0
    assert kv.take_copies().out == [HostCopy(reversed_entry(2), 0, 8)]
    assert kv.num_tokens_to_save(1, 16) == 0
    kv.take_last_block(1, 16, is_saved=True)
    assert kv.take_copies().out == []
    assert kv.num_restorable_tokens(1, 8) == 8


def test_copy_that_is_spare_gives_way_to_one_that_is_needed(kv):
    grow(kv, 1, BE, 16)
    grow(kv, 2, BE, 16)
    kv.checkpoint(1, 0)
    kv.checkpoint(1, 1)
    kv.checkpoint(2, 0)
    kv.take_copies()
    assert not kv.has_unused_host_block
    kv.take_last_block(2, 16, is_saved=True)
    assert kv.take_copies().out == [HostCopy(reversed_entry(0), 0, 8)]  # was the copy of sequence 1's first block
    assert kv.newest_unsaved_block(1, 16) == 0


def test_without_a_host_block_nothing_is_saved():
    kv = KVManager(num_blocks=2, block_size=8, num_host_blocks=0)
    grow(kv, 1, BE, 16)
    assert kv.take_last_block(1, 16, is_saved=True) == 8
    assert kv.take_copies().out == []
    assert kv.num_restorable_tokens(1, 8) == 0


def test_tail_that_moves_and_is_taken_in_one_step_is_saved_from_where_it_was(kv):
    """Copies to the host come before moves."""
    grow(kv, 1, BE, 4)
    grow(kv, 2, RT, 2)
    kv.take_copies()
    grow(kv, 2, RT, 5)  # the tail of 1 moves from block 3 to block 2
    kv.take_last_block(1, 4, is_saved=True)
    copies = kv.take_copies()
    assert copies.out == [HostCopy(reversed_entry(3), 0, 4)]
    assert copies.tail_moves == []


def test_beside_a_running_step_only_what_it_does_not_know_of_is_free(kv):
    grow(kv, 1, RT, 8)
    grow(kv, 2, BE, 2)
    grow(kv, 3, RT, 2)  # beside sequence 2
    kv.take_copies()
    kv.step_planned()  # the step begins
    assert (kv.num_free_blocks, kv.num_shared_blocks) == (2, 1)
    kv.release(1)
    kv.release(3)
    with kv.beside_planned_steps(1):
        assert kv.num_free_blocks == 2
        assert kv.shortfall(4, RT, 24) == 1
        kv.grow(4, RT, 9)
    assert kv.take_changes(4)[1] == [forward_entry(1), forward_entry(2)]  # not the gap that sequence 3 left
    assert kv.num_free_blocks == 1
    kv.take_copies()
    kv.step_planned()
    with kv.beside_planned_steps(2):  # the first may still run
        assert kv.num_free_blocks == 0
    with kv.beside_planned_steps(1):
        kv.grow(5, RT, 8)
    assert kv.take_changes(5)[1] == [forward_entry(0)]


def test_beside_two_steps_nothing_is_free_that_the_second_copies_from(kv):
    """Its copies wait for the first one's end: what runs before that must not write over what they read."""
    grow(kv, 1, BE, 24)
    kv.take_copies()
    kv.step_planned()
    kv.take_last_block(1, 24, is_saved=True)
    assert kv.take_copies().out
    kv.step_planned()
    num_free = kv.num_free_blocks
    with kv.beside_planned_steps(2):
        assert kv.num_free_blocks == num_free - 1
    with kv.beside_planned_steps(1):
        assert kv.num_free_blocks == num_free


def test_beside_two_steps_nothing_is_free_that_a_tail_of_the_second_leaves(kv):
    grow(kv, 1, BE, 2)
    grow(kv, 2, RT, 24)
    grow(kv, 3, RT, 2)  # beside sequence 1
    kv.release(2)
    kv.take_copies()
    kv.step_planned()
    grow(kv, 3, RT, 7)  # the best-effort tail leaves
    kv.release(3)
    assert kv.take_copies().tail_moves
    kv.step_planned()
    num_free = kv.num_free_blocks
    with kv.beside_planned_steps(2):
        assert kv.num_free_blocks == num_free - 1


def test_release_gives_everything_back(kv):
    grow(kv, 1, BE, 20)
    grow(kv, 2, RT, 4)
    kv.take_last_block(1, 20, is_saved=True)
    kv.take_copies()
    kv.release(1)
    kv.release(2)
    kv.release(3)  # never owned anything
    assert kv.num_free_blocks == 4
    assert kv.num_free_host_blocks == 3
