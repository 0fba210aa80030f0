"""How long planning and committing a step takes, alone: `python -m bros_benchmarks.scheduling`."""

from __future__ import annotations

import time

import numpy as np

from bros_router.kv.kv_manager import KVManager
from bros_router.request import RequestClass
from bros_router.scheduling.policies import FirstComeFirstServed
from bros_router.scheduling.scheduler import Scheduler, SchedulerLimits
from bros_router.scheduling.sequence import Sequence
from bros_shard.protocol import SamplingParams, SequenceResult, StepResult

NUM_STEPS = 300
#: Steps that prefill, and fill caches.
NUM_WARM_UP_STEPS = 50


def measure(num_running: int, num_waiting: int) -> tuple[list[float], list[float]]:
    """Seconds of each plan and of each commit of decode steps."""
    kv = KVManager(num_blocks=8192, block_size=64)
    scheduler = Scheduler(FirstComeFirstServed(), kv, SchedulerLimits(4096, num_running))
    for number in range(num_running + num_waiting):
        prompt = (1,) * 100
        scheduler.add(Sequence(number, RequestClass.RT, prompt, SamplingParams(), 1000, frozenset(), float(number)))
    plan_s, commit_s = [], []
    for _ in range(NUM_STEPS):
        start_s = time.perf_counter()
        plan = scheduler.plan(0.0)
        plan_s.append(time.perf_counter() - start_s)
        assert plan is not None
        results = [SequenceResult(step.sequence_id, 5, -1.0) for step in plan.sequences]
        start_s = time.perf_counter()
        scheduler.commit(StepResult(0, plan.step_id, results, 0.0, 0.0, 0.0, 0.0), 0.0)
        commit_s.append(time.perf_counter() - start_s)
    return plan_s[NUM_WARM_UP_STEPS:], commit_s[NUM_WARM_UP_STEPS:]


def main() -> None:
    """Print percentiles."""
    for num_running, num_waiting in ((32, 0), (256, 0), (256, 100_000)):
        for name, seconds in zip(("plan", "commit"), measure(num_running, num_waiting), strict=True):
            p50, p99 = np.percentile(seconds, [50, 99]) * 1e6
            print(f"{num_running} running, {num_waiting} waiting: {name} p50 {p50:.0f} us, p99 {p99:.0f} us")


if __name__ == "__main__":
    main()
