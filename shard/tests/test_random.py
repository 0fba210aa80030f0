"""`bros_shard.sampling.random`: the published vectors of Philox4x32-10, and uniforms that depend on nothing else."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from bros_shard.sampling.random import philox4x32, uniforms

# Random123, tests/kat_vectors, "philox4x32 10": counter, key, expected.
KNOWN_ANSWERS = [
    (
        (0x00000000, 0x00000000, 0x00000000, 0x00000000),
        (0x00000000, 0x00000000),
        (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8),
    ),
    (
        (0xFFFFFFFF, 0xFFFFFFFF, 0xFFFFFFFF, 0xFFFFFFFF),
        (0xFFFFFFFF, 0xFFFFFFFF),
        (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD),
    ),
    (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xA4093822, 0x299F31D0),
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
]

seeds_64 = st.integers(0, 2**64 - 1)
positions_31 = st.integers(0, 2**31 - 1)


def test_philox_gives_the_published_words() -> None:
    counters = torch.tensor([counter for counter, _, _ in KNOWN_ANSWERS]).T
    keys = torch.tensor([key for _, key, _ in KNOWN_ANSWERS]).T
    assert philox4x32(counters, keys).T.tolist() == [list(words) for _, _, words in KNOWN_ANSWERS]


def test_uniform_is_made_of_the_first_two_words() -> None:
    (number,) = uniforms([0], torch.tensor([0])).tolist()
    assert number == ((0x6627E8D5 << 21) + (0xE169C58D >> 11)) / 2**53


def plain_philox(counter: list[int], key: list[int]) -> list[int]:
    for _ in range(10):
        first, second = counter[0] * 0xD2511F53, counter[2] * 0xCD9E8D57
        mask = 0xFFFFFFFF
        counter = [second >> 32 ^ counter[1] ^ key[0], second & mask, first >> 32 ^ counter[3] ^ key[1], first & mask]
        key = [(key[0] + 0x9E3779B9) & mask, (key[1] + 0xBB67AE85) & mask]
    return counter


@given(st.lists(st.tuples(seeds_64, positions_31), min_size=1, max_size=8))
def test_uniforms_are_keyed_by_seed_and_counted_by_position(pairs: list[tuple[int, int]]) -> None:
    numbers = uniforms([seed for seed, _ in pairs], torch.tensor([position for _, position in pairs])).tolist()
    for (seed, position), number in zip(pairs, numbers, strict=True):
        words = plain_philox([position, 0, 0, 0], [seed % 2**32, seed >> 32])
        assert number == ((words[0] << 21) + (words[1] >> 11)) / 2**53
        assert 0.0 <= number < 1.0


def test_uniforms_fill_the_interval_evenly() -> None:
    numbers = uniforms([12345] * 10_000, torch.arange(10_000))
    counts = torch.histc(numbers, bins=20, min=0.0, max=1.0)
    chi_square = ((counts - 500) ** 2 / 500).sum().item()
    assert chi_square < 43.8  # 0.999 quantile, 19 degrees of freedom


def test_seeds_beyond_64_bits_wrap() -> None:
    position = torch.tensor([7])
    assert uniforms([2**64 + 5], position).item() == pytest.approx(uniforms([5], position).item(), abs=0.0)
