"""Simulated runs as values: repeatable, told apart by what they depend on, and run once."""

from dataclasses import replace
from pathlib import Path

import pytest
from rich.progress import Progress

from bros_benchmarks.evaluation.effort import FULL, LIGHT, QUICK
from bros_benchmarks.evaluation.scenario import SCENARIOS, ablations, variants_of
from bros_benchmarks.evaluation.simulation import Simulation
from bros_benchmarks.evaluation.simulations import Simulations
from bros_benchmarks.evaluation.validate import compare
from bros_router.scheduling.policies.registry import POLICY_NAMES
from bros_router.simulation.hardware import HARDWARE, scaled_targets
from bros_router.simulation.simulator import Setup, simulate
from bros_router.simulation.workload import LMSYS, Poisson, fixed_targets, make_workload

SHORT = Simulation(warm_up_s=2.0, duration_s=8.0, drain_s=60.0, setup=Setup(policy="fcfs")).with_rate(2.0)


def without_real_time(result_extra: dict[str, float | None]) -> dict[str, float | None]:
    """What planning cost was measured by the clock on the wall."""
    return {name: value for name, value in result_extra.items() if name != "planning_us"}


def test_the_same_simulation_gives_the_same_result() -> None:
    first, second = SHORT.execute(), SHORT.execute()
    assert first.summary == second.summary
    assert first.summary.num_rt > 5
    assert without_real_time(first.extra) == without_real_time(second.extra)


def test_the_digest_tells_apart_all_that_a_run_depends_on() -> None:
    simulations = [
        SHORT,
        replace(SHORT, seed=2),
        replace(SHORT, noise=0.0),
        replace(SHORT, rt_lengths=LMSYS),
        replace(SHORT, targets=5.0),
        SHORT.with_rate(2.1),
        *(replace(SHORT, setup=variant.setup) for variant in ablations(Setup())),
        *(replace(SHORT, setup=v.setup) for policy in POLICY_NAMES for v in FULL.variants_of(policy)),
    ]
    different = [item for index, item in enumerate(simulations) if item not in simulations[:index]]
    assert len(different) > 50
    assert len({item.digest for item in simulations}) == len(different)
    assert replace(SHORT, seed=1).digest == SHORT.digest


def test_names_of_variants_are_unique_so_that_results_do_not_overwrite_each_other() -> None:
    for effort in (FULL, LIGHT, QUICK):
        names = [variant.name for policy in effort.policies for variant in effort.variants_of(policy)]
        assert len(set(names)) == len(names)
        assert {name.split(" ")[0] for name in names} == set(effort.policies)
    static = variants_of("static", (1024,), (256,), (4, 8))
    assert [variant.setup.options.static_be_requests for variant in static] == [4, 8]


def test_scaled_targets_grow_with_prompt_and_scale() -> None:
    hardware = HARDWARE["llama-3-8b"]
    once, fivefold = scaled_targets(hardware, 1.0, 2048), scaled_targets(hardware, 5.0, 2048)
    lengths = (10, 1000, 3000, 8000)
    ttfts = [once(length)[0] for length in lengths]
    assert None not in ttfts and ttfts == sorted(ttfts, key=float)
    for length in lengths:
        assert fivefold(length) == pytest.approx([5 * value for value in once(length)])


def test_a_pool_runs_each_simulation_once_and_labels_every_use_of_it(tmp_path: Path) -> None:
    tasks = [
        ({"experiment": "one", "scenario": "s", "policy": "a", "rate": 2.0}, SHORT),
        ({"experiment": "two", "scenario": "s", "policy": "b", "rate": 2.0}, SHORT),
        ({"experiment": "two", "scenario": "s", "policy": "c", "rate": 2.0}, replace(SHORT, seed=7)),
    ]
    with Progress(disable=True) as progress, Simulations(tmp_path, 1, progress) as simulations:
        first = simulations.run("test", tasks)
        files = sorted((simulations.folder / "runs").iterdir())
        assert len(files) == 2
        before = [file.stat().st_mtime_ns for file in files]
        assert simulations.run("test", tasks) == first
        assert [file.stat().st_mtime_ns for file in files] == before
    assert [result.labels["policy"] for result in first] == ["a", "b", "c"]
    assert [result.labels["seed"] for result in first] == [1, 1, 7]
    assert first[0].summary == first[1].summary != first[2].summary
    assert len(list(tmp_path.rglob("result.json"))) == 3


def test_every_scenario_can_be_drawn() -> None:
    for scenario in SCENARIOS.values():
        base = scenario.base
        workload = make_workload(
            1,
            arrivals=Poisson(scenario.first_rate),
            rt_lengths=base.rt_lengths,
            targets=fixed_targets(1.0, 1.0),
            be=base.be,
            duration_s=10.0,
            warm_up_s=1.0,
        )
        limit = HARDWARE[base.hardware].max_length
        assert all(request.num_prompt_tokens + request.num_output_tokens <= limit for request in workload.rt)


def test_a_run_compared_with_itself_agrees_and_with_a_slower_one_does_not() -> None:
    workload = make_workload(
        1, arrivals=Poisson(3.0), rt_lengths=LMSYS, targets=fixed_targets(0.4, 0.2), duration_s=20.0, warm_up_s=2.0
    )
    live, slower = (simulate(workload, Setup(), HARDWARE[name]).records for name in ("llama-3-8b", "opt-13b"))
    same = compare(live, live, workload)
    assert {item.name for item in same} == {"TTFT p50", "TTFT p99", "TPOT p50", "TPOT p99", "BE tokens/s"}
    assert all(item.holds for item in same)
    verdicts = {item.name: item.holds for item in compare(live, slower, workload)}
    assert not verdicts["TTFT p50"] and not verdicts["TPOT p50"]
