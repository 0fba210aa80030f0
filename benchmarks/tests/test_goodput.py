"""The goodput search against servers whose goodput is known."""

import math

from hypothesis import given
from hypothesis import strategies as st

from bros_benchmarks.evaluation.goodput import GoodputSearch

RATIO = 1.1


def run(search: GoodputSearch, goodput: float, attainment_beyond: float = 0.5) -> list[float]:
    """Let the search find it; returns the rates that it tried."""
    rates = []
    while (rate := search.next_rate) is not None:
        rates.append(rate)
        assert len(rates) < 200
        search.record(1.0 if rate <= goodput else attainment_beyond)
    return rates


@given(goodput=st.floats(0.2, 50), first=st.floats(0.2, 50))
def test_it_finds_any_threshold_to_within_a_step_of_the_grid_and_tries_no_rate_twice(
    goodput: float, first: float
) -> None:
    search = GoodputSearch(first, RATIO, levels=(0.99,), lowest=0.1, highest=100)
    rates = run(search, goodput)
    assert goodput / RATIO < search.goodput(0.99) <= goodput
    assert len(rates) == len(set(rates))
    # Out in strides that double, then halving the last one.
    num_places = abs(math.log(goodput / first, RATIO)) + 4
    assert len(rates) <= 4 + 2 * math.log2(num_places)


@given(strict=st.floats(0.2, 50), factor=st.floats(1, 3))
def test_two_levels_share_what_was_tried(strict: float, factor: float) -> None:
    search = GoodputSearch(2.0, RATIO, lowest=0.05, highest=500)
    while (rate := search.next_rate) is not None:
        search.record(1.0 if rate <= strict else 0.95 if rate <= strict * factor else 0.0)
    assert strict / RATIO < search.goodput(0.99) <= strict
    assert strict * factor / RATIO < search.goodput(0.90) <= strict * factor


@given(results=st.lists(st.floats(0, 1), min_size=1))
def test_it_ends_whatever_the_noise_and_never_above_a_rate_that_failed(results: list[float]) -> None:
    search = GoodputSearch(1.0, RATIO, lowest=0.1, highest=10)
    noise = iter(results)
    while search.next_rate is not None:
        search.record(next(noise, 0.0))
        assert len(search.results) < 60
    for level in search.levels:
        failed = [search.rate_of(place) for place, attainment in search.results.items() if attainment < level]
        assert search.goodput(level) < min(failed, default=math.inf)


def test_a_server_that_always_fails_has_no_goodput_and_costs_few_runs() -> None:
    search = GoodputSearch(4.0, RATIO, lowest=1.0, highest=8.0)
    rates = run(search, goodput=0.0)
    assert search.goodput(0.99) == search.goodput(0.90) == 0.0
    assert min(rates) >= 1.0 and len(rates) < 8


def test_a_server_that_never_fails_is_tried_up_to_the_highest_rate() -> None:
    search = GoodputSearch(4.0, RATIO, lowest=1.0, highest=8.0)
    rates = run(search, goodput=math.inf)
    assert 8.0 / RATIO < search.goodput(0.99) == max(rates) <= 8.0
