"""The bound on best-effort throughput, and the charge for real-time work left undone."""

from array import array
from dataclasses import astuple

import pytest

from bros_benchmarks.evaluation.bound import Ceiling, Slopes, mixed_step, slopes_at
from bros_benchmarks.evaluation.region_bound import RegionBound
from bros_benchmarks.evaluation.work import Work, done_work, offered_work
from bros_router.request import RequestClass
from bros_router.simulation.hardware import HARDWARE
from bros_router.simulation.record import Ending, RequestRecord
from bros_router.simulation.workload import TraceRequest
from bros_shard.protocol import StepShape


def record(offered_s: float, token_s: list[float], num_output: int = 4, *, is_rt: bool = True) -> RequestRecord:
    request_class = RequestClass.RT if is_rt else RequestClass.BE
    ending = Ending.FINISHED if len(token_s) == num_output else Ending.UNFINISHED
    return RequestRecord(
        TraceRequest(offered_s, request_class, 100, num_output), offered_s, ending, array("d", token_s)
    )


def test_a_request_that_runs_within_the_window_is_as_much_work_done_as_offered() -> None:
    records = [record(1.0, [2.0, 3.0, 4.0, 5.0])]
    offered = offered_work(records, 0.0, 10.0)
    assert astuple(offered) == pytest.approx(astuple(done_work(records, 0.0, 10.0)))
    # A prompt of 100, then three decodes over 101, 102 and 103 tokens; in 10 seconds.
    assert astuple(offered) == pytest.approx((10.0, 500.0, 0.3, 30.6))


def test_windows_side_by_side_add_up() -> None:
    records = [record(1.0, [2.0, 3.0, 6.0, 7.0]), record(4.0, [8.0, 9.0])]
    parts = done_work(records, 0.0, 5.0) * 5.0 + done_work(records, 5.0, 10.0) * 5.0
    assert astuple(parts) == pytest.approx(astuple(done_work(records, 0.0, 10.0) * 10.0))


def test_best_effort_work_and_what_lies_outside_count_nothing() -> None:
    records = [record(1.0, [2.0], is_rt=False), record(11.0, [12.0])]
    assert offered_work(records, 0.0, 10.0) == done_work(records, 0.0, 10.0) == Work()


def test_a_rejected_request_is_missing_in_full() -> None:
    rejected = RequestRecord(TraceRequest(1.0, RequestClass.RT, 100, 4), 1.0, Ending.REJECTED)
    missing = offered_work([rejected], 0.0, 10.0) - done_work([rejected], 0.0, 10.0)
    assert astuple(missing) == pytest.approx((10.0, 500.0, 0.3, 30.6))


OPT = HARDWARE["opt-13b"]


def region_bound(**changes: float) -> RegionBound:
    values = {"num_kv_tokens": OPT.num_kv_tokens, "longest_step_s": 0.2, **changes}
    return RegionBound(OPT, be_lengths=(768.0, 80.0), **values)  # type: ignore[arg-type]


def test_without_real_time_work_a_region_bounds_by_what_fits_in_it() -> None:
    # One sequence at a time, 808 tokens on average: its prompt and 80 steps.
    alone_s = OPT.seconds(StepShape().with_sequence(0, 768)) + 79 * OPT.seconds(StepShape().with_sequence(808, 1))
    assert region_bound(num_kv_tokens=808).tokens_per_s(Work()) == pytest.approx(80 / alone_s, rel=0.25)
    assert region_bound(num_kv_tokens=0).tokens_per_s(Work()) == 0.0
    # In a region without end, the time that a token takes when what every step costs is shared by many.
    large = region_bound(num_kv_tokens=10**7, longest_step_s=20.0).tokens_per_s(Work())
    step = StepShape(9600, 1, 1000, 9600 * 384, 1000 * 808)
    assert large == pytest.approx(1000 / OPT.seconds(step), rel=0.02)


def test_the_bound_of_time_and_memory_is_a_share_of_what_best_effort_work_has_alone() -> None:
    ceiling = Ceiling(500.0, Slopes(0.0, 0.0, 0.0, 0.0), region_bound())
    assert ceiling.region_bound(Work()) == pytest.approx(500.0)
    work = Work(decodes=1000.0, decode_context=350_000.0)
    share = region_bound().tokens_per_s(work) / region_bound().tokens_per_s(Work())
    assert ceiling.region_bound(work) == pytest.approx(500.0 * share)
    assert Ceiling(500.0, Slopes(0.0, 0.0, 0.0, 0.0)).region_bound(work) is None


def test_real_time_work_takes_memory_the_more_the_longer_steps_are() -> None:
    light, heavy = (Work(decodes=count, decode_context=350 * count) for count in (100.0, 2500.0))
    alone, beside_light, beside_heavy = (region_bound().tokens_per_s(work) for work in (Work(), light, heavy))
    assert alone > beside_light > beside_heavy > 0.0
    assert region_bound(num_kv_tokens=10_000).tokens_per_s(heavy) < 0.5 * beside_heavy
    assert region_bound(longest_step_s=0.012).tokens_per_s(heavy) <= beside_heavy


def test_the_bound_is_what_real_time_work_leaves_and_the_charge_is_the_same_coin() -> None:
    ceiling = Ceiling(1000.0, Slopes(0.001, 0.0, 0.002, 0.0))
    work = Work(prefill_tokens=100.0, decodes=100.0)  # 0.1 + 0.2 of the device
    assert ceiling.bound(work) == pytest.approx(700.0)
    assert ceiling.bound(work * 10) == 0.0
    # Who does none of that work and gives all to best effort has gained nothing.
    assert ceiling.charged(1000.0, work) == pytest.approx(ceiling.bound(work))


def test_slopes_are_those_of_the_step_time_where_it_is_linear() -> None:
    hardware = HARDWARE["opt-13b"]
    base = mixed_step(600.0, 41.0, 800.0)
    assert (base.num_prefill_tokens, base.num_decode_sequences) == (560, 40)
    slopes = slopes_at(hardware, base)
    more = StepShape(
        num_prefill_tokens=560 + 32,
        num_prefill_sequences=1,
        num_decode_sequences=40 + 8,
        prefill_attention=base.prefill_attention + 5e4,
        decode_context_tokens=base.decode_context_tokens + 6400,
    )
    added_s = slopes.seconds(Work(32, 5e4, 8, 6400))
    assert hardware.seconds(more) - hardware.seconds(base) == pytest.approx(added_s, rel=0.02)
