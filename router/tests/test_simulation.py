"""The simulator: by hand where it can be worked out, by laws that hold whatever the policy, and against itself."""

import itertools
import subprocess
import sys
from collections import Counter
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bros_router.admission import AdmissionPolicy
from bros_router.request import RequestClass
from bros_router.scheduling.policies.registry import POLICY_NAMES
from bros_router.scheduling.step_draft import SchedulerLimits
from bros_router.simulation.hardware import HARDWARE, Noisy, profile
from bros_router.simulation.record import Ending
from bros_router.simulation.replica import Timing
from bros_router.simulation.simulator import Alone, Setup, make_replica, run, simulate
from bros_router.simulation.workload import (
    BE,
    ClosedLoop,
    Lengths,
    Poisson,
    TraceRequest,
    Uniform,
    Workload,
    fixed_targets,
    make_workload,
)
from bros_shard.protocol import StepShape

SHORT = Lengths("short", Uniform(1, 60), Uniform(1, 12), 100)


class Metronome:
    """Every step takes 10 ms."""

    name = "metronome"
    num_kv_tokens = 4096
    num_host_tokens = 4096
    max_length = 1024
    copies_overlap = True
    can_interrupt = False

    def seconds(self, shape):
        return 0.010


def rt(arrival_s, num_prompt_tokens, num_output_tokens):
    return TraceRequest(arrival_s, RequestClass.RT, num_prompt_tokens, num_output_tokens, 1.0, 1.0)


def be(arrival_s, num_prompt_tokens, num_output_tokens):
    return TraceRequest(arrival_s, RequestClass.BE, num_prompt_tokens, num_output_tokens)


def trace(*requests, be=(), duration_s=60.0):
    return Workload(requests, be, duration_s, warm_up_s=0.0)


def tokens_of(workload, setup, hardware=None):
    return [list(record.token_s) for record in simulate(workload, setup, hardware or Metronome()).records]


ONE_STEP = Setup(policy="fcfs", timing=Timing(max_steps_in_flight=1, send_s=0.001, return_s=0.0005))
TWO_STEPS = replace(ONE_STEP, timing=Timing(max_steps_in_flight=2, send_s=0.001, return_s=0.0005))


def test_one_step_in_flight_pays_the_way_to_the_ranks_and_back_each_time():
    """Sent at 1.000, on the ranks at 1.001, done at 1.011, a token at 1.0115; and the next step is sent then."""
    (tokens,) = tokens_of(trace(rt(1.0, 5, 3)), ONE_STEP)
    assert tokens == pytest.approx([1.0115, 1.0230, 1.0345])


def test_two_steps_in_flight_leave_no_gap_between_steps():
    """The ranks work from 1.001 on: a step ends every 10 ms."""
    (tokens,) = tokens_of(trace(rt(1.0, 5, 4)), TWO_STEPS)
    assert tokens == pytest.approx([1.0115, 1.0215, 1.0315, 1.0415])


def test_a_request_that_comes_during_a_step_joins_the_next_one_that_is_planned():
    """The first step runs from 1.001 to 1.011 and the second is planned some 3 ms before that."""
    early, late = (tokens_of(trace(rt(1.0, 5, 9), rt(at_s, 5, 1)), TWO_STEPS)[1] for at_s in (1.002, 1.0105))
    assert early == pytest.approx([1.0215])
    assert late == pytest.approx([1.0315])


class Abacus(Metronome):
    """A step takes 10 ms and 1 ms for each token, and can be interrupted."""

    can_interrupt = True

    def seconds(self, shape):
        return 0.010 + 0.001 * (shape.num_prefill_tokens + shape.num_decode_sequences)


def test_a_request_that_cannot_wait_is_run_in_the_middle_of_a_step():
    """The long step would take from 0.001 to 0.411; it ends later by the 30 ms of the other."""
    urgent = TraceRequest(0.1, RequestClass.RT, 20, 1, 0.1, 1.0)
    setup = replace(TWO_STEPS, policy="bros", limits=SchedulerLimits(512, 8))
    batch, chat = tokens_of(trace(be(0.0, 400, 1), urgent), setup, Abacus())
    assert chat == pytest.approx([0.1315], abs=1e-4)
    assert batch == pytest.approx([0.4415], abs=1e-4)
    patient = replace(urgent, ttft_s=2.0)
    batch, chat = tokens_of(trace(be(0.0, 400, 1), patient), setup, Abacus())
    assert (batch, chat) == (pytest.approx([0.4115], abs=1e-4), pytest.approx([0.4415], abs=1e-4))


def test_a_prompt_beyond_the_token_budget_takes_several_steps():
    setup = replace(ONE_STEP, limits=SchedulerLimits(16, 8))
    (tokens,) = tokens_of(trace(rt(0.0, 40, 1)), setup)
    assert tokens == pytest.approx([3 * 0.0115])


def test_sequences_beyond_the_cap_wait_for_a_place():
    setup = replace(ONE_STEP, limits=SchedulerLimits(64, 1))
    first, second = tokens_of(trace(rt(0.0, 5, 2), rt(0.0, 5, 2)), setup)
    assert first == pytest.approx([0.0115, 0.0230])
    assert second == pytest.approx([0.0345, 0.0460])


def test_alone_a_request_gets_its_first_token_after_its_prefill():
    hardware = HARDWARE["llama-3-8b"]
    requests = [rt(10.0 * number, 200 * number + 1, 3) for number in range(5)]
    timing = ONE_STEP.timing
    for request, tokens in zip(requests, tokens_of(trace(*requests), TWO_STEPS, hardware), strict=True):
        prefill_s = hardware.seconds(StepShape().with_sequence(0, request.num_prompt_tokens))
        assert tokens[0] - request.arrival_s == pytest.approx(timing.send_s + prefill_s + timing.return_s)


def test_a_request_that_can_never_fit_is_rejected():
    records = simulate(trace(rt(0.0, 1020, 5), rt(0.0, 1019, 5)), ONE_STEP, Metronome()).records
    assert [record.ending for record in records] == [Ending.REJECTED, Ending.FINISHED]


def test_the_run_ends_with_the_last_real_time_request_or_at_its_end():
    workload = replace(trace(rt(0.0, 5, 200), duration_s=1.0), drain_s=5.0)
    done = simulate(workload, ONE_STEP, Metronome())
    assert done.records[0].ending is Ending.FINISHED
    assert done.end_s == pytest.approx(200 * 0.0115)
    cut = simulate(replace(workload, drain_s=0.5), ONE_STEP, Metronome())
    assert cut.records[0].ending is Ending.UNFINISHED
    assert len(cut.records[0].token_s) == 1.5 // 0.0115
    assert cut.end_s == 1.5


def in_system(records, time_s):
    """Requests sent by then that have not ended."""
    return sum(
        record.offered_s <= time_s and (record.ending is Ending.UNFINISHED or record.token_s[-1] > time_s)
        for record in records
    )


def test_a_closed_loop_keeps_its_number_in_the_system():
    workload = trace(be=ClosedLoop(5, SHORT), duration_s=3.0)
    records = simulate(workload, TWO_STEPS, Metronome()).records
    assert {in_system(records, 0.1 * tick) for tick in range(30)} == {5}
    assert len(records) > 20


def test_a_group_starts_when_the_last_one_of_the_group_before_has_ended():
    workload = trace(be=ClosedLoop(5, SHORT, is_grouped=True), duration_s=3.0)
    records = simulate(workload, TWO_STEPS, Metronome()).records
    groups = [records[start : start + 5] for start in range(0, len(records), 5)]
    assert len(groups) > 5
    for group, following in itertools.pairwise(groups):
        assert {record.offered_s for record in following} == {max(record.token_s[-1] for record in group)}


@pytest.mark.parametrize("policy", POLICY_NAMES)
def test_throughput_and_latency_obey_little_s_law(policy):
    """Requests in the system = rate x mean time in it, for any policy."""
    workload = trace(be=ClosedLoop(8, BE), duration_s=100.0)
    done = simulate(workload, Setup(policy=policy), HARDWARE["llama-3-8b"])
    finished = [record for record in done.records if record.ending is Ending.FINISHED]
    latency_s = sum(record.token_s[-1] - record.offered_s for record in finished) / len(finished)
    assert len(finished) / 100.0 * latency_s == pytest.approx(8, rel=0.03)


def mixed(seed, rate=20.0, num_be=12, duration_s=1.5):
    return make_workload(
        seed,
        arrivals=Poisson(rate),
        rt_lengths=SHORT,
        targets=fixed_targets(0.2, 0.03),
        be=ClosedLoop(num_be, SHORT),
        duration_s=duration_s,
        warm_up_s=0.0,
        drain_s=0.5,
    )


def tight(policy, num_kv_tokens=320, **how):
    """So little memory that sequences give way all the time."""
    return Setup(
        policy=policy, limits=SchedulerLimits(64, 16), block_size=4, num_kv_tokens=num_kv_tokens,
        num_host_tokens=200, **how,
    )  # fmt: skip


@pytest.mark.parametrize("policy", POLICY_NAMES)
@settings(max_examples=6, deadline=None)
@given(
    seed=st.integers(0, 1000),
    rate=st.floats(0, 60),
    num_be=st.integers(0, 20),
    in_flight=st.sampled_from([1, 2]),
    num_kv_tokens=st.sampled_from([120, 320, 2000]),
)
def test_every_request_ends_exactly_once_with_all_of_its_tokens(policy, seed, rate, num_be, in_flight, num_kv_tokens):
    workload = mixed(seed, rate, num_be)
    setup = tight(policy, num_kv_tokens, timing=Timing(max_steps_in_flight=in_flight))
    hardware = Noisy(Metronome(), 0.3, seed)
    replica = make_replica(setup, hardware, profile(hardware))
    done = run([replica], Alone(), workload)
    assert Counter(record.request for record in done.records if record.is_rt) == Counter(workload.rt)
    for record in done.records:
        assert list(record.token_s) == sorted(record.token_s)
        assert all(time_s > record.offered_s for time_s in record.token_s[:1])
        num_tokens = len(record.token_s)
        if record.ending is Ending.FINISHED:
            assert num_tokens == record.request.num_output_tokens
        else:
            assert record.ending is Ending.UNFINISHED
            assert num_tokens < record.request.num_output_tokens
    num_unfinished = sum(record.ending is Ending.UNFINISHED for record in done.records)
    assert num_unfinished == replica.num_requests
    # Those that end with the run are not replaced.
    assert sum(not record.is_rt for record in done.records if record.ending is Ending.UNFINISHED) <= num_be
    assert (replica.num_tokens == 0) == (num_unfinished == 0)
    waiting = [record for record in done.records if record.is_rt and not record.token_s]
    assert replica.num_rt_prompt_tokens == sum(record.request.num_prompt_tokens for record in waiting)


@pytest.mark.parametrize("policy", POLICY_NAMES)
def test_the_same_seed_gives_the_same_run(policy):
    first, second = (simulate(mixed(3), tight(policy), Noisy(Metronome(), 0.2, 3)) for _ in range(2))
    assert first.records == second.records
    assert first.end_s == second.end_s
    assert first.logs[0].seconds == second.logs[0].seconds
    assert simulate(mixed(4), tight(policy), Noisy(Metronome(), 0.2, 3)).records != first.records


def test_steps_follow_each_other_on_the_ranks():
    log = simulate(mixed(1), tight("fcfs"), Noisy(Metronome(), 0.3, 1)).logs[0]
    ends_s = [start_s + seconds for start_s, seconds in zip(log.start_s, log.seconds, strict=True)]
    assert all(after_s >= end_s for end_s, after_s in zip(ends_s, log.start_s[1:], strict=False))


def test_the_log_knows_how_busy_the_ranks_were():
    log = simulate(trace(rt(0.0, 5, 11), rt(0.5, 5, 11), duration_s=1.0), ONE_STEP, Metronome()).logs[0]
    # A last plan tells the ranks to forget the sequence.
    assert log.busy_share(0.0, 1.0) == pytest.approx(0.01 * len(log))
    assert log.prediction_error(0.0, 1.0) == pytest.approx(0.0, abs=0.05)
    assert log.prediction_error(0.3, 0.4) is None
    assert 0 < log.mean_rt_kv_share(0.0, 1.0) < 0.1


def burst_of_prompts(admission_policy):
    """20 prompts of 77 ms each come at once, wanted within 400 ms."""
    requests = [TraceRequest(0.0, RequestClass.RT, 1000, 2, 0.4, 0.2)] * 20
    setup = Setup(policy="bros", admission_policy=admission_policy)
    return simulate(trace(*requests), setup, HARDWARE["opt-13b"])


def test_admission_takes_what_it_can_do_in_time_and_rejects_the_rest():
    records = burst_of_prompts(AdmissionPolicy.REJECT).records
    endings = Counter(record.ending for record in records)
    assert endings == {Ending.FINISHED: 5, Ending.REJECTED: 15}
    assert sum(record.meets_ttft for record in records) == 5


def test_admission_degrades_what_it_cannot_do_in_time():
    records = burst_of_prompts(AdmissionPolicy.DEGRADE).records
    assert {record.ending for record in records} == {Ending.FINISHED}
    assert [record.was_relegated for record in records] == [False] * 5 + [True] * 15
    assert sum(record.meets_ttft for record in records) == 5


def test_relaxed_targets_do_not_count_as_met():
    """Whoever asked for 400 ms and was told to expect more has not got what was asked for."""
    records = burst_of_prompts(AdmissionPolicy.RELAX).records
    assert {record.ending for record in records} == {Ending.FINISHED}
    assert sum(record.meets_ttft for record in records) == 5
    assert not any(record.was_relegated for record in records)


def test_a_real_time_request_without_targets_gets_default_ones():
    request = TraceRequest(0.0, RequestClass.RT, 100, 5)
    (record,) = simulate(trace(request), Setup(policy="bros"), HARDWARE["opt-13b"]).records
    assert record.ending is Ending.FINISHED
    assert record.meets_joint


def loaded_by(statement):
    code = f"{statement}\nimport sys; print(*sys.modules)"
    process = subprocess.run([sys.executable, "-P", "-c", code], capture_output=True, text=True, check=True)
    return set(process.stdout.split())


def test_the_simulator_needs_no_server_and_the_server_no_simulator():
    assert not {"aiohttp", "zmq", "torch", "structlog"} & loaded_by("import bros_router.simulation.fleet")
    assert not {name for name in loaded_by("import bros_router.server") if name.startswith("bros_router.simulation")}
