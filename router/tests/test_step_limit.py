"""How long steps with best-effort work may be."""

import math

import pytest

from bros_router.scheduling.step_limit import StepLimit

SHORTEST_S = 0.01


def limit_for(*slack_s: float, can_interrupt: bool = False) -> StepLimit:
    limit = StepLimit(can_interrupt=can_interrupt)
    for now_s, each_s in enumerate(slack_s):
        limit.note_arrival(float(now_s), each_s, tpot_s=1.0 + now_s)
    return limit


def test_without_real_time_requests_there_is_no_limit():
    assert StepLimit().seconds(0.0, SHORTEST_S) == math.inf
    limit = limit_for(0.4)
    assert limit.seconds(299.0, SHORTEST_S) < math.inf
    assert limit.seconds(301.0, SHORTEST_S) == math.inf


def test_it_grows_while_targets_are_met_and_falls_when_they_are_not_between_bounds():
    limit = limit_for(0.04, 0.4, 0.4, 4.0, 4.0, 4.0, 4.0)
    assert limit.seconds(7.0, SHORTEST_S) == pytest.approx(0.6 * 0.4)  # the lower quartile
    for _ in range(2000):
        limit.note_first_token(-0.1)
    assert limit.seconds(7.0, SHORTEST_S) == pytest.approx(0.7 * 4.0)  # the median
    for _ in range(20):
        limit.note_first_token(0.005)
    assert limit.seconds(7.0, SHORTEST_S) == pytest.approx(0.4 * 0.04)  # the least


def test_it_holds_where_six_in_a_thousand_miss():
    limit = limit_for(0.01, 0.4, 4.0, 4.0, 40.0)
    before_s = limit.seconds(5.0, SHORTEST_S)
    for _ in range(10):
        for late_by_s in [-0.1] * 170 + [0.001]:
            limit.note_first_token(late_by_s)
    assert limit.seconds(5.0, SHORTEST_S) == pytest.approx(before_s, rel=0.1)


def test_miss_that_no_shorter_step_would_have_prevented_changes_nothing():
    limit = limit_for(0.04, 0.4, 0.4, 4.0)
    before_s = limit.seconds(4.0, SHORTEST_S)
    limit.note_first_token(30.0)
    assert limit.seconds(4.0, SHORTEST_S) == before_s


def test_request_without_slack_counts_but_breaks_nothing():
    limit = limit_for(-1.0, -1.0)
    assert 0.0 < limit.seconds(2.0, SHORTEST_S) < 0.001
    limit.note_first_token(0.0001)
    assert limit.seconds(2.0, SHORTEST_S) > 0.0


def test_steps_that_can_be_interrupted_may_last_eight_of_the_shortest_and_most_of_a_time_per_token():
    limit = limit_for(0.1, 0.2, can_interrupt=True)
    assert limit.seconds(2.0, 0.02) == pytest.approx(8 * 0.02)
    assert limit.seconds(2.0, 0.2) == pytest.approx(0.7 * 1.0)  # of the least
    assert limit_for(10.0, 10.0, can_interrupt=True).seconds(2.0, 0.02) == pytest.approx(0.6 * 10.0)  # longer as it is
