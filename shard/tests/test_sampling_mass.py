"""`bros_shard.sampling.mass`: exact cumulative sums, and draws that never land on a choice without mass."""

from __future__ import annotations

import math
from itertools import accumulate

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from bros_shard.sampling.mass import cumulative_mass, draw, log_mass, masses_of, shift_to_zero, total_mass

ALMOST_ONE = 1.0 - 2.0**-53

# Whole numbers that float32 holds exactly, of every size that a mass can have.
mass = st.builds(lambda fraction, shift: fraction << shift, st.integers(0, 2**10), st.integers(0, 23))
mass_rows = st.lists(st.just(0) | mass, min_size=1, max_size=300).filter(any)


@given(mass_rows, st.floats(0.0, ALMOST_ONE))
def test_draw_inverts_the_cumulative_distribution(masses: list[int], uniform: float) -> None:
    index = int(draw(torch.tensor([masses], dtype=torch.float32), torch.tensor([uniform], dtype=torch.float64)))
    cumulative = list(accumulate(masses))
    target = uniform * cumulative[-1]
    below = cumulative[index - 1] if index else 0
    assert masses[index] > 0
    assert below <= target < cumulative[index]


@pytest.mark.parametrize("num_choices", [1, 2, 127, 128, 129, 1000])
@pytest.mark.parametrize("uniform", [0.0, 2.0**-53, 0.5, ALMOST_ONE])
def test_choices_without_mass_around_the_only_one_are_never_drawn(num_choices: int, uniform: float) -> None:
    for index in {0, num_choices // 2, num_choices - 1}:
        for only_mass in (1.0, 2.0**33):
            masses = torch.zeros(1, num_choices)
            masses[0, index] = only_mass
            assert draw(masses, torch.tensor([uniform], dtype=torch.float64)).tolist() == [index]


def test_extreme_uniforms_reach_the_first_and_the_last_choice() -> None:
    masses = torch.full((2, 100_003), 2.0**33)
    assert draw(masses, torch.tensor([0.0, ALMOST_ONE], dtype=torch.float64)).tolist() == [0, 100_002]


def test_masses_are_whole_and_vanish_below_the_smallest() -> None:
    logits = torch.linspace(0.0, -40.0, 10_001)
    masses = masses_of(logits)
    assert torch.equal(masses, masses.round())
    assert masses[0] == 2.0**33
    smallest = -34 * math.log(2.0)
    assert (masses[logits > smallest + 1e-3] > 0).all()
    assert (masses[logits < smallest - 1e-3] == 0).all()


def test_sums_of_a_million_tokens_are_exact() -> None:
    masses = torch.full((1, 2**20), 2.0**33)
    masses[0, 7] = 1.0
    expected = (2**20 - 1) * 2**33 + 1
    assert int(total_mass(masses)) == int(cumulative_mass(masses)[0, -1]) == expected


def test_log_mass_is_the_log_of_the_sum_of_exponentials() -> None:
    logits = torch.tensor([[0.0, -1.0, -2.5, -math.inf]])
    expected = math.log(1.0 + math.exp(-1.0) + math.exp(-2.5))
    assert log_mass(total_mass(masses_of(logits))).item() == pytest.approx(expected, abs=1e-8)


def test_rows_that_cannot_be_used_are_told_apart_and_drawn_in_range() -> None:
    inf, nan = math.inf, math.nan
    rows = [[1.0, 2.0, -inf], [1.0, nan, 3.0], [inf, 2.0, 1.0], [-inf, -inf, -inf], [nan, inf, -inf]]
    shifted, is_valid = shift_to_zero(torch.tensor(rows))
    assert is_valid.tolist() == [True, False, False, False, False]
    assert shifted[0].tolist() == [-1.0, 0.0, -inf]
    for uniform in (0.0, ALMOST_ONE):
        drawn = draw(masses_of(shifted), torch.full((5,), uniform, dtype=torch.float64))
        assert ((drawn >= 0) & (drawn < 3)).all()
