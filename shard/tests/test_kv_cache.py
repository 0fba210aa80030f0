"""What leaves the region for the host pool comes back in logical order, into a block of either direction."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from bros_shard.block_layout import block_of, slot_of
from bros_shard.kv_cache import KVCache, block_bytes
from bros_shard.models.model import KVShape
from bros_shard.protocol import HostCopy, TailMove

SHAPE = KVShape(num_layers=2, num_kv_heads=3, head_dim=4)
BLOCK_SIZE = 16
CPU = torch.device("cpu")
DEVICES = (
    "cpu",
    pytest.param("cuda", marks=[pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA")]),
)

entries = st.permutations(range(8)).flatmap(
    lambda blocks: st.tuples(*(st.sampled_from([block, ~block]) for block in blocks))
)


def make_cache(device: str = "cpu") -> KVCache:
    cache = KVCache(SHAPE, 8, BLOCK_SIZE, 4, torch.float32, torch.device(device))
    cache.region.normal_()
    return cache


def tokens(cache: KVCache, entry: int, num_tokens: int) -> torch.Tensor:
    slots = [slot_of(entry, offset, BLOCK_SIZE) for offset in range(num_tokens)]
    return cache.region.flatten(2, 3)[:, :, slots].clone()


@pytest.mark.parametrize("device", DEVICES)
@settings(deadline=None, max_examples=40)
@given(signed=entries, counts=st.lists(st.integers(1, BLOCK_SIZE), min_size=1, max_size=4), random=st.randoms())
def test_swapped_out_and_in_again(device: str, signed: tuple[int, ...], counts: list[int], random) -> None:  # type: ignore[no-untyped-def]
    cache = make_cache(device)
    sources, destinations = signed[: len(counts)], signed[4 : 4 + len(counts)]
    host_blocks = random.sample(range(4), len(counts))
    content = [tokens(cache, entry, count) for entry, count in zip(sources, counts, strict=True)]
    untouched = {entry: tokens(cache, entry, BLOCK_SIZE) for entry in signed[4 + len(counts) :]}
    cache.host_pool.copy_out([HostCopy(*copy) for copy in zip(sources, host_blocks, counts, strict=True)])
    for entry in sources:  # whoever is given the block next
        cache.region[:, :, block_of(entry)] = 7.0
    cache.host_pool.copy_in([HostCopy(*copy) for copy in zip(destinations, host_blocks, counts, strict=True)])
    for entry, expected, count in zip(destinations, content, counts, strict=True):
        assert torch.equal(tokens(cache, entry, count), expected)
    for entry, expected in untouched.items():
        assert torch.equal(tokens(cache, entry, BLOCK_SIZE), expected)


@pytest.mark.parametrize("device", DEVICES)
def test_copies_are_ordered_against_the_steps_around_them(device: str) -> None:
    """Many more copies than staging buffers, each block overwritten at once and read back at once."""
    num_blocks = 300
    shape = KVShape(num_layers=2, num_kv_heads=8, head_dim=64)
    cache = KVCache(shape, num_blocks, 64, num_blocks, torch.bfloat16, torch.device(device))
    every = torch.arange(num_blocks, dtype=torch.bfloat16, device=device)[:, None, None, None]
    pairs = [(block if block % 2 else ~block, (block * 7) % num_blocks) for block in range(num_blocks)]
    for turn in range(3):
        cache.region[:] = every + turn
        cache.host_pool.copy_out([HostCopy(entry, host_block, 64) for entry, host_block in pairs])
        cache.region[:] = -1.0
        cache.host_pool.copy_in([HostCopy(~entry, host_block, 64) for entry, host_block in pairs])
        assert torch.equal(cache.region, (every + turn).expand_as(cache.region))


def test_host_pool_holds_tokens_in_logical_order() -> None:
    cache = make_cache()
    forward, backward = tokens(cache, 3, 5), tokens(cache, ~2, 9)
    cache.host_pool.copy_out([HostCopy(3, 1, 5), HostCopy(~2, 0, 9)])
    assert torch.equal(cache.host_pool.blocks[1, :, :, :5], forward)
    assert torch.equal(cache.host_pool.blocks[0, :, :, :9], backward)


def test_touching_writes_each_block_once() -> None:
    cache = make_cache()
    cache.touch(2)
    assert not cache.region[:, :, :2].any()
    assert cache.region[:, :, 2:].all()
    cache.region[:] = 1.0
    cache.touch(1)
    assert cache.region.all()
    cache.touch(9)  # more than there are
    assert cache.region[:, :, :2].all()
    assert not cache.region[:, :, 2:].any()


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
    assert cache.host_pool.blocks.shape == (4, 2, 2, BLOCK_SIZE, 3, 4)
    assert not cache.region.any()
    assert not cache.host_pool.blocks.any()
    assert cache.region.nbytes == 8 * block_bytes(SHAPE, BLOCK_SIZE, torch.bfloat16)
    keys, values = cache.layers[1]
    assert keys.data_ptr() == cache.region[1, 0].data_ptr()
    assert values.data_ptr() == cache.region[1, 1].data_ptr()
