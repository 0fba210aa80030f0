"""The free blocks of the region, from both ends."""

from hypothesis import given
from hypothesis import strategies as st

from bros_router.kv.block_pool import BlockPool


@given(st.integers(1, 40), st.lists(st.sampled_from(["low", "high", "any", "back"]), max_size=200), st.randoms())
def test_pool_gives_the_extreme_free_block_and_loses_none(num_blocks, operations, random):
    pool = BlockPool(num_blocks)
    free, taken = set(range(num_blocks)), []
    for operation in operations:
        if operation == "back" and taken:
            block_id = taken.pop(random.randrange(len(taken)))
            pool.give_back(block_id)
            free.add(block_id)
        elif operation == "any" and free:
            block_id = random.choice(sorted(free))
            pool.take(block_id)
            free.remove(block_id)
            taken.append(block_id)
        elif operation in ("low", "high") and free:
            block_id = pool.take_lowest() if operation == "low" else pool.take_highest()
            assert block_id == (min(free) if operation == "low" else max(free))
            free.remove(block_id)
            taken.append(block_id)
        assert pool.num_free == len(free)
        assert {b for b in range(num_blocks) if pool.is_free(b)} == free
