"""How long planning and committing a step takes, alone: `python -m bros_benchmarks.scheduling`.

Half of the running sequences are real-time, half best-effort; so are those that wait. All of them decode. Prompts
share nothing, and their blocks are hashed and published as in the server.
"""

from __future__ import annotations

import gc
import time

import numpy as np

from bros_router.kv.block_hasher import BlockHasher
from bros_router.kv.kv_manager import KVManager
from bros_router.request import LatencyTargets, RequestClass
from bros_router.scheduling.batch_cap import CapControl
from bros_router.scheduling.latency_model import LatencyModel
from bros_router.scheduling.policies.bros import BrosOptions
from bros_router.scheduling.policies.registry import PolicyOptions, make_policy
from bros_router.scheduling.scheduler import Scheduler
from bros_router.scheduling.sequence import Sequence
from bros_router.scheduling.step_draft import SchedulerLimits
from bros_shard.protocol import SampledToken, SamplingParams, SequenceResult, StepResult, StepShape

NUM_STEPS = 400
#: Steps that prefill, fill caches and let the model settle.
NUM_WARM_UP_STEPS = 100
NUM_PROMPT_TOKENS = 100
STEP_S = 0.05


def add(scheduler: Scheduler, number: int, now_s: float) -> None:
    """A sequence of its own: every other one is real-time, with targets that no step here misses."""
    is_rt = number % 2 == 0
    targets = LatencyTargets(ttft_s=1e6, tpot_s=1.0, are_given=True) if is_rt else None
    request_class = RequestClass.RT if is_rt else RequestClass.BE
    prompt = tuple(range(number, number + NUM_PROMPT_TOKENS))
    sequence = Sequence(number, request_class, prompt, SamplingParams(), 2000, frozenset(), now_s, targets)
    sequence.block_hashes = scheduler.block_hashes(prompt)
    scheduler.add(sequence)


def measure(policy_name: str, num_running: int, num_waiting: int) -> tuple[list[float], list[float]]:
    """Seconds of each plan and of each commit of decode steps."""
    model = LatencyModel([(StepShape(num_decode_sequences=num_running, decode_context_tokens=num_running), STEP_S)])
    limits = SchedulerLimits(4096, num_running)
    options = PolicyOptions(bros=BrosOptions(cap_control=CapControl.OFF))
    kv = KVManager(num_blocks=16384, block_size=64)
    policy = make_policy(policy_name, model, limits, options)
    scheduler = Scheduler(policy, kv, model, limits, hasher=BlockHasher(kv.block_size, b"salt"))
    now_s = 0.0
    for number in range(num_running):
        add(scheduler, number, now_s)
    plan_s, commit_s = [], []
    for step in range(NUM_STEPS):
        if step == NUM_WARM_UP_STEPS // 2:
            for number in range(num_running, num_running + num_waiting):
                add(scheduler, number, now_s)
            gc.collect()
        start_s = time.perf_counter()
        plan = scheduler.plan(now_s)
        plan_s.append(time.perf_counter() - start_s)
        assert plan is not None
        results = [SequenceResult(part.sequence_id, [SampledToken(5, -1.0)]) for part in plan.sequences]
        now_s += STEP_S
        start_s = time.perf_counter()
        scheduler.commit(StepResult(0, plan.step_id, results, 0.0, 0.0, STEP_S, 0.0), now_s)
        commit_s.append(time.perf_counter() - start_s)
    return plan_s[NUM_WARM_UP_STEPS:], commit_s[NUM_WARM_UP_STEPS:]


def main() -> None:
    """Print percentiles."""
    for policy_name in ("bros", "fcfs"):
        for num_running, num_waiting in ((32, 0), (256, 0), (256, 1000), (256, 10_000), (256, 100_000)):
            plan_s, commit_s = measure(policy_name, num_running, num_waiting)
            line = f"{policy_name:5} {num_running:4} running, {num_waiting:7} waiting:"
            both_s = [plan + commit for plan, commit in zip(plan_s, commit_s, strict=True)]
            for name, seconds in (("plan", plan_s), ("commit", commit_s), ("both", both_s)):
                p50, p99 = np.percentile(seconds, [50, 99]) * 1e6
                line += f"  {name} p50 {p50:4.0f} p99 {p99:4.0f} us"
            print(line, flush=True)


if __name__ == "__main__":
    main()
