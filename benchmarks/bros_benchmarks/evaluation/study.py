"""The simulated experiments of one scenario."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from statistics import fmean
from typing import Final

from bros_benchmarks.evaluation.bound import Ceiling, mixed_step, slopes_at
from bros_benchmarks.evaluation.effort import Effort
from bros_benchmarks.evaluation.goodput import LEVEL, GoodputSearch
from bros_benchmarks.evaluation.region_bound import RegionBound
from bros_benchmarks.evaluation.result import Label, Result, attainment
from bros_benchmarks.evaluation.scenario import Scenario, Variant, ablations, with_options
from bros_benchmarks.evaluation.simulation import Simulation
from bros_benchmarks.evaluation.simulations import Simulations, Task
from bros_router.kv.kv_manager import Preemption
from bros_router.scheduling.batch_cap import CapControl
from bros_router.simulation.hardware import HARDWARE, Hardware
from bros_router.simulation.simulator import Setup
from bros_router.simulation.workload import ClosedLoop, Poisson, burst

#: Resolution of a goodput.
_RATE_RATIO: Final = 1.05
#: Rates that are tried before a goodput that only short runs showed is taken for none.
_MOST_CONFIRMATIONS: Final = 20
#: Rates of the curves, and of the pure real-time runs, as shares of R*.
_RATE_SHARES: Final = (0.25, 0.5, 0.75, 1.0, 1.25, 1.5)
#: A burst is ten times the rate for twenty seconds; before and after it, this share of R*.
_BURST_SHARE: Final = 0.25
_BURST_START_S: Final = 150.0
_KV_SHARES: Final = (1.0, 0.75, 0.5, 0.35, 0.25)
_KV_RATE_SHARE: Final = 0.5
_SLO_SCALES: Final = (2.0, 5.0, 10.0, 25.0)
#: Targets of the ablation where time is scarce: so many times the unloaded latency.
_TIGHT_SCALE: Final = 3.0
#: Short runs do not wait for the very longest replies: what they leave unfinished counts as missed.
_SHORT_DRAIN_S: Final = 150.0
_SHORT_WARM_UP_S: Final = 30.0
#: About how long a best-effort sequence is: prompts of 512 to 1,024 tokens, replies of 32 to 128.
_BE_CONTEXT_TOKENS: Final = 800


@dataclass(frozen=True, slots=True)
class Goodput:
    """The highest rate that a variant sustains, in requests a second; 0: not even the lowest."""

    variant: Variant
    #: At 99 % joint attainment, and at 90 %.
    rate: float
    rate_90: float
    #: What best-effort work got at the first of these.
    be_tokens_per_s: float


class Study:
    """One scenario. Every experiment returns its results; all are kept in the folder of the simulations."""

    def __init__(self, simulations: Simulations, scenario: Scenario, effort: Effort) -> None:
        self._simulations = simulations
        self._scenario = scenario
        self._effort = effort

    # --- how good each policy can be

    def tune(self, rate: float) -> dict[str, Variant]:
        """The best setting of each policy at a rate."""
        variants = [variant for policy in self._effort.policies for variant in self._effort.variants_of(policy)]
        results = self._run("tuning", [(variant, rate) for variant in variants], self._effort.short_seeds[:1])
        best: dict[str, tuple[tuple[float, float], Variant]] = {}
        for variant, result in zip(variants, results, strict=True):
            merit = _merit(result)
            if variant.policy not in best or merit > best[variant.policy][0]:
                best[variant.policy] = merit, variant
        return {policy: variant for policy, (_, variant) in best.items()}

    def goodputs(self, variants: Sequence[Variant]) -> list[Goodput]:
        """How much each variant sustains; the searches take turns."""
        first = self._scenario.first_rate
        searches = {
            variant.name: GoodputSearch(first, _RATE_RATIO, lowest=0.02 * first, highest=20 * first)
            for variant in variants
        }
        by_name = {variant.name: variant for variant in variants}
        results: list[Result] = []
        while due := [(by_name[name], rate) for name, s in searches.items() if (rate := s.next_rate) is not None]:
            runs = self._run("search", due, self._effort.short_seeds)
            results += runs
            for variant, _ in due:
                share = attainment([run for run in runs if run.matches(policy=variant.name)])
                searches[variant.name].record(share or 0.0)
        return [self._goodput(by_name[name], search, results) for name, search in searches.items()]

    def _goodput(self, variant: Variant, search: GoodputSearch, results: Iterable[Result]) -> Goodput:
        rate = search.goodput(LEVEL)
        runs = [run for run in results if run.matches(policy=variant.name, rate=rate)]
        be_tokens_per_s = fmean(run.summary.be_tokens_per_s for run in runs) if runs else 0.0
        return Goodput(variant, rate, search.goodput(0.90), be_tokens_per_s)

    def confirm(self, goodput: Goodput) -> Goodput:
        """The highest rate, from that of the search downwards, at which the long runs hold the level too."""
        rate = goodput.rate
        for _ in range(_MOST_CONFIRMATIONS if rate else 0):
            results = self._run_long("confirmation", [goodput.variant], rate)
            if (attainment(results) or 0.0) >= LEVEL:
                be_tokens_per_s = fmean(run.summary.be_tokens_per_s for run in results)
                return replace(goodput, rate=rate, be_tokens_per_s=be_tokens_per_s)
            rate /= _RATE_RATIO
        return replace(goodput, rate=0.0, be_tokens_per_s=0.0)

    # --- at R*

    def compare(self, rate: float, best: Mapping[str, Variant]) -> list[Result]:
        """All policies side by side, real-time load alone, and best-effort load alone."""
        bros = best["bros"]
        results = self._run_long("common", best.values(), rate, lambda variant: variant.policy)
        alone = replace(self._scenario.base, be=())
        results += self._run_long("common", [bros], rate, lambda _: "RT alone", alone)
        results += self._run_long("common", [bros], 0.0, lambda _: "BE alone")
        return results

    def ceiling(self, results: Iterable[Result]) -> Ceiling:
        """What best-effort throughput is measured by, from the runs without real-time load."""
        be_only = [result for result in results if result.matches(policy="BE alone")]
        num_tokens, num_sequences, be_tokens_per_s = (
            fmean(result.figure(name) or 0.0 for result in be_only)
            for name in ("tokens_per_step", "sequences_per_step", "be_tokens_per_s")
        )
        base = mixed_step(num_tokens, num_sequences, _BE_CONTEXT_TOKENS)
        hardware = HARDWARE[self._scenario.base.hardware]
        return Ceiling(be_tokens_per_s, slopes_at(hardware, base), self._region_bound(hardware))

    def _region_bound(self, hardware: Hardware) -> RegionBound | None:
        """For a closed loop, which always has more to do."""
        scenario = self._scenario.base
        if not isinstance(scenario.be, ClosedLoop):
            return None
        _, tpot_s = scenario.targets_by_length()(1)
        return RegionBound(hardware, hardware.num_kv_tokens, scenario.be.lengths.means(), tpot_s)

    def ablate(self, rate: float, bros: Variant) -> list[Result]:
        """One part off at a time: at R*, in overload, with a quarter of the KV region, and with tight targets.

        A small token budget keeps steps short by itself, so the last is with the largest.
        """
        scenario = self._scenario.base
        limits = replace(bros.setup.limits, max_batch_tokens=max(self._effort.budgets))
        wide = replace(bros, setup=replace(bros.setup, limits=limits))
        conditions = {
            "R*": (rate, bros, scenario),
            "1.3 R*": (1.3 * rate, bros, scenario),
            "R*/2, a quarter of the KV": (0.5 * rate, self._with_kv(bros, 0.25), scenario),
            "R*/2, tight targets": (0.5 * rate, wide, replace(scenario, targets=_TIGHT_SCALE)),
        }
        results = []
        for condition, (condition_rate, variant, base) in conditions.items():
            pairs = [(ablated, condition_rate) for ablated in ablations(variant.setup)]
            name = f"{self._scenario.name}, {condition}"
            results += self._run("ablation", pairs, self._effort.short_seeds, base, condition=name)
        return results

    # --- curves

    def rates(self, rate: float, best: Mapping[str, Variant]) -> list[Result]:
        """All policies over the rate."""
        pairs = [(_named(variant), share * rate) for share in _RATE_SHARES for variant in best.values()]
        return self._run("rates", pairs, self._effort.short_seeds)

    def pure_rt(self, rate: float, best: Mapping[str, Variant]) -> list[Result]:
        """Without best-effort load, over the rate."""
        names = [name for name in ("bros", "bros-paper", "fcfs", "tgi") if name in best]
        pairs = [(_named(best[name]), share * rate) for share in _RATE_SHARES for name in names]
        return self._run("pure-rt", pairs, self._effort.short_seeds, replace(self._scenario.base, be=()))

    def slo_scales(self, rate: float, best: Mapping[str, Variant]) -> list[Result]:
        """All policies over the tightness of the targets."""
        results = []
        for scale in _SLO_SCALES:
            base = replace(self._scenario.base, targets=scale)
            pairs = [(_named(variant), rate) for variant in best.values()]
            results += self._run("slo", pairs, self._effort.short_seeds, base, slo_scale=scale)
        return results

    def burst(self, rate: float, best: Mapping[str, Variant]) -> list[Result]:
        """Ten times the rate for twenty seconds, with the adaptive cap and without."""
        bros = best["bros"]
        controls = {"bros": None, "bros, cap aimd": CapControl.AIMD, "bros, cap reset": CapControl.RESET}
        variants = [Variant(name, _with_cap(bros, control)) for name, control in controls.items()]
        variants += [_named(best[name]) for name in ("fcfs", "static") if name in best]
        base = replace(
            self._scenario.base,
            arrivals=burst(_BURST_SHARE * rate, self._scenario.base.warm_up_s + _BURST_START_S),
            duration_s=300.0,
            keeps_series=True,
        )
        tasks: list[Task] = [
            (self._labels("burst", variant.name, _BURST_SHARE * rate), replace(base, setup=variant.setup, seed=seed))
            for variant in variants
            for seed in self._effort.seeds
        ]
        return self._simulations.run(self._describe("burst"), tasks)

    def kv_pressure(self, rate: float, best: Mapping[str, Variant]) -> list[Result]:
        """A smaller and smaller KV region, with every way of taking memory."""
        modes = {
            "bros": Preemption.BIDIR,
            "bros, block": Preemption.BLOCK,
            "bros, recompute": Preemption.RECOMPUTE,
        }
        bros = best["bros"].setup
        variants = [Variant(name, with_options(bros, preemption=mode)) for name, mode in modes.items()]
        variants += [_named(best[name]) for name in ("fcfs", "static", "bros-paper") if name in best]
        results = []
        for share in _KV_SHARES:
            pairs = [(self._with_kv(variant, share), _KV_RATE_SHARE * rate) for variant in variants]
            results += self._run("kv", pairs, self._effort.short_seeds, kv_share=share)
        return results

    # --- mechanism

    def _run(
        self,
        experiment: str,
        pairs: Iterable[tuple[Variant, float]],
        seeds: Sequence[int],
        base: Simulation | None = None,
        **labels: Label,
    ) -> list[Result]:
        """Short runs of (variant, rate) pairs."""
        base = replace(
            base or self._scenario.base,
            warm_up_s=_SHORT_WARM_UP_S,
            duration_s=self._effort.short_s,
            drain_s=_SHORT_DRAIN_S,
        )
        tasks = [
            (
                {**self._labels(experiment, variant.name, rate), **labels},
                replace(base, setup=variant.setup, arrivals=Poisson(rate), seed=seed),
            )
            for variant, rate in pairs
            for seed in seeds
        ]
        return self._simulations.run(self._describe(experiment), tasks)

    def _run_long(
        self,
        experiment: str,
        variants: Iterable[Variant],
        rate: float,
        name_of: Callable[[Variant], str] = lambda variant: variant.name,
        base: Simulation | None = None,
    ) -> list[Result]:
        base = replace(base or self._scenario.base, duration_s=self._effort.duration_s, arrivals=Poisson(rate))
        tasks = [
            (
                {**self._labels(experiment, name_of(variant), rate), "setting": variant.name},
                replace(base, setup=variant.setup, seed=seed),
            )
            for variant in variants
            for seed in self._effort.seeds
        ]
        return self._simulations.run(self._describe(experiment), tasks)

    def _labels(self, experiment: str, policy: str, rate: float) -> dict[str, Label]:
        return {"experiment": experiment, "scenario": self._scenario.name, "policy": policy, "rate": rate}

    def _describe(self, experiment: str) -> str:
        return f"{self._scenario.name}: {experiment}"

    def _with_kv(self, variant: Variant, share: float) -> Variant:
        num_tokens = int(share * HARDWARE[self._scenario.base.hardware].num_kv_tokens)
        return replace(variant, setup=replace(variant.setup, num_kv_tokens=num_tokens))


def _merit(result: Result) -> tuple[float, float]:
    """Targets first. Among settings that keep them, best-effort throughput; among those that do not, latency."""
    share = result.summary.joint_attainment or 0.0
    if share >= LEVEL:
        return LEVEL, result.summary.be_tokens_per_s
    return share, -(result.summary.rt_normalised_latency_s or 1e9)


def _named(variant: Variant) -> Variant:
    """Under the name of its policy, as figures show it."""
    return replace(variant, name=variant.policy)


def _with_cap(variant: Variant, control: CapControl | None) -> Setup:
    if control is None:
        return variant.setup
    return with_options(variant.setup, bros=replace(variant.setup.options.bros, cap_control=control))
