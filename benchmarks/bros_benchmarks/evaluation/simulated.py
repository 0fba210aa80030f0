"""`make eval-sim`: the paper's set-up on the simulator, which runs the server's own scheduler.

For each scenario: R*, the highest rate at which `bros` holds 99 % joint attainment beside best-effort work; the
goodput of every other policy at its best; all of them at R*. For the paper's first scenario also the curves, the
ablation, the burst and the KV pressure sweep. What was simulated by the same code is not simulated again.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from statistics import fmean
from typing import Final

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from bros_benchmarks.evaluation.bound import Ceiling
from bros_benchmarks.evaluation.effort import FULL, LIGHT, QUICK, Effort
from bros_benchmarks.evaluation.figures import draw_all
from bros_benchmarks.evaluation.recorder import describe_machine, write_json
from bros_benchmarks.evaluation.result import Result, attainment, by_label
from bros_benchmarks.evaluation.scenario import PAPER_SCENARIOS, SCENARIOS, Scenario, Variant
from bros_benchmarks.evaluation.simulations import Simulations
from bros_benchmarks.evaluation.study import LEVEL, Study, charge
from bros_benchmarks.evaluation.tables import best_effort_table, gate_table, policy_table

#: The others are tuned at R*, where they may be hopeless, and at this share of it as well.
_LOW_SHARE: Final = 0.33
#: Experiments beyond the comparison at R*.
_PARTS: Final = ("rates", "pure-rt", "slo", "ablation", "burst", "kv")


class SimulatedEvaluation:
    """Runs the studies and prints what they gave."""

    def __init__(self, simulations: Simulations, effort: Effort, console: Console) -> None:
        self._simulations = simulations
        self._effort = effort
        self._console = console

    def run(self, scenario: Scenario, parts: Iterable[str]) -> None:
        """One scenario: the comparison at R*, then the other parts."""
        study = Study(self._simulations, scenario, self._effort)
        rate, best, ceiling = self._compare(study, scenario)
        if "rates" in parts:
            self._simulations.keep(charge(study.rates(rate, best), ceiling))
        self._further(study, scenario, rate, best, set(parts))

    def _compare(self, study: Study, scenario: Scenario) -> tuple[float, dict[str, Variant], Ceiling]:
        """R*, the best setting of every policy there, and what best-effort work can get at most."""
        # R* is searched with the largest budget and cap; then everybody is tuned there, and `bros` searched once more.
        first = self._effort.variants_of("bros")[-1]
        guess = study.goodputs([first])[first.name].goodput(LEVEL)
        guess = guess or scenario.first_rate
        best = study.tune(guess)
        low = study.tune(_LOW_SHARE * guess)
        candidates = {variant.name: variant for variant in (first, *best.values(), *low.values())}
        searches = study.goodputs(list(candidates.values()))
        goodputs = {
            policy: max(searches[v.name].goodput(LEVEL) for v in candidates.values() if v.policy == policy)
            for policy in self._effort.policies
        }
        best["bros"] = max(
            (variant for variant in candidates.values() if variant.policy == "bros"),
            key=lambda variant: searches[variant.name].goodput(LEVEL),
        )
        rate = goodputs["bros"] = study.confirm(best["bros"], goodputs["bros"] or scenario.first_rate)
        results = study.compare(rate, best)
        ceiling = study.ceiling(results)
        results = self._simulations.keep(charge(results, ceiling))
        self._print(scenario, rate, best, goodputs, results)
        write_json(
            self._simulations.folder / f"summary-{scenario.name.replace(' ', '')}.json",
            {
                "r_star": rate,
                "goodput_99": goodputs,
                "goodput_90": {name: search.goodput(0.90) for name, search in searches.items()},
                "settings": {policy: variant.name for policy, variant in best.items()},
                "machine": describe_machine(),
            },
        )
        return rate, best, ceiling

    def _print(
        self,
        scenario: Scenario,
        rate: float,
        best: Mapping[str, Variant],
        goodputs: Mapping[str, float],
        results: list[Result],
    ) -> None:
        show = self._console.print
        show(f"[bold]{scenario.name}[/]: R* = {rate:.2f} RT/s")
        for policy, goodput in goodputs.items():
            show(f"  {policy}: goodput {goodput:.2f} RT/s; at R* with {best[policy].name}")
        show(policy_table(f"{scenario.name}: all policies at R*", results))
        show(best_effort_table(f"{scenario.name}: best-effort throughput at R*", results))
        show(gate_table(f"{scenario.name}: gates", gates(results, goodputs)))

    def _further(
        self, study: Study, scenario: Scenario, rate: float, best: Mapping[str, Variant], parts: set[str]
    ) -> None:
        show = self._console.print
        if "pure-rt" in parts:
            show(policy_table(f"{scenario.name}: real-time load alone", study.pure_rt(rate, best)))
        if "slo" in parts:
            study.slo_scales(rate, best)
        if "ablation" in parts:
            for condition, results in by_label(study.ablate(rate, best["bros"]), "condition").items():
                show(policy_table(f"{scenario.name}: one part off at a time, {condition}", results))
        if "burst" in parts:
            show(policy_table(f"{scenario.name}: burst, 10 x the rate for 20 s", study.burst(rate, best)))
        if "kv" in parts:
            for share, results in by_label(study.kv_pressure(rate, best), "kv_share").items():
                show(policy_table(f"{scenario.name}: {share} of the KV region", results))


def gates(results: Iterable[Result], goodputs: Mapping[str, float]) -> list[tuple[str, float | None, str, float]]:
    """What must hold at R*."""
    groups = by_label(results, "policy")

    def mean(policy: str, figure: str) -> float | None:
        values = [value for run in groups.get(policy, ()) if (value := run.figure(figure)) is not None]
        return fmean(values) if values else None

    def ratio(first: float | None, second: float | None) -> float | None:
        return first / second if first is not None and second else None

    def reduction(other: str) -> float | None:
        share = ratio(mean("bros", "rt_normalised_latency_s"), mean(other, "rt_normalised_latency_s"))
        return None if share is None else 1 - share

    others = [goodput for policy, goodput in goodputs.items() if policy != "bros"]
    return [
        ("joint attainment of bros", attainment(groups.get("bros", [])), ">=", LEVEL),
        ("RT normalised latency, below fcfs by", reduction("fcfs"), ">=", 0.75),
        ("RT normalised latency, below rr by", reduction("rr"), ">=", 0.55),
        (
            "BE tokens/s, bros / fcfs charged",
            ratio(mean("bros", "be_tokens_per_s"), mean("fcfs", "be_charged")),
            ">=",
            0.97,
        ),
        ("BE tokens/s, bros / bound", ratio(mean("bros", "be_tokens_per_s"), mean("bros", "be_bound")), ">=", 0.9),
        ("goodput, bros / fcfs", ratio(goodputs.get("bros"), goodputs.get("fcfs")), ">=", 3.0),
        ("goodput, bros / best other", ratio(goodputs.get("bros"), max(others, default=None)), ">=", 1.0),
    ]


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="shorter runs, fewer settings, one scenario")
    parser.add_argument("--scenarios", nargs="+", choices=tuple(SCENARIOS), default=tuple(SCENARIOS))
    parser.add_argument("--parts", nargs="*", choices=_PARTS, default=_PARTS, help="for the first scenario")
    parser.add_argument("--processes", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--folder", type=Path, default=Path("benchmarks/results/simulated"))
    return parser.parse_args()


def main() -> None:
    """Run the evaluation, print its tables, draw its figures."""
    options = _parse()
    efforts = {name: QUICK if options.quick else FULL if name in PAPER_SCENARIOS else LIGHT for name in SCENARIOS}
    scenarios = options.scenarios[:1] if options.quick else options.scenarios
    console = Console(width=200)
    columns = (
        *(TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn()),
        *(TimeElapsedColumn(), TimeRemainingColumn()),
    )
    with (
        Progress(*columns, console=console, refresh_per_second=2) as progress,
        Simulations(options.folder, options.processes, progress) as simulations,
    ):
        for index, name in enumerate(scenarios):
            evaluation = SimulatedEvaluation(simulations, efforts[name], console)
            evaluation.run(SCENARIOS[name], options.parts if index == 0 else ())
    for path in draw_all(simulations.folder):
        console.print(str(path))


if __name__ == "__main__":
    main()
