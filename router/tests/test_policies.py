"""The baselines: what each rule makes of the same arrivals. `test_bros.py` has the policy they compare with."""

import pytest

from bros_router.kv.kv_manager import KVManager, Preemption
from bros_router.request import RequestClass
from bros_router.scheduling.policies.registry import POLICY_NAMES, PolicyOptions, make_policy, preemption_of
from bros_router.scheduling.scheduler import Scheduler
from bros_router.scheduling.step_draft import SchedulerLimits
from simulated_ranks import ExactModel, SimulatedRanks, make_sequence, shapes

RT, BE = RequestClass.RT, RequestClass.BE


def run(name, arrivals, *, num_blocks=64, max_batch_tokens=8, max_num_sequences=8, options=None):
    """The plans for sequences (class, prompt tokens, new tokens) that arrive one after the other before step 0."""
    options = options or PolicyOptions()
    model, limits = ExactModel(), SchedulerLimits(max_batch_tokens, max_num_sequences)
    kv = KVManager(num_blocks, 4, preemption=preemption_of(name, options))
    scheduler = Scheduler(make_policy(name, model, limits, options), kv, model, limits)
    ranks = SimulatedRanks(4)
    late = []
    for number, (request_class, num_prompt_tokens, max_new_tokens, *arrives_before_step) in enumerate(arrivals):
        sequence = make_sequence(
            number, num_prompt_tokens, max_new_tokens, request_class=request_class, arrival_s=0.001 * number
        )
        if arrives_before_step:
            late.append((arrives_before_step[0], sequence))
        else:
            scheduler.add(sequence)
    plans = []
    now_s = 1.0
    while True:
        for number, sequence in late:
            if number == len(plans):
                scheduler.add(sequence)
        plan = scheduler.plan(now_s)
        if plan is None:
            return plans
        plans.append(shapes(plan))
        result = ranks.execute(plan)
        now_s += result.step_s
        scheduler.commit(result, now_s)


def test_first_come_first_served_ignores_the_class():
    assert run("fcfs", [(BE, 8, 1), (RT, 4, 1)])[:2] == [[(0, 0, 8)], [(1, 0, 4)]]


@pytest.mark.parametrize("name", ["priority", "static"])
def test_priority_goes_by_class_then_arrival(name):
    assert run(name, [(BE, 8, 1), (RT, 4, 1), (RT, 3, 1)])[:2] == [
        [(1, 0, 4), (2, 0, 3), (0, 0, 1)],
        [(0, 1, 7)],
    ]


def test_priority_preempts_best_effort_when_memory_runs_out():
    plans = run("priority", [(BE, 8, 3), (RT, 8, 1, 1)], num_blocks=3)
    assert plans[:3] == [[(0, 0, 8)], [(1, 0, 8)], [(0, 0, 8)]]


@pytest.mark.parametrize(("preempts_when_full", "second"), [(False, [(0, 4, 1)]), (True, [(1, 0, 4)])])
def test_priority_preempts_for_a_place_only_where_told_to(preempts_when_full, second):
    options = PolicyOptions(priority_preempts_when_full=preempts_when_full)
    plans = run("priority", [(BE, 4, 4), (RT, 4, 1, 1)], max_num_sequences=1, options=options)
    assert plans[1] == second


def test_static_runs_a_fixed_number_of_best_effort_sequences():
    options = PolicyOptions(static_be_requests=1)
    plans = run("static", [(BE, 2, 2), (BE, 2, 1), (RT, 2, 1)], options=options)
    assert plans[:3] == [[(2, 0, 2), (0, 0, 2)], [(0, 2, 1)], [(1, 0, 2)]]


def test_earliest_deadline_first_gives_best_effort_a_far_one():
    assert run("edf", [(BE, 4, 1), (RT, 4, 1), (RT, 4, 1)])[:2] == [[(1, 0, 4), (2, 0, 4)], [(0, 0, 4)]]


def test_round_robin_lets_the_classes_take_turns():
    plans = run("rr", [(BE, 6, 1), (BE, 6, 1), (RT, 6, 1), (RT, 6, 1)], max_batch_tokens=6)
    assert plans[:4] == [[(2, 0, 6)], [(0, 0, 6)], [(3, 0, 6)], [(1, 0, 6)]]


def test_tgi_pauses_decoding_for_prefill_and_reserves_the_longest_reply():
    plans = run("tgi", [(RT, 4, 3), (BE, 4, 3, 1)])
    assert plans[:3] == [[(0, 0, 4)], [(1, 0, 4)], [(0, 4, 1), (1, 4, 1)]]
    # Two blocks hold a prompt, but not the longest reply beside it: the second waits for the first.
    plans = run("tgi", [(RT, 4, 9), (RT, 4, 2)], num_blocks=4)
    assert [plan for plan in plans if (1, 0, 4) in plan] == [[(1, 0, 4)]]
    assert plans.index([(1, 0, 4)]) == 9


def test_tgi_lets_few_that_wait_wait_for_a_while():
    running = [(RT, 1, 40) for _ in range(7)]
    plans = run("tgi", [*running, (RT, 1, 1, 2)], num_blocks=256)
    joined = next(number for number, plan in enumerate(plans) if (7, 0, 1) in plan)
    assert joined == 21  # 1 waits, 7 run: less than 0.3 of them, so 20 decode steps pass


@pytest.mark.parametrize("name", POLICY_NAMES)
def test_every_policy_finishes_what_it_was_given(name):
    plans = run(name, [(BE if number % 2 else RT, 3 + number, 5) for number in range(8)], num_blocks=8)
    assert len({part[0] for plan in plans for part in plan}) == 8


@pytest.mark.parametrize("name", POLICY_NAMES)
def test_only_bros_takes_blocks_one_at_a_time(name):
    is_bros = name.startswith("bros")
    assert (preemption_of(name, PolicyOptions()) is Preemption.RECOMPUTE) is not is_bros
