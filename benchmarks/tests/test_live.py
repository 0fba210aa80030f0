"""The course of a live evaluation, with runs that are scripted: what is run, and what is concluded."""

from __future__ import annotations

from dataclasses import replace

import pytest
from rich.progress import Progress

from bros_benchmarks.evaluation.live import Evaluation, Plan
from bros_benchmarks.evaluation.result import Result
from bros_router.simulation.record import summarise

SEEDS = (1, 2, 3)


class ScriptedRunner:
    """Servers that meet all targets up to some rate, and none above it; 40 requests a run."""

    def __init__(self, capacities: dict[str, float]) -> None:
        self.capacities = capacities
        self.runs: list[tuple[str, float, int]] = []

    def shortened(self, **times):
        return self

    def num_offered(self, contender, rate, seed):
        return 40

    def run(self, experiment, contender, rate, seed, arrivals=None):
        self.runs.append((contender.name, rate, seed))
        share = 1.0 if rate <= self.capacities[contender.name] else 0.0
        summary = replace(summarise([], 0.0, 1.0), num_rt=40, joint_attainment=share)
        return Result({"experiment": experiment, "policy": contender.name, "rate": rate, "seed": seed}, summary)


@pytest.fixture
def searched():
    runner = ScriptedRunner({"fcfs": 0.0, "static": 0.3, "bros": 0.9, "RT alone": 1.4})
    plan = Plan(("fcfs", "static", "bros"), SEEDS, ("search",), rate=None)
    searches, results = Evaluation(runner, Progress(disable=True), plan, capacity=1.0).search()
    return runner, searches, results


def test_the_goodput_is_the_highest_rate_of_the_grid_that_is_sustained(searched):
    runner, searches, results = searched
    for name, capacity in runner.capacities.items():
        goodput = searches[name].goodput(0.99)
        assert goodput <= capacity < 1.1 * max(goodput, 0.1)
    assert len(results) == len(runner.runs) == len(set(runner.runs))


def test_a_rate_that_is_missed_costs_one_run_and_one_that_is_sustained_all_seeds(searched):
    runner, _, _ = searched
    for name, rate in {(name, rate) for name, rate, _ in runner.runs}:
        seeds = [seed for run_name, run_rate, seed in runner.runs if (run_name, run_rate) == (name, rate)]
        assert seeds == (list(SEEDS) if rate <= runner.capacities[name] else [1])
