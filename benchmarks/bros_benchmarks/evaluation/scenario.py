"""Which servers are compared under which traffic: the variants of every policy, and the scenarios."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any, Final

from bros_benchmarks.evaluation.simulation import Simulation
from bros_router.admission import AdmissionPolicy
from bros_router.kv.kv_manager import Preemption
from bros_router.scheduling.batch_cap import CapControl
from bros_router.scheduling.policies.bros import BrosOptions
from bros_router.scheduling.policies.registry import PolicyOptions
from bros_router.scheduling.step_draft import SchedulerLimits
from bros_router.simulation.simulator import Setup
from bros_router.simulation.workload import (
    AZURE_CODE,
    AZURE_CONVERSATION,
    BE,
    LMSYS,
    LONG_BE,
    LONG_CHAT,
    SHAREGPT,
    ClosedLoop,
    Lengths,
)


@dataclass(frozen=True, slots=True)
class Variant:
    """A server under a name."""

    name: str
    setup: Setup

    @property
    def policy(self) -> str:
        """What `--scheduler` says."""
        return self.setup.policy


def variants_of(policy: str, budgets: Iterable[int], caps: Iterable[int], static_be: Iterable[int]) -> list[Variant]:
    """Every setting of a policy that is tried."""
    choices: dict[str, PolicyOptions] = {"": PolicyOptions()}
    if policy == "static":
        choices = {f" be={count}": PolicyOptions(static_be_requests=count) for count in static_be}
    elif policy == "priority":
        modes = {" strict=kv": False, " strict=full": True}
        choices = {name: PolicyOptions(priority_preempts_when_full=is_full) for name, is_full in modes.items()}
    return [
        Variant(
            f"{policy}{name} {budget}/{cap}",
            Setup(policy=policy, options=options, limits=SchedulerLimits(budget, cap)),
        )
        for name, options in choices.items()
        for budget in budgets
        for cap in caps
    ]


def ablations(setup: Setup) -> list[Variant]:
    """`bros` with one part at a time switched off, switched on, or done the other way."""
    bros = setup.options.bros
    changes: dict[str, BrosOptions] = {
        "bros": bros,
        "+ background checkpoints": replace(bros, checkpoints=True),
        "+ cap: aimd": replace(bros, cap_control=CapControl.AIMD),
        "+ cap: reset": replace(bros, cap_control=CapControl.RESET),
        "- BE fill": replace(bros, fills=False),
        "- pacing": replace(bros, paces=False),
        "- chunks": replace(bros, chunks=False),
        "- relegation": replace(bros, relegates=False),
        "- short steps": replace(bros, keeps_steps_short=False),
        "- time for memory": replace(bros, gives_time_for_memory=False),
        "- BE floor": replace(bros, be_max_wait_s=math.inf),
        "hard BE floor": replace(bros, is_floor_hard=True),
    }
    return [
        *(Variant(name, with_options(setup, bros=options)) for name, options in changes.items()),
        Variant("- sharing (block)", with_options(setup, preemption=Preemption.BLOCK)),
        Variant("- checkpoints (recompute)", with_options(setup, preemption=Preemption.RECOMPUTE)),
        *(
            Variant(f"+ admission: {policy.value}", replace(setup, admission_policy=policy))
            for policy in AdmissionPolicy
            if policy is not setup.admission_policy
        ),
    ]


def with_options(setup: Setup, **changes: Any) -> Setup:
    """The same server with other `PolicyOptions`."""
    return replace(setup, options=replace(setup.options, **changes))


@dataclass(frozen=True, slots=True)
class Scenario:
    """A device, a kind of real-time request with its targets, and best-effort work beside it."""

    name: str
    base: Simulation
    #: Where searches begin, in requests a second.
    first_rate: float


def _llama(lengths: Lengths, first_rate: float, be: Lengths = BE, hardware: str = "llama-3-8b") -> Scenario:
    """Prompts too long for the paper's targets: five times the unloaded latency instead."""
    base = Simulation(hardware=hardware, rt_lengths=lengths, targets=5.0, be=ClosedLoop(256, be, is_grouped=True))
    name = lengths.name if be is BE else f"{lengths.name} + {be.name}"
    return Scenario(name if hardware == "llama-3-8b" else f"{name}, {hardware}", base, first_rate)


#: The paper's own two first, then its larger models.
SCENARIOS: Final = {
    scenario.name: scenario
    for scenario in (
        Scenario("sharegpt", Simulation(rt_lengths=SHAREGPT), 4.0),
        Scenario("lmsys", Simulation(rt_lengths=LMSYS), 5.0),
        Scenario("sharegpt, opt-30b", Simulation(hardware="opt-30b", rt_lengths=SHAREGPT), 5.0),
        _llama(LONG_CHAT, 4.0, hardware="llama-3-70b"),
        _llama(LONG_CHAT, 8.0),
        _llama(AZURE_CONVERSATION, 10.0),
        _llama(AZURE_CODE, 8.0),
        _llama(LONG_CHAT, 8.0, LONG_BE),
    )
}
#: Those that get the full effort.
PAPER_SCENARIOS: Final = ("sharegpt", "lmsys")
