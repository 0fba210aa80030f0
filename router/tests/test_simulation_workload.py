"""Workloads: the stated distributions, and that each kind of randomness stands alone."""

import itertools
import random
import statistics

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bros_router.request import RequestClass
from bros_router.simulation.workload import (
    AZURE_CODE,
    AZURE_CONVERSATION,
    BE,
    LENGTHS,
    LMSYS,
    LONG_BE,
    LONG_CHAT,
    SHAREGPT,
    BatchDump,
    ClosedLoop,
    Gamma,
    Lengths,
    Poisson,
    Uniform,
    burst,
    fixed_targets,
    llm_d_wave,
    make_workload,
    no_targets,
    square_wave,
)


def draws(lengths, number=20_000):
    generator = random.Random(1)
    return [lengths.sample(generator) for _ in range(number)]


@pytest.mark.parametrize(
    ("lengths", "mean_prompt", "mean_output"),
    [
        (SHAREGPT, 161.31, 337.99),  # the vLLM paper's means
        (LMSYS, 69.4, 214.5),  # exp(3.52 + 1.2² / 2)
        (BE, 768, 80),
        (LONG_BE, 4544, 80),
    ],
)
def test_means_are_the_stated_ones(lengths, mean_prompt, mean_output):
    prompts, outputs = zip(*draws(lengths), strict=True)
    assert statistics.mean(prompts) == pytest.approx(mean_prompt, rel=0.05)
    assert statistics.mean(outputs) == pytest.approx(mean_output, rel=0.05)


@pytest.mark.parametrize(
    ("lengths", "median_prompt", "median_output"),
    [(LONG_CHAT, 1730, 415), (AZURE_CONVERSATION, 928, 41), (AZURE_CODE, 1929, 8)],
)
def test_medians_before_the_cut_are_those_of_the_fits(lengths, median_prompt, median_output):
    prompts, outputs = zip(*draws(Lengths("uncut", lengths.prompt, lengths.output, 10**9)), strict=True)
    assert statistics.median(prompts) == pytest.approx(median_prompt, rel=0.05)
    assert statistics.median(outputs) == pytest.approx(median_output, rel=0.07)


@pytest.mark.parametrize("lengths", LENGTHS.values(), ids=LENGTHS)
def test_no_request_is_longer_than_the_cut_or_empty(lengths):
    for limit in (lengths.max_total_tokens, 2 * lengths.max_total_tokens // 3):
        for num_prompt_tokens, num_output_tokens in draws(lengths.cut(limit), 500):
            assert num_prompt_tokens >= 1
            assert num_output_tokens >= 1
            assert num_prompt_tokens + num_output_tokens <= limit


def test_a_cut_never_lengthens():
    assert SHAREGPT.cut(10_000).max_total_tokens == SHAREGPT.max_total_tokens


def test_a_cut_that_leaves_nothing_is_an_error():
    with pytest.raises(ValueError, match="be has practically no requests of at most 100 tokens"):
        BE.cut(100).sample(random.Random(0))


def test_scale_makes_a_data_set_in_miniature():
    prompts, outputs = zip(*draws(BE.scaled(0.25)), strict=True)
    assert statistics.mean(prompts) == pytest.approx(192, rel=0.02)
    assert statistics.mean(outputs) == pytest.approx(20, rel=0.02)


processes = st.one_of(
    st.builds(Poisson, st.floats(0, 20)),
    st.builds(Gamma, st.floats(0, 20), st.sampled_from([0.5, 1, 2, 4])),
    st.builds(square_wave, st.floats(0, 20), st.floats(0.5, 50)),
    st.builds(burst, st.floats(0, 5), st.floats(0, 40)),
    st.builds(llm_d_wave, st.floats(0, 1)),
)


@given(processes, st.floats(0, 60), st.integers(0, 5))
def test_arrivals_ascend_and_keep_within_the_duration(process, duration_s, seed):
    times = list(process.times(duration_s, random.Random(seed)))
    assert times == sorted(times)
    assert all(0 <= time_s < duration_s for time_s in times)


def variation(times):
    gaps = [after - before for before, after in itertools.pairwise(times)]
    return statistics.pstdev(gaps) / statistics.mean(gaps)


@pytest.mark.parametrize(("process", "cv"), [(Poisson(10), 1), (Gamma(10, 2), 2), (Gamma(10, 4), 4)])
def test_rate_and_burstiness_are_as_asked(process, cv):
    times = list(process.times(20_000, random.Random(3)))
    assert len(times) / 20_000 == pytest.approx(10, rel=0.05)
    assert variation(times) == pytest.approx(cv, rel=0.05)


def count(times, start_s, stop_s):
    return sum(start_s <= time_s < stop_s for time_s in times)


def test_square_wave_keeps_the_mean_and_has_three_times_as_many_in_one_half():
    times = [time_s % 60 for time_s in square_wave(10).times(60_000, random.Random(3))]
    low, high = count(times, 0, 30), count(times, 30, 60)
    assert (low + high) / 60_000 == pytest.approx(10, rel=0.02)
    assert high / low == pytest.approx(3, rel=0.03)


def test_llm_d_wave_alternates_between_15_and_1_a_second():
    times = [time_s % 180 for time_s in llm_d_wave().times(18_000, random.Random(3))]
    assert count(times, 0, 90) / 9000 == pytest.approx(15, rel=0.02)
    assert count(times, 90, 180) / 9000 == pytest.approx(1, rel=0.06)


def test_burst_is_ten_times_the_rate_for_20_s_and_never_again():
    times = list(burst(100, 30).times(200, random.Random(3)))
    assert count(times, 0, 30) / 30 == pytest.approx(100, rel=0.05)
    assert count(times, 30, 50) / 20 == pytest.approx(1000, rel=0.05)
    assert count(times, 50, 200) / 150 == pytest.approx(100, rel=0.05)


def workload(seed=0, rate=5.0, rt_lengths=SHAREGPT, **how):
    how = {"be": ClosedLoop(4, BE), "duration_s": 60.0, "warm_up_s": 10.0} | how
    return make_workload(seed, arrivals=Poisson(rate), rt_lengths=rt_lengths, targets=fixed_targets(0.4, 0.2), **how)


def lengths_of(requests):
    return [(request.num_prompt_tokens, request.num_output_tokens) for request in requests]


def test_same_arguments_same_workload_and_another_seed_another():
    assert workload(7) == workload(7)
    assert workload(7).rt != workload(8).rt
    assert next(workload(7).be.draws()) != next(workload(8).be.draws())


def test_another_rate_keeps_the_lengths():
    slow, fast = workload(rate=2.0), workload(rate=8.0)
    assert len(fast.rt) > len(slow.rt)
    assert lengths_of(fast.rt)[: len(slow.rt)] == lengths_of(slow.rt)
    assert list(itertools.islice(fast.be.draws(), 9)) == list(itertools.islice(slow.be.draws(), 9))


def test_other_lengths_keep_the_arrivals():
    times = [[request.arrival_s for request in workload(rt_lengths=kind).rt] for kind in (SHAREGPT, LMSYS)]
    assert times[0] == times[1]


def test_a_closed_loop_starts_over_with_each_run():
    be = workload().be
    assert list(itertools.islice(be.draws(), 20)) == list(itertools.islice(be.draws(), 20))


def test_real_time_requests_carry_targets_and_end_with_the_window():
    drawn = workload()
    assert {request.request_class for request in drawn.rt} == {RequestClass.RT}
    assert {(request.ttft_s, request.tpot_s) for request in drawn.rt} == {(0.4, 0.2)}
    assert max(request.arrival_s for request in drawn.rt) < drawn.stop_s == 70.0


def test_the_run_lasts_as_long_as_anybody_may_meet_their_targets():
    drawn = workload()
    last_due_s = max(request.arrival_s + 0.4 + 0.2 * request.num_output_tokens for request in drawn.rt)
    assert drawn.end_s == pytest.approx(max(130.0, last_due_s))
    assert workload(drain_s=5.0).end_s == 75.0


def test_a_dump_is_many_requests_at_once_without_targets():
    kind = Lengths("kind", Uniform(10, 20), Uniform(1, 2), 100)
    drawn = workload(be=(BatchDump(30.0, 3, kind), BatchDump(5.0, 2, kind)))
    assert [request.arrival_s for request in drawn.be] == [5.0, 5.0, 30.0, 30.0, 30.0]
    assert {request.request_class for request in drawn.be} == {RequestClass.BE}
    assert all((request.ttft_s, request.tpot_s) == no_targets(1) for request in drawn.be)
