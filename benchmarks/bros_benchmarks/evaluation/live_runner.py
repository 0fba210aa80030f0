"""One live run: a fresh server with a contender's flags, a workload over HTTP, everything recorded."""

from __future__ import annotations

import asyncio
import random
import threading
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import fmean
from types import TracebackType
from typing import Final

from rich.progress import Progress

from bros_benchmarks.evaluation.live_load import LiveLoad, LoadGenerator
from bros_benchmarks.evaluation.recorder import describe_machine, write_json, write_records
from bros_benchmarks.evaluation.result import Label, Result
from bros_benchmarks.evaluation.targets import ScaledTargets
from bros_benchmarks.evaluation.work import work_fields
from bros_benchmarks.server_under_test import ServerUnderTest
from bros_router.simulation.record import summarise
from bros_router.simulation.workload import (
    ArrivalProcess,
    ClosedLoop,
    Lengths,
    Poisson,
    Workload,
    make_workload,
)

#: Until the state is steady: under `fcfs` a request waits for some two minutes behind those in the system, and until
#: then real-time ones cost it nothing.
WARM_UP_S: Final = 150.0
DURATION_S: Final = 120.0
#: Who holds the KV region is asked so often: `/metrics` costs the server milliseconds.
_SAMPLING_S: Final = 5.0
#: How many of its requests a server relegated, in `/metrics`.
_RELEGATED: Final = "bros_relegations_total"
#: What Python runs.
_SERVER: Final = ("-m", "bros_router")
_RECORDED: Final = ("-m", "bros_benchmarks.evaluation.recorded_server")


@dataclass(frozen=True, slots=True)
class Contender:
    """A server to be judged: a policy with its flags, with both classes or one."""

    name: str
    #: For `--scheduler`; `None`: the server's default.
    scheduler: str | None
    flags: tuple[str, ...] = ()
    has_rt: bool = True
    has_be: bool = True


@dataclass(frozen=True, kw_only=True, slots=True)
class LiveSetup:
    """What all runs of an evaluation share."""

    model: Path
    num_threads: int
    rt_lengths: Lengths
    be_lengths: Lengths
    targets: ScaledTargets
    #: Best-effort requests in the system at all times.
    num_be: int = 64
    #: KV region as a share of what these need when all run at once.
    kv_share: float = 0.4
    block_size: int = 16
    warm_up_s: float = WARM_UP_S
    duration_s: float = DURATION_S
    #: Longest time after the window to wait for its real-time requests; `None`: as long as a reply may take that
    #: keeps its targets, for otherwise it would count as unfinished.
    drain_s: float | None = None

    @property
    def num_kv_slots(self) -> int:
        """Tokens that the KV region holds."""
        generator = random.Random("kv slots")
        totals = [sum(self.be_lengths.sample(generator)) for _ in range(10_000)]
        num_blocks = self.kv_share * self.num_be * fmean(-(-total // self.block_size) for total in totals)
        return round(num_blocks) * self.block_size

    def flags(self, contender: Contender) -> tuple[str, ...]:
        """The server's command line, apart from model and port."""
        return (
            *(() if contender.scheduler is None else ("--scheduler", contender.scheduler)),
            *("--kv-slots-limit", str(self.num_kv_slots), "--block-size", str(self.block_size)),
            # Whatever a policy does about overload, it is not to be hidden behind TGI's limit on connections.
            *("--max-concurrent-requests", "100000"),
            *contender.flags,
        )

    def workload(self, contender: Contender, arrivals: ArrivalProcess, seed: int) -> Workload:
        """The same trace for every contender."""
        drain_s = self.drain_s
        if drain_s is None:
            longest = self.rt_lengths.max_total_tokens
            ttft_s, tpot_s = self.targets.latency.targets(longest, self.targets.scale)
            drain_s = ttft_s + longest * tpot_s
        return make_workload(
            seed,
            arrivals=arrivals if contender.has_rt else Poisson(0.0),
            rt_lengths=self.rt_lengths,
            targets=self.targets,
            be=ClosedLoop(self.num_be, self.be_lengths) if contender.has_be else (),
            duration_s=self.duration_s,
            warm_up_s=self.warm_up_s,
            drain_s=drain_s,
        )


class LiveRunner:
    """Runs workloads one after another and keeps what they gave; what was kept is not run again."""

    def __init__(self, setup: LiveSetup, folder: Path, progress: Progress) -> None:
        self.setup = setup
        self._folder = folder
        self._progress = progress

    def shortened(self, *, warm_up_s: float, duration_s: float, drain_s: float | None = None) -> LiveRunner:
        """The same with shorter runs."""
        setup = replace(self.setup, warm_up_s=warm_up_s, duration_s=duration_s, drain_s=drain_s)
        return LiveRunner(setup, self._folder, self._progress)

    def run(
        self,
        experiment: str,
        contender: Contender,
        rate: float,
        seed: int,
        arrivals: ArrivalProcess | None = None,
        *,
        is_recorded: bool = False,
    ) -> Result:
        """Start the server, send the workload, stop the server.

        Args:
            arrivals: Poisson where they are not given.
            is_recorded: whether what the server did is kept, as a `ServerLog` in `server.json`.
        """
        folder = self.folder_of(experiment, contender, rate, seed)
        if (folder / "result.json").exists():
            return Result.read(folder / "result.json")
        folder.mkdir(parents=True, exist_ok=True)
        setup, arrivals = self.setup, arrivals or Poisson(rate)
        machine = describe_machine()
        workload = setup.workload(contender, arrivals, seed)
        program = (*_RECORDED, str(folder / "server.json")) if is_recorded else _SERVER
        with ServerUnderTest(
            setup.model, setup.num_threads, folder / "server.log", *setup.flags(contender), program=program
        ) as server:
            before = server.metrics()
            with _KvSampler(server) as sampler:
                load = self._send(server, workload, seed, f"{experiment}: {contender.name}, {rate:.2f}/s, seed {seed}")
            after = server.metrics()
        metrics = {name: value - before.get(name, 0.0) for name, value in after.items() if "_bucket" not in name}
        how = {
            "command": server.command,
            "seed": seed,
            "rate": rate,
            "arrivals": repr(arrivals),
            "trace_start_s": load.start_s,
        }
        what = {"setup": asdict(setup) | {"model": setup.model.name}, "machine": machine, "metrics_change": metrics}
        write_json(folder / "setup.json", how | what)
        write_records(folder / "records.csv.gz", load.records)
        labels: dict[str, Label] = {"experiment": experiment, "policy": contender.name, "rate": rate, "seed": seed}
        result = _result(labels, workload, load, metrics, sampler)
        result.write(folder / "result.json")
        return result

    def num_offered(self, contender: Contender, rate: float, seed: int) -> int:
        """Real-time requests that such a run is judged by."""
        workload = self.setup.workload(contender, Poisson(rate), seed)
        return sum(workload.start_s <= request.arrival_s < workload.stop_s for request in workload.rt)

    def folder_of(self, experiment: str, contender: Contender, rate: float, seed: int) -> Path:
        """Where a run is kept: `result.json`, `records.csv.gz`, `setup.json`, `server.log`."""
        return self._folder / experiment / f"{contender.name}-{rate:.3f}-{seed}".replace(" ", "_").replace("/", "_")

    def _send(self, server: ServerUnderTest, workload: Workload, seed: int, description: str) -> LiveLoad:
        task = self._progress.add_task(description, total=workload.stop_s)
        try:
            generator = LoadGenerator(
                server.url, workload, seed, lambda now_s: self._progress.update(task, completed=max(0.0, now_s))
            )
            return asyncio.run(generator.run())
        finally:
            self._progress.remove_task(task)


def _result(
    labels: dict[str, Label],
    workload: Workload,
    load: LiveLoad,
    metrics: dict[str, float],
    sampler: _KvSampler,
) -> Result:
    summary = summarise(load.records, workload.start_s, workload.stop_s, load.end_s)
    num_predicted = metrics.get("bros_step_prediction_error_count", 0.0)
    busy_s, idle_s = (metrics.get(f"bros_rank_{kind}_duration_sum", 0.0) for kind in ("step", "idle"))
    rt = [record for record in load.records if record.is_rt]
    return Result(
        labels,
        summary,
        extra={
            "lateness_p99_s": load.lateness_s(99),
            "num_relegated": metrics.get(_RELEGATED, 0.0),
            "prediction_error": (metrics["bros_step_prediction_error_sum"] / num_predicted if num_predicted else None),
            "rank_idle_share": idle_s / (busy_s + idle_s) if busy_s else None,
            "rt_kv_share": sampler.rt_share,
            **work_fields(load.records, workload.start_s, workload.stop_s),
        },
        series={
            "offered_s": [record.offered_s for record in rt],
            "ttft_s": [load.end_s - record.offered_s if (t := record.ttft_s) is None else t for record in rt],
        },
    )


class _KvSampler:
    """Asks now and then, in a thread, who holds the KV region."""

    def __init__(self, server: ServerUnderTest) -> None:
        self._server = server
        self._shares: list[float] = []
        self._is_over = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)

    @property
    def rt_share(self) -> float | None:
        """Mean share of the region that real-time sequences held."""
        return fmean(self._shares) if self._shares else None

    def __enter__(self) -> _KvSampler:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._is_over.set()
        self._thread.join()

    def _run(self) -> None:
        while not self._is_over.wait(_SAMPLING_S):
            try:
                metrics = self._server.metrics()
            except OSError:
                continue  # a server too busy to answer: the next sample may be luckier
            blocks = [metrics.get(f'bros_kv_blocks{{owner="{owner}"}}', 0.0) for owner in ("rt", "be", "free")]
            if sum(blocks):
                self._shares.append(blocks[0] / sum(blocks))
