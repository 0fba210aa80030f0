"""How long steps with best-effort work may be."""

import math

import pytest

from bros_router.scheduling.step_limit import StepLimit


def limit_for(*ttft_s: float) -> StepLimit:
    limit = StepLimit()
    for now_s, each_s in enumerate(ttft_s):
        limit.note_arrival(float(now_s), each_s)
    return limit


def test_without_real_time_requests_there_is_no_limit():
    assert StepLimit().seconds(0.0) == math.inf
    limit = limit_for(0.4)
    assert limit.seconds(299.0) < math.inf
    assert limit.seconds(301.0) == math.inf


def test_where_all_want_the_same_it_is_a_quarter_of_that_whatever_happens():
    limit = limit_for(0.4, 0.4, 0.4)
    for late_by_s in [-0.1] * 50 + [0.01] * 50:
        limit.note_first_token(late_by_s)
        assert limit.seconds(3.0) == pytest.approx(0.1)


def test_it_grows_to_the_median_while_targets_are_met_and_falls_to_the_shortest_when_they_are_not():
    limit = limit_for(0.04, 0.4, 0.4, 4.0, 4.0, 4.0, 4.0)
    assert limit.seconds(7.0) == pytest.approx(0.1)
    for _ in range(2000):
        limit.note_first_token(-0.1)
    assert limit.seconds(7.0) == pytest.approx(1.0)
    for _ in range(20):
        limit.note_first_token(0.005)
    assert limit.seconds(7.0) == pytest.approx(0.01)


def test_miss_that_no_shorter_step_would_have_prevented_changes_nothing():
    limit = limit_for(0.04, 0.4, 0.4, 4.0)
    before_s = limit.seconds(4.0)
    limit.note_first_token(30.0)
    assert limit.seconds(4.0) == before_s
