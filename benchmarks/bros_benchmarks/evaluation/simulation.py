"""One simulated run as a value: everything it depends on, and what it gave."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import ModuleType
from typing import Final

import bros_router.admission
import bros_router.kv
import bros_router.scheduling
import bros_router.simulation
import bros_shard.block_layout
import bros_shard.protocol
from bros_benchmarks.evaluation.result import Label, Result
from bros_benchmarks.evaluation.work import work_fields
from bros_router.simulation.hardware import HARDWARE, Noisy, scaled_targets
from bros_router.simulation.simulator import Run, Setup, simulate
from bros_router.simulation.workload import (
    BE,
    SHAREGPT,
    ArrivalProcess,
    BatchDump,
    ClosedLoop,
    Lengths,
    Poisson,
    Targets,
    fixed_targets,
    make_workload,
)

#: A long prompt that has the device to itself is computed in chunks of so many tokens.
_UNLOADED_CHUNK: Final = 2048


@dataclass(frozen=True, kw_only=True, slots=True)
class Simulation:
    """The paper's set-up unless told otherwise. Two that are equal give the same result."""

    #: A name of `HARDWARE`.
    hardware: str = "opt-13b"
    setup: Setup = field(default_factory=Setup)
    arrivals: ArrivalProcess = field(default_factory=lambda: Poisson(1.0))
    rt_lengths: Lengths = SHAREGPT
    #: How many are in the system is our choice: as many as the KV region holds, about.
    be: ClosedLoop | tuple[BatchDump, ...] = field(default_factory=lambda: ClosedLoop(64, BE, is_grouped=True))
    #: (TTFT, TPOT) in seconds (the paper's for OPT), or a multiple of what the idle device needs.
    targets: tuple[float, float] | float = (0.4, 0.2)
    seed: int = 1
    warm_up_s: float = 60.0
    duration_s: float = 600.0
    #: Long enough for the longest reply that keeps its target to the last token.
    drain_s: float = 420.0
    #: Standard deviation of the logarithm of step times: devices are not exact, and neither is the scheduler's model.
    noise: float = 0.03
    #: Whether the course of the run is kept, not only its sums.
    keeps_series: bool = False

    @property
    def digest(self) -> str:
        """Names the run by all that it depends on, the code apart."""
        return hashlib.sha256(repr(self).encode()).hexdigest()[:20]

    def with_rate(self, rate: float) -> Simulation:
        """The same under Poisson arrivals at this rate."""
        return replace(self, arrivals=Poisson(rate))

    def targets_by_length(self) -> Targets:
        """(TTFT, TPOT) in seconds, for the number of prompt tokens."""
        if isinstance(self.targets, tuple):
            return fixed_targets(*self.targets)
        return scaled_targets(HARDWARE[self.hardware], self.targets, _UNLOADED_CHUNK)

    def execute(self, labels: dict[str, Label] | None = None) -> Result:
        """Run it."""
        hardware = HARDWARE[self.hardware]
        workload = make_workload(
            self.seed,
            arrivals=self.arrivals,
            rt_lengths=self.rt_lengths,
            targets=self.targets_by_length(),
            be=self.be,
            duration_s=self.duration_s,
            warm_up_s=self.warm_up_s,
            drain_s=self.drain_s,
        )
        run = simulate(workload, self.setup, Noisy(hardware, self.noise, self.seed))
        return Result(labels or {}, run.summary(), _extra(run), _series(run) if self.keeps_series else {})


def _extra(run: Run) -> dict[str, float | None]:
    """What the records and the log of steps tell beyond the summary."""
    start_s, stop_s = run.workload.start_s, run.workload.stop_s
    [log] = run.logs
    return {
        "rt_kv_share": log.mean_rt_kv_share(start_s, stop_s),
        "busy_share": log.busy_share(start_s, stop_s),
        "prediction_error": log.prediction_error(start_s, stop_s),
        "planning_us": 1e6 * sum(log.planning_s) / max(1, len(log)),
        "num_steps": float(len(log)),
        "tokens_per_step": sum(log.num_tokens) / max(1, len(log)),
        "sequences_per_step": sum(log.num_sequences) / max(1, len(log)),
        **work_fields(run.records, start_s, stop_s),
    }


def _series(run: Run) -> dict[str, list[float]]:
    """Real-time requests in order; one without a first token counts until the end."""
    rt = [record for record in run.records if record.is_rt]
    return {
        "offered_s": [record.offered_s for record in rt],
        "ttft_s": [run.end_s - record.offered_s if (t := record.ttft_s) is None else t for record in rt],
    }


def code_digest() -> str:
    """Of the source that a simulated run depends on: results of other code are not taken for results of this one."""
    digest = hashlib.sha256()
    for module in (bros_router.kv, bros_router.scheduling, bros_router.simulation):
        for folder in module.__path__:
            for path in sorted(Path(folder).rglob("*.py")):
                digest.update(path.read_bytes())
    for module in (bros_router.admission, bros_shard.protocol, bros_shard.block_layout):
        digest.update(_source(module).read_bytes())
    return digest.hexdigest()[:12]


def _source(module: ModuleType) -> Path:
    assert module.__file__ is not None
    return Path(module.__file__)
