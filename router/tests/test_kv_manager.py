"""Block accounting: conservation, direction and order."""

from hypothesis import given
from hypothesis import strategies as st

from bros_router.kv.block_pool import BlockPool
from bros_router.kv.kv_manager import KVManager
from bros_router.request import RequestClass


@given(st.integers(1, 40), st.lists(st.sampled_from(["low", "high", "back"]), max_size=200), st.randoms())
def test_pool_gives_the_extreme_free_block_and_loses_none(num_blocks, operations, random):
    pool = BlockPool(num_blocks)
    free, taken = set(range(num_blocks)), []
    for operation in operations:
        if operation == "back" and taken:
            block_id = taken.pop(random.randrange(len(taken)))
            pool.give_back(block_id)
            free.add(block_id)
        elif operation != "back" and free:
            block_id = pool.take_lowest() if operation == "low" else pool.take_highest()
            assert block_id == (min(free) if operation == "low" else max(free))
            free.remove(block_id)
            taken.append(block_id)
        assert pool.num_free == len(free)
        assert {b for b in range(num_blocks) if pool.is_free(b)} == free


def test_table_changes_are_told_once():
    kv = KVManager(num_blocks=8, block_size=16)
    kv.grow(1, RequestClass.RT, num_tokens=20)
    assert kv.take_changes(1) == (0, [0, 1])
    assert kv.take_changes(1) == (2, [])
    kv.grow(1, RequestClass.RT, num_tokens=33)
    assert kv.take_changes(1) == (2, [2])
    kv.release(1)
    kv.grow(1, RequestClass.RT, num_tokens=1)
    assert kv.take_changes(1) == (0, [0])


def test_growing_within_the_last_block_takes_nothing():
    kv = KVManager(num_blocks=4, block_size=16)
    kv.grow(1, RequestClass.BE, num_tokens=1)
    assert kv.num_missing_blocks(1, 16) == 0
    assert kv.num_missing_blocks(1, 17) == 1
    kv.grow(1, RequestClass.BE, num_tokens=16)
    assert kv.num_free_blocks == 3
    assert kv.take_changes(1) == (0, [~3])


def test_release_of_an_unknown_sequence_is_nothing():
    kv = KVManager(num_blocks=4, block_size=16)
    kv.release(7)
    kv.check_integrity()
