"""Records and summaries, against numbers worked out by hand."""

from array import array

import numpy as np
import pytest

from bros_router.request import RequestClass
from bros_router.simulation.record import Ending, RequestRecord, percentile, percentile_interval, summarise
from bros_router.simulation.workload import TraceRequest


def record(offered_s, tokens, ending=Ending.FINISHED, request_class=RequestClass.RT, ttft_s=0.4, tpot_s=0.2):
    targets = (ttft_s, tpot_s) if request_class is RequestClass.RT else (None, None)
    request = TraceRequest(offered_s, request_class, 10, max(1, len(tokens)), *targets)
    return RequestRecord(request, offered_s, ending, array("d", tokens))


def be(offered_s, tokens, ending=Ending.FINISHED):
    return record(offered_s, tokens, ending, RequestClass.BE)


def test_a_record_measures_from_when_the_request_should_have_been_sent():
    life = record(10.0, [10.5, 10.6, 11.1, 11.4])
    assert life.ttft_s == pytest.approx(0.5)
    assert life.tpot_s == pytest.approx(0.3)
    assert life.largest_gap_s == pytest.approx(0.5)
    assert life.normalised_latency_s == pytest.approx(1.4 / 4)


@pytest.mark.parametrize(
    ("tokens", "meets_ttft", "meets_tpot"),
    [
        ([0.4, 0.6, 0.8], True, True),
        ([0.41, 0.5], False, True),
        ([0.1, 0.2, 0.55], True, False),
        ([0.5, 0.8], False, False),
        ([0.3], True, True),  # nothing after the first token can be slow
    ],
)
def test_targets_are_met_or_missed_each_and_jointly(tokens, meets_ttft, meets_tpot):
    life = record(0.0, tokens)
    assert (life.meets_ttft, life.meets_tpot) == (meets_ttft, meets_tpot)
    assert life.meets_joint == (meets_ttft and meets_tpot)


@pytest.mark.parametrize("ending", [ending for ending in Ending if ending is not Ending.FINISHED])
def test_whatever_did_not_finish_is_a_miss(ending):
    for tokens in ([], [0.1], [0.1, 0.2]):
        life = record(0.0, tokens, ending)
        assert not (life.meets_ttft or life.meets_tpot or life.meets_joint)
        assert life.normalised_latency_s is None


def test_a_request_without_tokens_has_no_times():
    life = record(0.0, [], Ending.REJECTED)
    assert (life.ttft_s, life.tpot_s, life.largest_gap_s) == (None, None, None)


def test_summary_judges_what_was_offered_in_the_window():
    records = [
        record(9.9, [30.0]),  # offered before the window: counts only by the token that came in it
        record(10.0, [10.2, 10.3, 10.4]),
        record(15.0, [15.6, 15.7]),
        record(19.9, [20.1, 20.6]),  # ends after the window, and is judged all the same
        record(16.0, [], Ending.REJECTED),
        record(17.0, [17.1], Ending.UNFINISHED),
        record(20.0, [20.1]),  # offered after it
    ]
    records[2].was_relegated = True
    summary = summarise(records, 10.0, 20.0, end_s=40.0)
    assert summary.num_rt == 5
    assert summary.ttft_attainment == pytest.approx(2 / 5)
    assert summary.tpot_attainment == pytest.approx(2 / 5)
    assert summary.joint_attainment == pytest.approx(1 / 5)
    assert summary.rt_normalised_latency_s == pytest.approx((0.4 / 3 + 0.7 / 2 + 0.7 / 2) / 3)
    assert summary.rt_ttft_p50_s == pytest.approx(0.2)
    assert summary.rt_tbt_p99_s == pytest.approx(np.percentile([0.1, 0.1, 0.1, 0.5], 99))
    assert summary.rt_endings == {"finished": 3, "rejected": 1, "expired": 0, "failed": 0, "unfinished": 1}
    assert summary.num_rt_relegated == 1
    assert summary.rt_tokens_per_s == pytest.approx(6 / 10)


def test_best_effort_throughput_is_what_came_in_the_window():
    records = [
        be(0.0, [9.0, 10.0, 19.9, 20.0]),  # two of its tokens, and not its end
        be(5.0, [12.0, 13.0]),
        be(6.0, [], Ending.UNFINISHED),
    ]
    summary = summarise(records, 10.0, 20.0, end_s=25.0)
    assert summary.be_tokens_per_s == pytest.approx(4 / 10)
    assert summary.be_requests_per_s == pytest.approx(1 / 10)
    assert summary.be_largest_gap_s == pytest.approx(9.9)
    assert summary.be_longest_wait_s == pytest.approx(19.0)  # the last one got nothing until the end
    assert summary.joint_attainment is None


def test_a_best_effort_request_that_stalled_counts_until_the_end_of_the_run():
    summary = summarise([be(0.0, [1.0, 2.0], Ending.UNFINISHED)], 0.0, 10.0, end_s=50.0)
    assert summary.be_largest_gap_s == pytest.approx(48.0)


def test_nothing_gives_no_figures():
    summary = summarise([], 0.0, 1.0)
    assert summary.num_rt == 0
    assert summary.be_tokens_per_s == 0.0
    assert (summary.joint_attainment, summary.rt_ttft_p99_s, summary.be_largest_gap_s) == (None, None, None)
    assert percentile([], 50) is None
    assert percentile_interval([], 50) is None


def test_bootstrap_interval_covers_the_truth_about_as_often_as_it_says():
    generator = np.random.default_rng(0)
    hits = 0
    for seed in range(60):
        interval = percentile_interval(generator.exponential(size=200), 50, num_resamples=200, seed=seed)
        assert interval is not None
        hits += interval[0] <= np.log(2) <= interval[1]
    assert 50 <= hits <= 60  # 57 expected


def test_bootstrap_interval_is_reproducible():
    values = list(range(100))
    assert percentile_interval(values, 99, seed=5) == percentile_interval(values, 99, seed=5)
