"""`bros_shard.sampling.candidates`: what each filter keeps, and that few candidates tell when they are enough."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from transformers import TypicalLogitsWarper

from bros_shard.sampling.candidates import Candidates
from bros_shard.sampling.mass import masses_of, shift_to_zero, total_mass


def select(rows: list[list[float]], num_candidates: int | None = None) -> Candidates:
    shifted, _ = shift_to_zero(torch.tensor(rows))
    return Candidates.select(shifted, num_candidates or shifted.shape[1])


def select_probabilities(*probabilities: float) -> Candidates:
    return select([[math.log(probability) for probability in probabilities]])


def kept(candidates: Candidates, row: int = 0) -> list[int]:
    """Ids that have mass, ascending."""
    return sorted(candidates.token_ids[row, candidates.masses[row] > 0].tolist())


def numbers(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def nothing_below(candidates: Candidates) -> Tensor:
    return torch.zeros(len(candidates.logits), dtype=torch.float64)


def test_candidates_ascend_by_logit_and_then_by_id() -> None:
    candidates = select([[2.0, 1.0, 2.0, -math.inf, 1.0]])
    assert candidates.token_ids.tolist() == [[3, 1, 4, 0, 2]]
    assert candidates.logits.tolist() == [[-math.inf, -1.0, -1.0, 0.0, 0.0]]


@pytest.mark.parametrize(
    ("top_k", "expected"),
    [(1, [0]), (2, [0, 1, 3, 4]), (3, [0, 1, 3, 4]), (4, [0, 1, 3, 4]), (5, [0, 1, 2, 3, 4]), (6, [0, 1, 2, 3, 4, 5])],
)
def test_top_k_keeps_all_that_tie_with_the_kth(top_k: int, expected: list[int]) -> None:
    candidates = select([[3.0, 2.0, 1.0, 2.0, 2.0, 0.0]])
    assert kept(candidates.keep_top_k(torch.tensor([top_k]))) == expected


@pytest.mark.parametrize(
    ("top_p", "expected"),
    [
        (1.0, [0, 1, 2, 3]),
        (0.96, [0, 1, 2, 3]),  # the least likely has 0.05 > 1 - p
        (0.94, [0, 1, 2]),
        (0.75, [0, 1]),  # 0.05 and 0.2 are at most 0.25
        (0.51, [0, 1]),  # 0.5 is not at most 0.49
        (0.49, [0]),
        (1e-9, [0]),
        (1e-300, [0]),  # 1 - p rounds to 1; one token stays
    ],
)
def test_top_p_removes_ascending_while_cumulative_is_at_most_the_rest(top_p: float, expected: list[int]) -> None:
    candidates = select_probabilities(0.5, 0.3, 0.15, 0.05)
    assert kept(candidates.keep_top_p(numbers(top_p), nothing_below(candidates))) == expected


@pytest.mark.parametrize(("top_p", "expected"), [(0.75, [1, 2, 3]), (0.5, [2, 3]), (0.25, [3]), (0.1, [3])])
def test_top_p_cuts_through_ties_from_the_lowest_id(top_p: float, expected: list[int]) -> None:
    candidates = select([[1.0, 1.0, 1.0, 1.0]])
    assert kept(candidates.keep_top_p(numbers(top_p), nothing_below(candidates))) == expected


def test_top_p_counts_what_top_k_left() -> None:
    candidates = select_probabilities(0.4, 0.2, 0.2, 0.1, 0.1).keep_top_k(torch.tensor([2]))
    # Left are 0.5, 0.25 and 0.25; ascending, token 1 reaches 0.25 and token 2 reaches 0.5.
    assert kept(candidates.keep_top_p(numbers(0.7), nothing_below(candidates))) == [0, 2]


def test_typical_p_prefers_tokens_near_the_entropy_to_the_most_likely() -> None:
    # Entropy 2.055; surprise 0.916 of token 0 (distance 1.138) and 2.813 of the others (0.759).
    candidates = select_probabilities(0.4, *[0.06] * 10)
    assert kept(candidates.keep_typical(numbers(0.5))) == list(range(1, 11))
    assert kept(candidates.keep_typical(numbers(0.7))) == list(range(11))


def test_typical_p_includes_the_token_that_reaches_the_mass() -> None:
    # Entropy 1.142; distances 0.449, 0.062, 0.755, 1.854.
    candidates = select_probabilities(0.5, 0.3, 0.15, 0.05)
    for typical_p, expected in [(1e-300, [1]), (0.29, [1]), (0.31, [0, 1]), (0.81, [0, 1, 2]), (0.96, [0, 1, 2, 3])]:
        assert kept(candidates.keep_typical(numbers(typical_p))) == expected


def test_typical_p_is_reached_by_equality() -> None:
    # Entropy 1.213; distances 0.866, 0.866, 0.173, 0.520.
    masses = torch.tensor([[1.0, 1.0, 2.0, 4.0]]) * 2.0**30
    candidates = Candidates(masses.log() - masses.log().max(), torch.arange(4)[None], masses)
    for typical_p, expected in [(0.25, [2]), (0.26, [2, 3]), (0.75, [2, 3]), (0.76, [0, 1, 2, 3])]:
        assert kept(candidates.keep_typical(numbers(typical_p))) == expected


def test_typical_p_is_judged_on_what_is_left() -> None:
    candidates = select_probabilities(0.5, 0.3, 0.15, 0.05).keep_top_k(torch.tensor([2]))
    # Of 0.625 and 0.375 the entropy is 0.662; distances 0.192 and 0.319.
    assert kept(candidates.keep_typical(numbers(0.6))) == [0]


@pytest.mark.parametrize("typical_p", [0.1, 0.3, 0.5, 0.8, 0.95, 0.999])
def test_typical_p_keeps_what_transformers_keeps(typical_p: float) -> None:
    logits = torch.randn(20, 200, generator=torch.Generator().manual_seed(6)) * torch.linspace(0.2, 6.0, 20)[:, None]
    warped = TypicalLogitsWarper(mass=typical_p)(torch.zeros(20, 1), logits.double())
    candidates = select(logits.tolist()).keep_typical(numbers(*[typical_p] * 20))
    for row in range(20):
        # What is too unlikely to have mass is never kept.
        possible = (logits[row] - logits[row].max() > -23.0) & warped[row].isfinite()
        assert kept(candidates, row) == possible.nonzero()[:, 0].tolist()


def test_tokens_at_minus_infinity_never_have_mass() -> None:
    candidates = select([[-math.inf, 0.0, -math.inf, -1.0]])
    candidates = candidates.keep_top_k(torch.tensor([4])).keep_top_p(numbers(1.0), nothing_below(candidates))
    assert kept(candidates.keep_typical(numbers(1.0))) == [1, 3]


# Few distinct values, so that ties at the edge of the candidates are the rule.
tied_rows = st.lists(st.integers(-12, 0).map(lambda value: value / 2), min_size=4, max_size=40)


def keep_top_p_of_row(candidates: Candidates, row: list[float], top_p: float) -> Candidates:
    total = total_mass(masses_of(shift_to_zero(torch.tensor([row]))[0]))
    return candidates.keep_top_p(numbers(top_p), total - total_mass(candidates.masses))


@given(tied_rows, st.integers(1, 20), st.floats(0.01, 1.0))
def test_few_candidates_suffice_for_top_p_when_the_least_has_no_mass(
    row: list[float], num_candidates: int, top_p: float
) -> None:
    few = keep_top_p_of_row(select([row], min(num_candidates, len(row))), row, top_p)
    if few.is_least_massless.item():
        assert kept(few) == kept(keep_top_p_of_row(select([row]), row, top_p))


@given(tied_rows, st.integers(1, 20), st.integers(1, 20))
def test_few_candidates_suffice_for_top_k_when_the_least_has_no_mass(
    row: list[float], num_candidates: int, top_k: int
) -> None:
    num_candidates = min(num_candidates, len(row))
    few = select([row], num_candidates).keep_top_k(torch.tensor([min(top_k, num_candidates)]))
    if few.is_least_massless.item():
        assert kept(few) == kept(select([row]).keep_top_k(torch.tensor([min(top_k, len(row))])))


def test_few_candidates_do_suffice_for_a_steep_row_and_do_not_for_a_tie() -> None:
    steep, flat = [-float(token_id) for token_id in range(50)], [0.0] * 50
    for row, suffices in ((steep, True), (flat, False)):
        candidates = select([row], 10)
        assert keep_top_p_of_row(candidates, row, 0.9).is_least_massless.item() is suffices
        assert candidates.keep_top_k(torch.tensor([3])).is_least_massless.item() is suffices


def test_few_candidates_do_not_suffice_where_top_p_cuts_the_equals_of_the_least() -> None:
    row = [1.0] + [0.0] * 6
    # e / (e + 6) = 0.31, each other token 0.115: four of the six go, two of the three that are candidates stay.
    candidates = keep_top_p_of_row(select([row], 4), row, 0.5)
    assert [int(mass > 0) for mass in candidates.masses[0]] == [0, 1, 1, 1]
    assert not candidates.is_least_massless.item()
