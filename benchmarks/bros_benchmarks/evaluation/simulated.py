"""`make eval-sim`: the paper's set-up on the simulator, which runs the server's own scheduler.

For each scenario: R*, the highest rate at which `bros` holds 99 % joint attainment beside best-effort work; the
goodput of every other policy at its best; all of them at R*. For the paper's first scenario also the curves, the
ablation, the burst and the KV pressure sweep. What was simulated by the same code is not simulated again.
"""

from __future__ import annotations

import argparse
import math
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from statistics import fmean
from typing import Final

import numpy as np
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

from bros_benchmarks.evaluation.bound import Ceiling, charge
from bros_benchmarks.evaluation.effort import FULL, LIGHT, QUICK, Effort
from bros_benchmarks.evaluation.figures import draw_all
from bros_benchmarks.evaluation.goodput import LEVEL
from bros_benchmarks.evaluation.recorder import describe_machine, write_json
from bros_benchmarks.evaluation.result import Result, attainment, by_label
from bros_benchmarks.evaluation.scenario import PAPER_SCENARIOS, SCENARIOS, Scenario, Variant
from bros_benchmarks.evaluation.simulations import Simulations
from bros_benchmarks.evaluation.study import Goodput, Study
from bros_benchmarks.evaluation.tables import best_effort_table, gate_table, policy_table
from bros_benchmarks.scheduling import measure

#: The others are tuned at R*, where they may be hopeless, and at this share of it as well.
_LOW_SHARE: Final = 0.33
#: Experiments beyond the comparison at R*, for the first scenario.
_PARTS: Final = ("rates", "pure-rt", "slo", "ablation", "burst", "kv", "cost")
#: And for others: where time is scarcer than memory, other parts of the policy matter.
_FURTHER_PARTS: Final = {"azure-code": ("ablation",)}
#: Lengths of the queue for which the cost of planning is measured, with 256 sequences running.
_QUEUES: Final = (0, 1000, 10_000, 100_000)


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
        # R* is searched with the largest budget and cap; then everybody is tuned there, and searched with what is best.
        first = self._effort.variants_of("bros")[-1]
        guess = study.goodputs([first])[0].rate or scenario.first_rate
        best = study.tune(guess)
        low = study.tune(_LOW_SHARE * guess)
        candidates = {variant.name: variant for variant in (first, *best.values(), *low.values())}
        searched = study.goodputs(list(candidates.values()))
        goodputs = {
            policy: max((item for item in searched if item.variant.policy == policy), key=lambda item: item.rate)
            for policy in best
        }
        best["bros"] = goodputs["bros"].variant
        goodputs["bros"] = study.confirm(goodputs["bros"])
        rate = goodputs["bros"].rate or guess
        # Short runs flatter. What would put another policy above R* has to hold as R* does.
        goodputs = {
            policy: study.confirm(item) if policy != "bros" and item.rate > rate else item
            for policy, item in goodputs.items()
        }
        results = study.compare(rate, best)
        ceiling = study.ceiling(results)
        results = self._simulations.keep(charge(results, ceiling))
        self._print(scenario, rate, best, goodputs, results)
        write_json(
            self._simulations.folder / f"summary-{scenario.name.replace(' ', '')}.json",
            {
                "r_star": rate,
                "goodputs": {
                    policy: {"99": item.rate, "90": item.rate_90, "be_tokens_per_s": item.be_tokens_per_s}
                    for policy, item in goodputs.items()
                },
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
        goodputs: Mapping[str, Goodput],
        results: list[Result],
    ) -> None:
        show = self._console.print
        table = Table(*("policy", "at 99 %", "at 90 %", "BE tok/s at 99 %", "setting", "setting at R*"))
        table.title = f"{scenario.name}: goodput in RT/s; R* = {rate:.2f}"
        for policy, item in goodputs.items():
            figures = (f"{value:.2f}" for value in (item.rate, item.rate_90, item.be_tokens_per_s))
            table.add_row(policy, *figures, item.variant.name, best[policy].name)
        show(table)
        show(policy_table(f"{scenario.name}: all policies at R*", results))
        show(best_effort_table(f"{scenario.name}: best-effort throughput at R*", results))
        show(gate_table(f"{scenario.name}: gates", gates(rate, results, goodputs)))

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
                show(policy_table(f"one part off at a time: {condition}", results))
        if "burst" in parts:
            show(policy_table(f"{scenario.name}: burst, 10 x the rate for 20 s", study.burst(rate, best)))
        if "kv" in parts:
            for share, results in by_label(study.kv_pressure(rate, best), "kv_share").items():
                show(policy_table(f"{scenario.name}: {share} of the KV region", results))


def scheduler_cost() -> list[dict[str, float | str]]:
    """Microseconds of planning and committing a step with 256 running, over the length of the queue. Real time."""
    rows: list[dict[str, float | str]] = []
    for policy in ("bros", "fcfs"):
        for num_waiting in _QUEUES:
            both_s = [plan_s + commit_s for plan_s, commit_s in zip(*measure(policy, 256, num_waiting), strict=True)]
            p50, p99 = (1e6 * float(value) for value in np.percentile(both_s, [50, 99]))
            rows.append({"policy": policy, "num_waiting": num_waiting, "p50_us": p50, "p99_us": p99})
    return rows


def gates(
    rate: float, results: Iterable[Result], goodputs: Mapping[str, Goodput]
) -> list[tuple[str, float | None, str, float]]:
    """What must hold at R*, which is `rate`."""
    groups = by_label(results, "policy")

    def mean(policy: str, figure: str) -> float | None:
        values = [value for run in groups.get(policy, ()) if (value := run.figure(figure)) is not None]
        return fmean(values) if values else None

    def ratio(first: float | None, second: float | None) -> float | None:
        return first / second if first is not None and second else None

    def reduction(other: str) -> float | None:
        share = ratio(mean("bros", "rt_normalised_latency_s"), mean(other, "rt_normalised_latency_s"))
        return None if share is None else 1 - share

    def lead(policies: Iterable[str]) -> float | None:
        rates = [goodputs[policy].rate for policy in policies]
        return None if not rates else rate / max(rates) if max(rates) else math.inf

    others = [policy for policy in goodputs if policy != "bros"]
    # Who serves hardly any best-effort work has it easy.
    serving = [p for p in others if goodputs[p].be_tokens_per_s >= 0.5 * goodputs["bros"].be_tokens_per_s]
    be_tokens_per_s = mean("bros", "be_tokens_per_s")
    return [
        ("joint attainment of bros", attainment(groups.get("bros", [])), ">=", LEVEL),
        ("RT normalised latency, below fcfs by", reduction("fcfs"), ">=", 0.75),
        ("RT normalised latency, below rr by", reduction("rr"), ">=", 0.55),
        ("BE tokens/s, bros / fcfs charged", ratio(mean("bros", "be_charged"), mean("fcfs", "be_charged")), ">=", 0.97),
        ("BE tokens/s, bros / bound", ratio(be_tokens_per_s, mean("bros", "be_bound")), ">=", 0.9),
        ("BE tokens/s, bros / bound by memory too", ratio(be_tokens_per_s, mean("bros", "be_region_bound")), ">=", 0.9),
        ("R* / goodput of fcfs", lead(["fcfs"]), ">=", 3.0),
        ("R* / best other goodput", lead(others), ">=", 1.0),
        ("R* / best other goodput with half the BE tokens/s", lead(serving), ">=", 1.0),
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
            parts = options.parts if index == 0 else _FURTHER_PARTS.get(name, ())
            evaluation.run(SCENARIOS[name], parts)
    if "cost" in options.parts:  # after the others have ended: this is about real time
        write_json(simulations.folder / "cost.json", scheduler_cost())
    for path in draw_all(simulations.folder):
        console.print(str(path))


if __name__ == "__main__":
    main()
