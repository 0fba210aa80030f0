"""Many replicas behind one router."""

from collections import Counter

import pytest

from bros_router.request import RequestClass
from bros_router.scheduling.step_draft import SchedulerLimits
from bros_router.simulation.fleet import (
    DISPATCHERS,
    LeastLoaded,
    PredictedSlack,
    RoundRobin,
    SampledSlack,
    simulate_fleet,
)
from bros_router.simulation.hardware import HARDWARE, Noisy, profile
from bros_router.simulation.record import Ending, RequestRecord
from bros_router.simulation.simulator import Setup, make_replica, simulate
from bros_router.simulation.workload import (
    BE,
    SHAREGPT,
    ClosedLoop,
    Poisson,
    TraceRequest,
    fixed_targets,
    make_workload,
)

HARDWARE_13B = HARDWARE["opt-13b"]
SETUP = Setup(policy="priority", limits=SchedulerLimits(1024, 64))


def workload(rate, num_be, duration_s=8.0):
    return make_workload(
        5,
        arrivals=Poisson(rate),
        rt_lengths=SHAREGPT.scaled(0.3),
        targets=fixed_targets(0.4, 0.2),
        be=ClosedLoop(num_be, BE),
        duration_s=duration_s,
        warm_up_s=2.0,
    )


@pytest.mark.parametrize("name", DISPATCHERS)
def test_a_fleet_of_one_is_a_server(name):
    drawn = workload(4.0, 8)
    alone = simulate(drawn, SETUP, Noisy(HARDWARE_13B, 0.1, 1))
    fleet = simulate_fleet(drawn, SETUP, lambda index: Noisy(HARDWARE_13B, 0.1, 1, index), 1, DISPATCHERS[name]())
    assert fleet.records == alone.records
    assert fleet.end_s == alone.end_s


@pytest.mark.parametrize("name", DISPATCHERS)
def test_a_fleet_loses_nothing_and_is_deterministic(name):
    drawn = workload(20.0, 40)
    first, second = (simulate_fleet(drawn, SETUP, lambda index: HARDWARE_13B, 5, DISPATCHERS[name]()) for _ in range(2))
    assert first.records == second.records
    assert Counter(record.request for record in first.records if record.is_rt) == Counter(drawn.rt)
    assert len(first.logs) == 5
    assert all(len(log) for log in first.logs)
    assert first.summary().rt_endings["finished"] == first.summary().num_rt


def replicas(number):
    return [make_replica(SETUP, HARDWARE_13B, profile(HARDWARE_13B)) for _ in range(number)]


def record(request_class=RequestClass.RT, num_prompt_tokens=100, ttft_s=0.4):
    targets = (ttft_s, 0.2) if request_class is RequestClass.RT else (None, None)
    return RequestRecord(TraceRequest(0.0, request_class, num_prompt_tokens, 100, *targets), 0.0, Ending.UNFINISHED)


def test_round_robin_takes_turns():
    dispatcher, fleet = RoundRobin(), replicas(3)
    assert [dispatcher.choose(record(), fleet, 0.0) for _ in range(5)] == [0, 1, 2, 0, 1]


def test_least_loaded_counts_tokens_not_requests():
    fleet = replicas(2)
    fleet[0].submit(record(RequestClass.BE, 1000), 0.0)
    for _ in range(3):
        fleet[1].submit(record(RequestClass.BE, 50), 0.0)
    assert LeastLoaded().choose(record(), fleet, 0.0) == 1


def test_slack_avoids_a_queue_of_prompts_even_where_fewer_tokens_are_held():
    fleet = replicas(2)
    for _ in range(8):
        fleet[0].submit(record(num_prompt_tokens=900), 0.0)  # 0.6 s of prefill, 8,000 tokens
    for _ in range(20):
        fleet[1].submit(record(RequestClass.BE, 400), 0.0)  # 10,000 tokens
    assert LeastLoaded().choose(record(), fleet, 0.0) == 0
    assert PredictedSlack().choose(record(), fleet, 0.0) == 1
    assert SampledSlack(num_candidates=2).choose(record(), fleet, 0.0) == 1
    # Where both are in time, the load decides.
    assert PredictedSlack().choose(record(ttft_s=10.0), fleet, 0.0) == 0


def test_sampling_looks_at_a_few_replicas_only():
    fleet = replicas(6)
    dispatcher = SampledSlack(num_candidates=2, seed=1)
    choices = Counter(dispatcher.choose(record(), fleet, 0.0) for _ in range(300))
    assert set(choices) == set(range(6))
    fleet[3].submit(record(), 0.0)  # now it is never the better of two
    assert 3 not in {dispatcher.choose(record(), fleet, 0.0) for _ in range(300)}


def test_slack_takes_the_least_late_where_all_are():
    fleet = replicas(3)
    for replica, num_prompts in zip(fleet, (9, 7, 8), strict=True):
        for _ in range(num_prompts):
            replica.submit(record(num_prompt_tokens=1000), 0.0)
    assert PredictedSlack().choose(record(), fleet, 0.0) == 1


def test_best_effort_goes_to_the_least_loaded():
    fleet = replicas(2)
    fleet[0].submit(record(RequestClass.BE, 500), 0.0)
    assert PredictedSlack().choose(record(RequestClass.BE), fleet, 0.0) == 1
