"""The policies by the names that `--scheduler` takes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Final, TypeAlias

from bros_router.kv.kv_manager import Preemption
from bros_router.scheduling.latency_model import LatencyModel
from bros_router.scheduling.policies.bros import PAPER_OPTIONS, BrosOptions, BrosPolicy
from bros_router.scheduling.policies.ordered import (
    EarliestDeadlineFirst,
    FirstComeFirstServed,
    StaticLimit,
    StrictPriority,
)
from bros_router.scheduling.policies.policy import Policy
from bros_router.scheduling.policies.round_robin import RoundRobin
from bros_router.scheduling.policies.tgi import TextGenerationInference
from bros_router.scheduling.step_draft import SchedulerLimits


@dataclass(frozen=True, kw_only=True, slots=True)
class PolicyOptions:
    """What the policies can be told; each reads its own."""

    bros: BrosOptions = field(default_factory=BrosOptions)
    #: How `bros` takes memory from best-effort sequences.
    preemption: Preemption = Preemption.BIDIR
    #: Best-effort sequences that `static` runs at once.
    static_be_requests: int = 8
    #: Whether `priority` preempts when the step is full, or only when memory is.
    priority_preempts_when_full: bool = False


_Maker: TypeAlias = Callable[[LatencyModel, SchedulerLimits, PolicyOptions], Policy]

_MAKERS: Final[dict[str, _Maker]] = {
    "bros": lambda model, limits, options: BrosPolicy(model, limits, options.bros),
    "bros-paper": lambda model, limits, options: BrosPolicy(model, limits, PAPER_OPTIONS),
    "fcfs": lambda model, limits, options: FirstComeFirstServed(),
    "tgi": lambda model, limits, options: TextGenerationInference(),
    "priority": lambda model, limits, options: StrictPriority(preempts_when_full=options.priority_preempts_when_full),
    "edf": lambda model, limits, options: EarliestDeadlineFirst(),
    "rr": lambda model, limits, options: RoundRobin(),
    "static": lambda model, limits, options: StaticLimit(options.static_be_requests),
}

#: What `--scheduler` may say.
POLICY_NAMES: Final = tuple(_MAKERS)


def make_policy(name: str, model: LatencyModel, limits: SchedulerLimits, options: PolicyOptions) -> Policy:
    """The policy of that name."""
    return _MAKERS[name](model, limits, options)


def preemption_of(name: str, options: PolicyOptions) -> Preemption:
    """How a policy takes memory: the baselines recompute, as the servers they stand for."""
    return options.preemption if name in ("bros", "bros-paper") else Preemption.RECOMPUTE
