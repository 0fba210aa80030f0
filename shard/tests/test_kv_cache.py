"""What leaves the region for the host pool comes back in logical order, into a block of either direction."""

from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from bros_shard.block_layout import slot_of
from bros_shard.kv_cache import KVCache, block_bytes
from bros_shard.models.model import KVShape
from bros_shard.protocol import HostCopy, TailMove

SHAPE = KVShape(num_layers=2, num_kv_heads=3, head_dim=4)
BLOCK_SIZE = 16
CPU = torch.device("cpu")

entries = st.permutations(range(8)).flatmap(
    lambda blocks: st.tuples(*(st.sampled_from([block, ~block]) for block in blocks))
)


def make_cache() -> KVCache:
    cache = KVCache(SHAPE, 8, BLOCK_SIZE, 4, torch.float32, CPU)
    cache.region.normal_()
    return cache


def tokens(cache: KVCache, entry: int, num_tokens: int) -> torch.Tensor:
    slots = [slot_of(entry, offset, BLOCK_SIZE) for offset in range(num_tokens)]
    return cache.region.flatten(2, 3)[:, :, slots].clone()


@settings(deadline=None, max_examples=40)
@given(entries, st.lists(st.integers(1, BLOCK_SIZE), min_size=1, max_size=4), st.randoms())
def test_swapped_out_and_in_again(signed: tuple[int, ...], counts: list[int], random) -> None:  # type: ignore[no-untyped-def]
    cache = make_cache()
    sources, destinations = signed[: len(counts)], signed[4 : 4 + len(counts)]
    host_blocks = random.sample(range(4), len(counts))
    content = [tokens(cache, entry, count) for entry, count in zip(sources, counts, strict=True)]
    untouched = {entry: tokens(cache, entry, BLOCK_SIZE) for entry in signed[4 + len(counts) :]}
    cache.copy_out([HostCopy(*copy) for copy in zip(sources, host_blocks, counts, strict=True)])
    for host_block, expected, count in zip(host_blocks, content, counts, strict=True):
        assert torch.equal(cache.host_pool[:, :, host_block, :count], expected)
    cache.copy_in([HostCopy(*copy) for copy in zip(destinations, host_blocks, counts, strict=True)])
    for entry, expected, count in zip(destinations, content, counts, strict=True):
        assert torch.equal(tokens(cache, entry, count), expected)
    for entry, expected in untouched.items():
        assert torch.equal(tokens(cache, entry, BLOCK_SIZE), expected)


@given(entries, st.integers(1, BLOCK_SIZE), st.integers(1, BLOCK_SIZE))
def test_tail_moves_keep_content(signed: tuple[int, ...], first: int, second: int) -> None:
    cache = make_cache()
    expected = tokens(cache, signed[0], first), tokens(cache, signed[1], second)
    cache.move_tails([TailMove(signed[0], signed[2], first), TailMove(signed[1], signed[3], second)])
    assert torch.equal(tokens(cache, signed[2], first), expected[0])
    assert torch.equal(tokens(cache, signed[3], second), expected[1])


def test_sizes_and_layers() -> None:
    cache = KVCache(SHAPE, 8, BLOCK_SIZE, 4, torch.bfloat16, CPU)
    assert cache.region.shape == (2, 2, 8, BLOCK_SIZE, 3, 4)
    assert cache.host_pool.shape == (2, 2, 4, BLOCK_SIZE, 3, 4)
    assert not cache.region.any()
    assert not cache.host_pool.any()
    assert cache.region.nbytes == 8 * block_bytes(SHAPE, BLOCK_SIZE, torch.bfloat16)
    keys, values = cache.layers[1]
    assert keys.data_ptr() == cache.region[1, 0].data_ptr()
    assert values.data_ptr() == cache.region[1, 1].data_ptr()
