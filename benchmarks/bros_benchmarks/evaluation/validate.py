"""Holds the simulator against a live server: `python -m bros_benchmarks.evaluation.validate`.

The simulated device is fitted to the steps of live runs at one rate; then a live run at another rate, with another
seed, is compared with its simulation under the same arrivals and lengths. The runs that are fitted to lie before and
after the one that is compared, since the machine may drift.
"""

from __future__ import annotations

import argparse
import math
import os
from bisect import bisect_right
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, median, stdev
from typing import Final

import numpy as np
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from bros_benchmarks.evaluation.live import default_setup, estimated_capacity, measured_targets
from bros_benchmarks.evaluation.live_runner import Contender, LiveRunner
from bros_benchmarks.evaluation.recorded_server import ServerLog
from bros_benchmarks.evaluation.recorder import read_json, read_records
from bros_router.scheduling.step_draft import SchedulerLimits
from bros_router.simulation.hardware import Fitted, Measurement, Resampled
from bros_router.simulation.record import RequestRecord, percentile_interval, summarise
from bros_router.simulation.replica import Timing
from bros_router.simulation.simulator import Setup, simulate
from bros_router.simulation.workload import Poisson, Workload

#: How far medians and throughput may differ.
_TOLERANCE: Final = 0.10
#: The launcher's defaults on a CPU.
_LIMITS: Final = SchedulerLimits(512, 256)
_MAX_LENGTH: Final = 8192


@dataclass(frozen=True, slots=True)
class Comparison:
    """One figure, live and simulated, in seconds or tokens a second."""

    name: str
    live: float
    simulated: float
    #: Between these the simulated value must lie.
    low: float
    high: float

    @property
    def holds(self) -> bool:
        """Whether it does."""
        return self.low <= self.simulated <= self.high


def compare(live: Sequence[RequestRecord], simulated: Sequence[RequestRecord], workload: Workload) -> list[Comparison]:
    """TTFT and TPOT of the real-time requests, and best-effort throughput, both over the workload's window."""
    window = workload.start_s, workload.stop_s
    comparisons = []
    figures: dict[str, Callable[[RequestRecord], float | None]] = {
        "TTFT": lambda record: record.ttft_s,
        "TPOT": lambda record: record.tpot_s,
    }
    for name, figure in figures.items():
        live_values, simulated_values = (_values(records, figure, *window) for records in (live, simulated))
        interval = percentile_interval(live_values, 99)
        if interval is None or not simulated_values:
            continue
        live_p50, live_p99, simulated_p50, simulated_p99 = (
            float(np.percentile(values, percent)) for values in (live_values, simulated_values) for percent in (50, 99)
        )
        comparisons.append(_within_tolerance(f"{name} p50", live_p50, simulated_p50))
        comparisons.append(Comparison(f"{name} p99", live_p99, simulated_p99, *interval))
    throughputs = [summarise(records, *window).be_tokens_per_s for records in (live, simulated)]
    comparisons.append(_within_tolerance("BE tokens/s", *throughputs))
    return comparisons


def _values(
    records: Iterable[RequestRecord], figure: Callable[[RequestRecord], float | None], start_s: float, stop_s: float
) -> list[float]:
    return [
        value
        for record in records
        if record.is_rt and start_s <= record.offered_s < stop_s and (value := figure(record)) is not None
    ]


def _within_tolerance(name: str, live: float, simulated: float) -> Comparison:
    return Comparison(name, live, simulated, live * (1 - _TOLERANCE), live * (1 + _TOLERANCE))


def client_delay_s(log: ServerLog, records: Iterable[RequestRecord], trace_start_s: float) -> float:
    """Median seconds from a client to the scheduler, plus those of a token from there to its client.

    Args:
        trace_start_s: when the trace started, by the clock of the log.
    """
    rt = [record for record in records if record.is_rt]
    offered_s = sorted(trace_start_s + record.offered_s for record in rt)
    token_s = [trace_start_s + value for record in rt for value in record.token_s]
    committed_s = [step.committed_s for step in log.steps]
    there = [added_s - sent_s for added_s, sent_s in zip(log.rt_added_s, offered_s, strict=False)]
    # A token belongs to the last step that had been committed when it came.
    back = [value - committed_s[bisect_right(committed_s, value) - 1] for value in token_s]
    return median(there) + median(back)


def comparison_table(comparisons: Iterable[Comparison]) -> Table:
    """A row each."""
    table = Table("figure", "live", "simulated", "difference", "must lie in", "holds")
    for item in comparisons:
        table.add_row(
            item.name,
            f"{item.live:.4g}",
            f"{item.simulated:.4g}",
            f"{100 * (item.simulated / item.live - 1):+.1f} %" if item.live else "–",
            f"{item.low:.4g} to {item.high:.4g}",
            "yes" if item.holds else "NO",
        )
    return table


def main() -> None:
    """Run, fit, run, simulate, compare."""
    from bros_benchmarks.checkpoint import SMOLLM2_135M, make_checkpoint  # loads torch: for this alone

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--policy", default="bros")
    parser.add_argument("--fit-share", type=float, default=0.3, help="rate of the fitted runs, of the capacity")
    parser.add_argument("--check-share", type=float, default=0.5, help="rate of the compared run")
    parser.add_argument("--seed", type=int, default=2, help="of the compared run; the fitted ones have the next two")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--folder", type=Path, default=Path("benchmarks/results/validation"))
    options = parser.parse_args()
    folder: Path = options.folder
    folder.mkdir(parents=True, exist_ok=True)
    model = make_checkpoint(SMOLLM2_135M, Path("benchmarks/results"))
    latency = measured_targets(model, options.threads, folder)
    setup = default_setup(model, options.threads, latency)
    capacity = estimated_capacity(latency, setup.rt_lengths)
    fit_rate, check_rate = options.fit_share * capacity, options.check_share * capacity
    contender = Contender(options.policy, options.policy)
    console = Console(width=140)
    with Progress(TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn(), console=console) as progress:
        runner = LiveRunner(setup, folder, progress)
        runner.run("fit", contender, fit_rate, options.seed + 1, is_recorded=True)
        runner.run("check", contender, check_rate, options.seed)
        runner.run("fit", contender, fit_rate, options.seed + 2, is_recorded=True)
    fits = [runner.folder_of("fit", contender, fit_rate, options.seed + index) for index in (1, 2)]
    logs = [ServerLog.read(fit / "server.json") for fit in fits]
    steps = [(step.shape, step.seconds) for log in logs for step in log.steps]
    client_s = fmean(
        client_delay_s(log, read_records(fit / "records.csv.gz"), read_json(fit / "setup.json")["trace_start_s"])
        for log, fit in zip(logs, fits, strict=True)
    )
    measurement = Measurement(
        name="live server",
        num_kv_tokens=setup.num_kv_slots,
        num_host_tokens=setup.num_kv_slots,
        max_length=_MAX_LENGTH,
        copies_overlap=False,  # a CPU copies between its steps
        can_interrupt=True,
        points=steps,
    )
    fitted = Fitted(measurement)
    workload = setup.workload(contender, Poisson(check_rate), options.seed)
    simulated = simulate(
        workload,
        Setup(policy=options.policy, limits=_LIMITS, block_size=setup.block_size, timing=Timing(client_s=client_s)),
        Resampled(fitted, options.seed),
    )
    live = read_records(runner.folder_of("check", contender, check_rate, options.seed) / "records.csv.gz")
    console.print(
        f"fitted to {len(steps)} steps at {fit_rate:.2f} RT/s (noise {100 * stdev(map(math.log, fitted.ratios)):.1f} %,"
        f" {1000 * client_s:.1f} ms between client and scheduler), compared at {check_rate:.2f} RT/s"
    )
    console.print(comparison_table(compare(live, simulated.records, workload)))


if __name__ == "__main__":
    main()
