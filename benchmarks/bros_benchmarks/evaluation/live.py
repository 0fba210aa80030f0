"""`make eval-live`: real servers under real-time and best-effort load over HTTP, policy against policy.

In this order: targets from an idle server; token budget and cap of every baseline; goodput of `fcfs`, `static` and
`bros`, and of `bros` without best-effort load; all policies at the rate that `bros` sustains; a burst. Runs of
different policies take turns, since the machine may be shared and its speed may drift. What a run gave is kept, so
an evaluation that was stopped goes on where it was (`--folder`).
"""

from __future__ import annotations

import argparse
import asyncio
import os
import time
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import fmean
from typing import Final

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from bros_benchmarks.evaluation import targets
from bros_benchmarks.evaluation.bound import Ceiling, charge
from bros_benchmarks.evaluation.figures import draw_all
from bros_benchmarks.evaluation.goodput import LEVEL, GoodputSearch
from bros_benchmarks.evaluation.live_runner import DURATION_S, WARM_UP_S, Contender, LiveRunner, LiveSetup
from bros_benchmarks.evaluation.recorder import describe_machine, read_json, write_json
from bros_benchmarks.evaluation.result import Result, by_label, estimate
from bros_benchmarks.evaluation.tables import best_effort_table, gate_table, policy_table
from bros_benchmarks.evaluation.targets import ScaledTargets, UnloadedLatency
from bros_benchmarks.server_under_test import ServerUnderTest
from bros_router.simulation.workload import BE, SHAREGPT, Lengths, burst

#: Real-time requests are cut here: the longest reply, written at the pace of its target, must end within the drain.
_MAX_TOTAL_TOKENS: Final = 512
#: Multiple of the unloaded latency that is the target (Sarathi's "strict").
_SLO_SCALE: Final = 5.0
#: Token budgets of a step that a baseline may choose from. The KV region holds too few sequences for a cap to matter.
_BUDGETS: Final = (128, 512)
#: What some may choose besides.
_OWN_CHOICES: Final = {
    "static": tuple(("--static-be-requests", count) for count in ("4", "8", "16")),
    "priority": tuple(("--priority-preemption", mode) for mode in ("kv", "full")),
}
_BASELINES: Final = ("fcfs", "static", "priority", "edf", "rr", "tgi")
_OURS: Final = ("bros", "bros-paper")
_SEEDS: Final = (1, 2, 3)
#: Resolution of a goodput; where the search begins and how far it goes, as shares of the estimated capacity.
_RATE_RATIO: Final = 1.1
_FIRST: Final = 0.4
_LOWEST, _HIGHEST = 0.1, 4.0
#: A burst is ten times the rate for twenty seconds; before and after it, this share of what `bros` sustains.
_BURST_BASE_SHARE: Final = 0.25
_BURST_START_S: Final = 35.0
#: What an evaluation does, in this order.
_PARTS: Final = ("tune", "search", "compare", "burst")
#: `bros` as it is, and with an adaptive batch cap.
_BURST_FLAGS: Final = {"bros": (), "bros, cap aimd": ("--batch-size-control", "aimd")}


@dataclass(frozen=True, slots=True)
class Plan:
    """How much is run."""

    policies: tuple[str, ...]
    seeds: tuple[int, ...]
    #: Of `_PARTS`.
    parts: tuple[str, ...]
    #: Of the comparison, and four times that of the burst's base; `None`: the goodput of `bros`, by search.
    rate: float | None


class Evaluation:
    """The whole evaluation of one set-up."""

    def __init__(self, runner: LiveRunner, progress: Progress, plan: Plan, capacity: float) -> None:
        """`capacity`: real-time requests a second that the device can about do."""
        self._runner = runner
        self._progress = progress
        self._plan = plan
        self._capacity = capacity
        self._flags: dict[str, tuple[str, ...]] = {}

    def tune(self) -> list[Result]:
        """Find each baseline's best budget and cap: most requests inside their targets, then the lowest latency."""
        baselines = [policy for policy in self._plan.policies if policy in _BASELINES]
        variants = [variant for policy in baselines for variant in _variants(policy)]
        runner = self._runner.shortened(warm_up_s=10.0, duration_s=30.0, drain_s=30.0)
        pairs = [(variant, 0.5 * self._capacity) for variant in variants]
        results = self._run_in_turn("tuning", pairs, self._plan.seeds[:1], runner)
        for policy in baselines:
            tried = [
                (_merit(run), variant.flags)
                for variant, run in zip(variants, results, strict=True)
                if variant.scheduler == policy
            ]
            self._flags[policy] = max(tried)[1]
        return results

    def search(self) -> tuple[dict[str, GoodputSearch], list[Result]]:
        """Goodput by contender, the searches taking turns."""
        contenders = {
            contender.name: contender
            for contender in (
                *(self._contender(policy) for policy in ("fcfs", "static", "bros") if policy in self._plan.policies),
                self._alone(),
            )
        }
        searches = {
            name: GoodputSearch(
                _FIRST * self._capacity,
                _RATE_RATIO,
                levels=(LEVEL,),
                lowest=_LOWEST * self._capacity,
                highest=_HIGHEST * self._capacity,
            )
            for name in contenders
        }
        # Whether targets are met shows long before best-effort throughput is steady.
        runner = self._runner.shortened(warm_up_s=30.0, duration_s=60.0)
        results: list[Result] = []
        while due := [(contenders[name], rate) for name, s in searches.items() if (rate := s.next_rate) is not None]:
            for (contender, rate), runs in self._run_until_decided(due, runner).items():
                results += runs
                searches[contender.name].record(self._attainable(contender, rate, runs, runner))
        return searches, results

    def _run_until_decided(
        self, due: Sequence[tuple[Contender, float]], runner: LiveRunner
    ) -> dict[tuple[Contender, float], list[Result]]:
        """Seed after seed, without those that miss the level already, whatever the seeds that are left give."""
        runs: dict[tuple[Contender, float], list[Result]] = {pair: [] for pair in due}
        for seed in self._plan.seeds:
            undecided = [pair for pair in due if self._attainable(*pair, runs[pair], runner) >= LEVEL]
            for pair, result in zip(undecided, self._run_in_turn("rates", undecided, (seed,), runner), strict=True):
                runs[pair].append(result)
        return runs

    def _attainable(self, contender: Contender, rate: float, runs: Sequence[Result], runner: LiveRunner) -> float:
        """Joint attainment over all seeds if those that were not run miss nothing."""
        num_offered = sum(runner.num_offered(contender, rate, seed) for seed in self._plan.seeds)
        num_missed = sum(round(run.summary.num_rt * (1.0 - (run.summary.joint_attainment or 0.0))) for run in runs)
        return 1.0 - num_missed / max(1, num_offered)

    def compare(self, rate: float) -> list[Result]:
        """Everybody at one rate; real-time load alone and best-effort load alone beside them."""
        pairs = [(self._contender(policy), rate) for policy in self._plan.policies]
        pairs += [(self._alone(), rate), (replace(self._contender("bros"), name="BE alone", has_rt=False), 0.0)]
        results = self._run_in_turn("common", pairs, self._plan.seeds)
        be_only = [result.summary.be_tokens_per_s for result in results if result.matches(policy="BE alone")]
        return charge(results, Ceiling(fmean(be_only), self._runner.setup.targets.latency.slopes))

    def burst(self, rate: float) -> list[Result]:
        """Ten times the rate for twenty seconds."""
        results = []
        arrivals = burst(rate, _BURST_START_S)
        for seed in self._plan.seeds:
            for name, flags in _BURST_FLAGS.items():
                contender = Contender(name, "bros", flags)
                results.append(self._runner.run("burst", contender, rate, seed, arrivals))
        return results

    def _contender(self, policy: str) -> Contender:
        return Contender(policy, policy, self._flags.get(policy, ()))

    def _alone(self) -> Contender:
        return replace(self._contender("bros"), name="RT alone", has_be=False)

    def _run_in_turn(
        self,
        experiment: str,
        pairs: Sequence[tuple[Contender, float]],
        seeds: Sequence[int],
        runner: LiveRunner | None = None,
    ) -> list[Result]:
        """A, B, C, A, B, C: so drift of the machine falls on all alike."""
        runner = runner or self._runner
        task = self._progress.add_task(f"[bold]{experiment}", total=len(pairs) * len(seeds))
        results = []
        for seed in seeds:
            for contender, rate in pairs:
                results.append(runner.run(experiment, contender, rate, seed))
                self._progress.advance(task)
        self._progress.remove_task(task)
        return results


def _variants(policy: str) -> list[Contender]:
    """Every setting of a baseline that is tried."""
    return [
        Contender(" ".join((policy, str(budget), *own[1:])), policy, ("--max-batch-prefill-tokens", str(budget), *own))
        for budget in _BUDGETS
        for own in _OWN_CHOICES.get(policy, ((),))
    ]


def _merit(run: Result) -> tuple[float, float, float]:
    """What a baseline is tuned for: targets first, then latency (where all miss, it still tells), then work done."""
    summary = run.summary
    latency_s = summary.rt_normalised_latency_s
    return summary.joint_attainment or 0.0, -(latency_s or 1e9), summary.be_tokens_per_s


def estimated_capacity(latency: UnloadedLatency, lengths: Lengths) -> float:
    """Requests a second if the device did nothing but these, 32 at a time: where searches begin."""
    num_prompt_tokens, num_output_tokens = lengths.means()
    return 1 / (latency.ttft_token_s * num_prompt_tokens + latency.decode_step_s / 32 * num_output_tokens)


def default_setup(model: Path, num_threads: int, latency: UnloadedLatency) -> LiveSetup:
    """The evaluation as it is run unless told otherwise."""
    return LiveSetup(
        model=model,
        num_threads=num_threads,
        rt_lengths=SHAREGPT.cut(_MAX_TOTAL_TOKENS),
        be_lengths=BE,
        targets=ScaledTargets(latency, _SLO_SCALE),
    )


def measured_targets(model: Path, num_threads: int, folder: Path) -> UnloadedLatency:
    """Measured once for an evaluation, on an idle server without limits, and used for all policies."""
    path = folder / "targets.json"
    if not path.exists():
        with ServerUnderTest(model, num_threads, folder / "targets.log") as server:
            latency = asyncio.run(targets.measure(server.url))
        write_json(path, {"latency": asdict(latency), "machine": describe_machine()})
    return UnloadedLatency(**read_json(path)["latency"])


def gates(results: Iterable[Result], goodputs: dict[str, float]) -> list[tuple[str, float | None, str, float]]:
    """What must hold, from the runs at one rate and the goodputs (empty where none were searched)."""
    groups = by_label(results, "policy")

    def mean(policy: str, figure: str) -> float | None:
        value = estimate(run.figure(figure) for run in groups.get(policy, ()))
        return None if value is None else value.mean

    def ratio(first: float | None, second: float | None) -> float | None:
        return first / second if first is not None and second else None

    be_ratio = ratio(mean("bros", "be_tokens_per_s"), mean("fcfs", "be_tokens_per_s"))
    charged_ratio = ratio(mean("bros", "be_charged"), mean("fcfs", "be_charged"))
    ttft_ratio = ratio(mean("bros", "rt_ttft_p99_s"), mean("RT alone", "rt_ttft_p99_s"))
    return [
        ("BE tokens/s, bros / fcfs", be_ratio, ">=", 0.95),
        ("BE tokens/s, bros / fcfs charged", charged_ratio, ">=", 0.95),
        ("RT p99 TTFT, bros / RT alone", ttft_ratio, "<=", 2.0),
        ("RT goodput, bros / RT alone", ratio(goodputs.get("bros"), goodputs.get("RT alone")), ">=", 0.85),
        ("RT goodput, bros / fcfs", ratio(goodputs.get("bros"), goodputs.get("fcfs")), ">=", 3.0),
    ]


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="one short run each of fcfs, bros and RT alone")
    parser.add_argument("--policies", nargs="+", default=[*_BASELINES, *_OURS])
    parser.add_argument("--seeds", nargs="+", type=int, default=_SEEDS)
    parser.add_argument("--parts", nargs="+", choices=_PARTS, default=_PARTS)
    parser.add_argument("--rate", type=float, help="compare at this rate instead of the goodput that `bros` has")
    parser.add_argument("--warm-up", type=float, default=WARM_UP_S, help="seconds, of the comparison")
    parser.add_argument("--duration", type=float, default=DURATION_S, help="seconds, of the comparison")
    parser.add_argument("--slo-scale", type=float, default=_SLO_SCALE)
    parser.add_argument("--num-be", type=int, default=64)
    parser.add_argument("--kv-share", type=float, default=0.4)
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    default_folder = Path("benchmarks/results/live") / time.strftime("%Y%m%d-%H%M%S")
    parser.add_argument("--folder", type=Path, default=default_folder, help="one that exists is gone on with")
    options = parser.parse_args()
    if options.rate is None and not options.quick and "search" not in options.parts:
        parser.error("without a search, --rate must say at which rate")
    return options


def main() -> None:
    """Run the evaluation and print its tables."""
    from bros_benchmarks.checkpoint import SMOLLM2_135M, make_checkpoint  # loads torch: for this alone

    options = _parse()
    folder: Path = options.folder
    folder.mkdir(parents=True, exist_ok=True)
    model = make_checkpoint(SMOLLM2_135M, Path("benchmarks/results"))
    console = Console(width=200)
    latency = measured_targets(model, options.threads, folder)
    setup = replace(
        default_setup(model, options.threads, latency),
        targets=ScaledTargets(latency, options.slo_scale),
        num_be=options.num_be,
        kv_share=options.kv_share,
        warm_up_s=options.warm_up,
        duration_s=options.duration,
    )
    capacity = estimated_capacity(latency, setup.rt_lengths)
    plan = Plan(tuple(options.policies), tuple(options.seeds), tuple(options.parts), options.rate)
    if options.quick:
        setup = replace(setup, warm_up_s=5.0, duration_s=20.0)
        plan = Plan(("fcfs", "bros"), plan.seeds[:1], ("compare",), plan.rate or 0.4 * capacity)
    console.print(
        f"targets at scale {options.slo_scale:g}: TTFT {options.slo_scale * latency.ttft_fixed_s:.3f} s"
        f" + {1000 * options.slo_scale * latency.ttft_token_s:.2f} ms a prompt token,"
        f" TPOT {options.slo_scale * latency.decode_step_s:.3f} s; KV region {setup.num_kv_slots} tokens;"
        f" estimated capacity {capacity:.2f} RT/s; results in {folder}"
    )
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console, refresh_per_second=1) as progress:
        evaluate(Evaluation(LiveRunner(setup, folder, progress), progress, plan, capacity), plan, console)
    for path in draw_all(folder):
        console.print(str(path))


def evaluate(evaluation: Evaluation, plan: Plan, console: Console) -> None:
    """All parts, each printed when it is done."""
    goodputs: dict[str, float] = {}
    if "tune" in plan.parts:
        console.print(policy_table("baselines, by setting", evaluation.tune()))
    if "search" in plan.parts:
        searches, results = evaluation.search()
        console.print(policy_table("goodput search", results))
        for name, search in searches.items():
            goodputs[name] = search.goodput(LEVEL)
            console.print(f"{name}: goodput {goodputs[name]:.2f}/s at 99 %")
    rate = plan.rate or goodputs.get("bros") or 0.5 * max(goodputs.values())
    if "compare" in plan.parts:
        results = evaluation.compare(rate)
        console.print(policy_table(f"all policies at {rate:.2f} RT/s", results))
        console.print(best_effort_table("best-effort throughput", results))
        console.print(gate_table("gates", gates(results, goodputs)))
    if "burst" in plan.parts:
        console.print(policy_table("burst: 10 x the rate for 20 s", evaluation.burst(_BURST_BASE_SHARE * rate)))


if __name__ == "__main__":
    main()
