"""`bros simulate`: one simulated run from the command line."""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import Any, Final

import click
import msgspec
import numpy as np
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from bros_router.admission import AdmissionPolicy
from bros_router.kv.kv_manager import Preemption
from bros_router.scheduling.batch_cap import CapControl
from bros_router.scheduling.policies.bros import BrosOptions
from bros_router.scheduling.policies.registry import POLICY_NAMES, PolicyOptions
from bros_router.scheduling.step_draft import SchedulerLimits
from bros_router.simulation.fleet import DISPATCHERS, simulate_fleet
from bros_router.simulation.hardware import HARDWARE, Fitted, Hardware, Noisy, Resampled, scaled_targets
from bros_router.simulation.record import Summary
from bros_router.simulation.replica import Timing
from bros_router.simulation.simulator import Run, Setup
from bros_router.simulation.workload import (
    LENGTHS,
    ArrivalProcess,
    BatchDump,
    ClosedLoop,
    Gamma,
    Lengths,
    Poisson,
    Workload,
    burst,
    fixed_targets,
    llm_d_wave,
    make_workload,
    square_wave,
)

#: What `--arrivals` may say: the process at a rate, with a warm-up of so many seconds.
_ARRIVALS: Final[dict[str, Callable[[float, float], ArrivalProcess]]] = {
    "poisson": lambda rate, warm_up_s: Poisson(rate),
    "gamma2": lambda rate, warm_up_s: Gamma(rate, 2),
    "gamma4": lambda rate, warm_up_s: Gamma(rate, 4),
    "square": lambda rate, warm_up_s: square_wave(rate),
    "wave": lambda rate, warm_up_s: llm_d_wave(rate / 15),
    "burst": lambda rate, warm_up_s: burst(rate, warm_up_s + 60.0),
}

#: What `--without` may say: what the `bros` policy can switch off.
_FEATURES: Final = tuple(item.name for item in fields(BrosOptions) if item.default is True)

#: A run shorter than this needs no progress bar.
_QUIET_S: Final = 2.0


def _hardware_of(context: click.Context, parameter: click.Parameter, value: str) -> Hardware:
    """One of the hardwares written down, or a JSON file of measured steps."""
    if value in HARDWARE:
        return HARDWARE[value]
    try:
        return Fitted.read(Path(value))
    except (OSError, msgspec.MsgspecError, ValueError) as error:
        raise click.BadParameter(
            f"{value} is none of {', '.join(HARDWARE)}, nor a file of measured steps: {error}"
        ) from None


def _dumps_of(context: click.Context, parameter: click.Parameter, values: tuple[str, ...]) -> list[tuple[int, float]]:
    """(number of requests, time) of each: `200@30` is 200 requests 30 s after the start."""
    matches = [re.fullmatch(r"(\d+)@(\d+(?:\.\d+)?)", value) for value in values]
    if None in matches:
        raise click.BadParameter("200@30 is 200 requests 30 s after the start.")
    return [(int(match[1]), float(match[2])) for match in matches if match is not None]


def simulate_command() -> click.Command:
    """The command that simulates."""
    return click.Command(
        "simulate",
        callback=_simulate,
        params=_options(),
        help="Simulate a server: its own scheduler on devices that exist only as numbers. Results go to stdout.",
        context_settings={"max_content_width": 110, "show_default": True},
    )


def _options() -> list[click.Parameter]:
    positive, at_least_0 = click.FloatRange(0, min_open=True), click.FloatRange(0)
    lengths = click.Choice(sorted(LENGTHS))
    return [
        click.Option(
            ["--hardware"],
            callback=_hardware_of,
            metavar="NAME|FILE",
            default="opt-13b",
            help=f"{', '.join(HARDWARE)}, or a JSON file of measured steps.",
        ),
        click.Option(["--replicas"], type=click.IntRange(1, 1000), default=1, help="Servers behind one router."),
        click.Option(
            ["--dispatch"], type=click.Choice(list(DISPATCHERS)), default="slack", help="How that router chooses."
        ),
        click.Option(["--scheduler"], type=click.Choice(list(POLICY_NAMES)), default="bros"),
        click.Option(
            ["--without"], type=click.Choice(_FEATURES), multiple=True, help="Switch a feature of `bros` off."
        ),
        click.Option(["--batch-size-control"], type=click.Choice([item.value for item in CapControl]), default="off"),
        click.Option(["--kv-preemption"], type=click.Choice([item.value for item in Preemption]), default="bidir"),
        click.Option(["--kv-checkpoints"], type=click.Choice(["lazy", "background"]), default="lazy"),
        click.Option(["--kv-share"], type=positive, default=1.0, help="Of the hardware's KV region, what is used."),
        click.Option(
            ["--admission-policy"], type=click.Choice([item.value for item in AdmissionPolicy]), default="queue"
        ),
        click.Option(["--static-be-requests"], type=click.IntRange(0), default=8, help="For `static`."),
        click.Option(
            ["--priority-preemption"], type=click.Choice(["kv", "full"]), default="kv", help="For `priority`."
        ),
        click.Option(["--block-size"], type=click.IntRange(1), default=16),
        click.Option(
            ["--max-batch-prefill-tokens"], type=click.IntRange(1), default=2048, help="Token budget of a step."
        ),
        click.Option(["--max-batch-size"], type=click.IntRange(1), default=256, help="Most sequences of a step."),
        click.Option(["--steps-in-flight"], type=click.IntRange(1, 2), default=2),
        click.Option(["--rate"], type=at_least_0, default=5.0, help="Real-time requests a second, all replicas."),
        click.Option(["--arrivals"], type=click.Choice(list(_ARRIVALS)), default="poisson"),
        click.Option(["--lengths"], type=lengths, default="sharegpt", help="Of real-time requests."),
        click.Option(["--ttft-ms"], type=positive, default=400.0, help="Target for the first token."),
        click.Option(["--tpot-ms"], type=positive, default=200.0, help="Target for each later one."),
        click.Option(
            ["--slo-scale"],
            type=positive,
            help="Instead: targets of so many times the unloaded latency of the hardware.",
        ),
        click.Option(
            ["--be-requests"], type=click.IntRange(0), default=64, help="Best-effort requests in the system, always."
        ),
        click.Option(["--be-groups"], is_flag=True, help="They come in groups: the next when the last has ended."),
        click.Option(
            ["--be-dump"],
            callback=_dumps_of,
            metavar="N@SECONDS",
            multiple=True,
            help="Instead: so many at once, at that second.",
        ),
        click.Option(["--be-lengths"], type=lengths, default="be"),
        click.Option(["--duration"], type=positive, default=600.0, help="Seconds that are judged."),
        click.Option(["--warm-up"], type=at_least_0, default=60.0, help="Seconds before these."),
        click.Option(["--seed"], type=int, default=0),
        click.Option(["--noise"], type=at_least_0, help="Sigma of step times; default: as measured, or none."),
        click.Option(["--json", "as_json"], is_flag=True, help="Print JSON."),
    ]


def _simulate(hardware: Hardware, replicas: int, dispatch: str, as_json: bool, **values: Any) -> None:
    setup = _setup_of(hardware, values)
    try:
        workload = _workload_of(hardware, values)
    except ValueError as error:
        raise click.UsageError(str(error)) from None
    sigma, seed = values["noise"], values["seed"]

    def hardware_of(index: int) -> Hardware:
        if sigma is None:
            return Resampled(hardware, seed, index) if isinstance(hardware, Fitted) else hardware
        return Noisy(hardware, sigma, seed, index)

    began_s = time.perf_counter()
    with _progress(workload) as on_progress:
        run = simulate_fleet(workload, setup, hardware_of, replicas, DISPATCHERS[dispatch](), on_progress)
    seconds = time.perf_counter() - began_s
    if as_json:
        report = {
            "hardware": hardware.name,
            "replicas": replicas,
            "setup": asdict(setup),
            "summary": asdict(run.summary()),
            "steps": _steps_of(run),
            "real_s": seconds,
        }
        click.echo(msgspec.json.format(msgspec.json.encode(report), indent=2).decode())
    else:
        title = f"{setup.policy} on {replicas} x ({hardware.name}), {workload.duration_s:g} s"
        Console().print(_table(title, run, seconds))


def _setup_of(hardware: Hardware, values: dict[str, Any]) -> Setup:
    bros = replace(
        BrosOptions(),
        cap_control=CapControl(values["batch_size_control"]),
        checkpoints=values["kv_checkpoints"] == "background",
        **dict.fromkeys(values["without"], False),
    )
    return Setup(
        policy=values["scheduler"],
        options=PolicyOptions(
            bros=bros,
            preemption=Preemption(values["kv_preemption"]),
            static_be_requests=values["static_be_requests"],
            priority_preempts_when_full=values["priority_preemption"] == "full",
        ),
        limits=SchedulerLimits(values["max_batch_prefill_tokens"], values["max_batch_size"]),
        block_size=values["block_size"],
        num_kv_tokens=int(values["kv_share"] * hardware.num_kv_tokens),
        admission_policy=AdmissionPolicy(values["admission_policy"]),
        timing=Timing(max_steps_in_flight=values["steps_in_flight"]),
    )


def _workload_of(hardware: Hardware, values: dict[str, Any]) -> Workload:
    """Raises `ValueError` where the hardware's longest sequence is too short for the lengths."""
    if values["slo_scale"] is None:
        targets = fixed_targets(values["ttft_ms"] / 1000, values["tpot_ms"] / 1000)
    else:
        targets = scaled_targets(hardware, values["slo_scale"], values["max_batch_prefill_tokens"])
    be_lengths = _lengths_of(hardware, values, "be_lengths")
    be: ClosedLoop | tuple[BatchDump, ...] = ClosedLoop(values["be_requests"], be_lengths, values["be_groups"])
    if values["be_dump"]:
        be = tuple(BatchDump(time_s, num_requests, be_lengths) for num_requests, time_s in values["be_dump"])
    return make_workload(
        values["seed"],
        arrivals=_ARRIVALS[values["arrivals"]](values["rate"], values["warm_up"]),
        rt_lengths=_lengths_of(hardware, values, "lengths"),
        targets=targets,
        be=be,
        duration_s=values["duration"],
        warm_up_s=values["warm_up"],
    )


def _lengths_of(hardware: Hardware, values: dict[str, Any], name: str) -> Lengths:
    return LENGTHS[values[name]].cut(min(hardware.max_length, int(values["kv_share"] * hardware.num_kv_tokens)))


@contextmanager
def _progress(workload: Workload) -> Iterator[Callable[[float], None]]:
    """A bar on stderr, once the run has taken a moment."""
    began_s = time.perf_counter()
    with Progress(console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("simulating", total=workload.stop_s, visible=False)

        def show(now_s: float) -> None:
            is_slow = time.perf_counter() - began_s > _QUIET_S
            bar.update(task, completed=min(now_s, workload.stop_s), visible=is_slow)

        yield show


def _steps_of(run: Run) -> dict[str, float | None]:
    """About the steps of all replicas; shares and errors are means over these."""
    window = run.workload.start_s, run.workload.stop_s
    planning_us = 1e6 * np.concatenate([np.asarray(log.planning_s) for log in run.logs])
    return {
        "num_steps": sum(map(len, run.logs)),
        "busy_share": _mean([log.busy_share(*window) for log in run.logs]),
        "prediction_error": _mean([log.prediction_error(*window) for log in run.logs]),
        "rt_kv_share": _mean([log.mean_rt_kv_share(*window) for log in run.logs]),
        "planning_p50_us": float(np.percentile(planning_us, 50)) if len(planning_us) else None,
        "planning_p99_us": float(np.percentile(planning_us, 99)) if len(planning_us) else None,
    }


def _mean(values: list[float | None] | list[float]) -> float | None:
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else None


def _table(title: str, run: Run, seconds: float) -> Table:
    summary, steps = run.summary(), _steps_of(run)
    table = Table(title=title, show_header=False, title_justify="left")
    table.add_column()
    table.add_column(justify="right")
    for rows in (_rt_rows(summary), _be_rows(summary), _step_rows(steps)):
        for name, value in rows:
            table.add_row(name, value)
        table.add_section()
    table.add_row("simulated in", f"{seconds:.1f} s")
    return table


def _rt_rows(summary: Summary) -> list[tuple[str, str]]:
    return [
        ("real-time requests offered", str(summary.num_rt)),
        ("  that met TTFT, TPOT, both", _shares(summary)),
        ("  that ended otherwise than finished", str(summary.num_rt - summary.rt_endings["finished"])),
        ("  relegated", str(summary.num_rt_relegated)),
        ("  normalised latency, mean", _milliseconds(summary.rt_normalised_latency_s)),
        ("  TTFT p50", _milliseconds(summary.rt_ttft_p50_s)),
        ("  TTFT p99", _milliseconds(summary.rt_ttft_p99_s)),
        ("  time between tokens p99", _milliseconds(summary.rt_tbt_p99_s)),
        ("  tokens a second", f"{summary.rt_tokens_per_s:.0f}"),
    ]


def _be_rows(summary: Summary) -> list[tuple[str, str]]:
    return [
        ("best-effort tokens a second", f"{summary.be_tokens_per_s:.0f}"),
        ("  requests a second", f"{summary.be_requests_per_s:.2f}"),
        ("  longest wait for a first token", _milliseconds(summary.be_longest_wait_s)),
        ("  longest gap after it", _milliseconds(summary.be_largest_gap_s)),
    ]


def _step_rows(steps: dict[str, float | None]) -> list[tuple[str, str]]:
    return [
        ("steps", f"{steps['num_steps']:.0f}"),
        ("  share of time computing", _percent(steps["busy_share"])),
        ("  error of their prediction, mean", _percent(steps["prediction_error"])),
        ("  KV held by real-time requests", _percent(steps["rt_kv_share"])),
        (
            "  planning (real time) p50, p99",
            f"{steps['planning_p50_us'] or 0:.0f}, {steps['planning_p99_us'] or 0:.0f} us",
        ),
    ]


def _shares(summary: Summary) -> str:
    shares = (summary.ttft_attainment, summary.tpot_attainment, summary.joint_attainment)
    return ", ".join(_percent(share) for share in shares)


def _percent(share: float | None) -> str:
    return "-" if share is None else f"{100 * share:.1f} %"


def _milliseconds(seconds: float | None) -> str:
    return "-" if seconds is None else f"{1000 * seconds:.0f} ms"
