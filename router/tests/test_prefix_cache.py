"""Full blocks are found by what they hold, read by many, and given up in the right order."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bros_router.kv.block_hasher import BlockHasher
from bros_router.kv.kv_manager import KVManager
from bros_router.kv.prefix_cache import PrefixCache
from bros_router.request import RequestClass
from bros_shard.block_layout import forward_entry, reversed_entry

RT, BE = RequestClass.RT, RequestClass.BE


def hashes_of(prompt, output=(), *, block_size=4, salt=b"salt", variant=""):
    hashes = []
    BlockHasher(block_size, salt).extend(hashes, prompt, output, variant)
    return hashes


# --- hashes


@given(st.lists(st.integers(0, 2**31 - 1), max_size=40), st.data())
def test_hashes_are_of_the_tokens_however_they_came(tokens, data):
    num_prompt_tokens = data.draw(st.integers(0, len(tokens)))
    known = data.draw(st.integers(num_prompt_tokens, len(tokens)))
    whole = hashes_of(tokens)
    assert len(whole) == len(tokens) // 4
    grown = []
    hasher = BlockHasher(4, b"salt")
    for end in (num_prompt_tokens, known, len(tokens)):
        hasher.extend(grown, tokens[:num_prompt_tokens], tokens[num_prompt_tokens:end])
    assert grown == whole


def test_a_hash_covers_all_that_comes_before_the_salt_and_the_variant():
    whole = hashes_of(range(12))
    assert whole[:2] == hashes_of([*range(8), 99, 10, 11, 12])[:2]
    assert len({*whole, *hashes_of([99, *range(1, 12)])}) == 6
    assert len({*whole, *hashes_of(range(12), salt=b"other"), *hashes_of(range(12), variant="adapter")}) == 9


# --- what is given up


def fill(cache, block_id, request_class=BE, plan_number=0):
    cache.put(bytes([block_id]), forward_entry(block_id), plan_number, request_class)
    return cache.of(block_id)


def test_what_was_let_go_longest_ago_is_given_up_first():
    cache = PrefixCache(8)
    blocks = [fill(cache, block_id) for block_id in range(3)]
    for block in (blocks[1], blocks[0], blocks[2]):
        cache.let_go(block, BE)
    cache.hold(blocks[1], BE)
    cache.let_go(blocks[1], BE)
    assert [cache.give_up() for _ in range(3)] == [0, 2, 1]
    assert cache.num_idle == 0
    assert cache.find([bytes([0])], 0, before_plan=1) == []


def test_real_time_blocks_outlive_a_region_of_best_effort_ones_and_no_more():
    cache = PrefixCache(4)
    cache.let_go(fill(cache, 0, RT), RT)
    given_up = []
    for block_id in range(1, 8):
        cache.let_go(fill(cache, block_id), BE)
        if cache.num_idle == 3:
            given_up.append(cache.give_up())
    assert given_up == [1, 2, 3, 0, 4, 5]


def test_block_with_users_is_never_given_up():
    cache = PrefixCache(8)
    block = fill(cache, 0)
    cache.hold(block, RT)
    cache.let_go(block, BE)
    assert cache.num_idle == 0
    cache.let_go(block, RT)
    assert cache.num_idle == 1


# --- blocks of sequences


@pytest.fixture
def kv():
    """Four blocks of eight slots."""
    return KVManager(4, 8)


PROMPT = list(range(30))
HASHES = hashes_of(PROMPT, block_size=8)


def compute(kv, sequence_id, request_class, num_tokens, hashes=HASHES):
    """A step computes the first tokens of a sequence."""
    kv.grow(sequence_id, request_class, num_tokens)
    kv.step_planned()
    kv.publish(sequence_id, hashes, num_tokens)


def test_full_blocks_of_one_class_are_read_by_the_other_under_the_entries_of_the_first(kv):
    compute(kv, 1, BE, 20)
    kv.take_changes(1)
    assert kv.num_cached_tokens(HASHES) == 16
    assert kv.attach(2, RT, HASHES) == 16
    assert kv.take_changes(2) == (0, [reversed_entry(3), reversed_entry(2)])
    assert (kv.num_used_blocks(RT), kv.num_used_blocks(BE), kv.num_free_blocks) == (2, 1, 1)
    kv.check_integrity()
    kv.release(1)
    assert (kv.num_used_blocks(RT), kv.num_used_blocks(BE), kv.num_free_blocks) == (2, 0, 2)
    kv.release(2)
    kv.check_integrity()
    assert (kv.num_free_blocks, kv.num_idle_blocks) == (4, 2)
    assert kv.attach(3, BE, HASHES) == 16


def test_only_what_is_computed_and_follows_without_a_gap_is_read(kv):
    compute(kv, 1, RT, 24)
    kv.step_planned()
    other = hashes_of([*PROMPT[:8], *range(100, 122)], block_size=8)
    assert kv.attach(2, RT, other) == 8
    assert kv.attach(3, RT, hashes_of([1, *PROMPT[1:]], block_size=8)) == 0
    kv.check_integrity()


def test_free_memory_is_taken_before_what_may_be_asked_for_again(kv):
    compute(kv, 1, RT, 16)
    kv.step_planned()
    kv.release(1)
    kv.grow(2, RT, 16)
    assert kv.num_cached_tokens(HASHES) == 16
    kv.grow(2, RT, 17)  # the last block of the prefix goes first
    assert kv.num_cached_tokens(HASHES) == 8
    kv.grow(2, RT, 32)
    assert kv.num_cached_tokens(HASHES) == 0
    assert kv.shortfall(3, RT, 1) == 1
    kv.check_integrity()


def test_blocks_that_others_read_are_there_to_take_only_from_all_of_them(kv):
    compute(kv, 1, BE, 24)
    kv.step_planned()
    assert kv.num_own_blocks(1) == 3
    kv.attach(2, RT, HASHES[:2])
    assert (kv.num_own_blocks(1), kv.num_own_blocks(2)) == (1, 0)
    assert [kv.num_blocks_freed(ids) for ids in ([1], [2], [1, 2])] == [1, 0, 3]


def test_what_a_sequence_gave_up_is_attached_again_as_long_as_it_is_there(kv):
    compute(kv, 1, BE, 24)
    kv.step_planned()
    assert kv.take_last_block(1, 24, is_saved=False) == 16
    assert kv.take_last_block(1, 16, is_saved=False) == 8
    assert kv.attach(1, BE, HASHES[:2]) == 16
    kv.step_planned()
    kv.check_integrity()
    assert kv.take_changes(1)[1][:2] == [reversed_entry(3), reversed_entry(2)]


def test_who_is_not_added_after_all_has_what_it_had(kv):
    compute(kv, 1, BE, 16)
    kv.step_planned()
    kv.attach(2, RT, HASHES)
    kv.detach(2, 0)
    assert (kv.num_owned_blocks(2), kv.num_used_blocks(RT), kv.num_used_blocks(BE)) == (0, 0, 2)
    kv.check_integrity()


def test_what_a_faulty_sequence_computed_is_read_by_nobody_else(kv):
    compute(kv, 1, BE, 16)
    kv.step_planned()
    kv.release(1, is_sound=False)
    assert kv.num_cached_tokens(HASHES) == 0
    assert (kv.num_free_blocks, kv.num_idle_blocks) == (4, 0)
    kv.check_integrity()


def test_nothing_is_left_when_the_region_is_lost(kv):
    compute(kv, 1, BE, 16)
    kv.step_planned()
    kv.release(1)
    kv.forget_cached()
    assert kv.num_cached_tokens(HASHES) == 0
    assert (kv.num_free_blocks, kv.num_idle_blocks) == (4, 0)
    kv.check_integrity()


def test_interruption_reads_only_what_was_computed_before_the_steps_beside_it_and_overwrites_nothing_they_read(kv):
    compute(kv, 1, RT, 8)
    compute(kv, 2, BE, 8, hashes_of(range(50, 58), block_size=8))
    kv.release(2)
    with kv.beside_planned_steps(1):
        assert kv.num_cached_tokens(HASHES) == 8
        assert (kv.num_free_blocks, kv.num_idle_blocks) == (2, 0)
    with kv.beside_planned_steps(2):
        assert kv.num_cached_tokens(HASHES) == 0
    assert kv.num_free_blocks == 3
    kv.publish(1, HASHES, 8, is_interruption=True)
    kv.check_integrity()


def test_what_an_interruption_computes_is_read_from_the_next_plan_on(kv):
    kv.step_planned()
    with kv.beside_planned_steps(1):
        kv.grow(1, RT, 8)
    kv.publish(1, HASHES, 8, is_interruption=True)
    with kv.beside_planned_steps(1):
        assert kv.num_cached_tokens(HASHES) == 0
    kv.step_planned()
    assert kv.num_cached_tokens(HASHES) == 8
