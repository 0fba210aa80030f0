"""How much is simulated for a scenario."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from bros_benchmarks.evaluation.scenario import Variant, variants_of
from bros_router.scheduling.policies.registry import POLICY_NAMES


@dataclass(frozen=True, kw_only=True, slots=True)
class Effort:
    """Settings that are tried, seeds, and lengths of runs."""

    policies: tuple[str, ...] = POLICY_NAMES
    #: Token budgets and sequence caps that every policy may choose from, ours included.
    budgets: tuple[int, ...] = (512, 1024, 2048)
    caps: tuple[int, ...] = (128, 256)
    #: Best-effort sequences that `static` may run at once.
    static_be: tuple[int, ...] = (8, 16, 32)
    #: Of the runs at R*, as the paper has them.
    seeds: tuple[int, ...] = (1, 2, 3)
    duration_s: float = 600.0
    #: Of all others.
    short_seeds: tuple[int, ...] = (1, 2)
    short_s: float = 120.0

    def variants_of(self, policy: str) -> list[Variant]:
        """Every setting of a policy that is tried."""
        return variants_of(policy, self.budgets, self.caps, self.static_be)


FULL: Final = Effort()
#: For scenarios beside the paper's own.
LIGHT: Final = Effort(
    policies=("bros", "fcfs", "priority", "edf", "static"),
    budgets=(2048,),
    caps=(256,),
    static_be=(16, 64),
    seeds=(1, 2),
    duration_s=120.0,
    short_seeds=(1,),
    short_s=60.0,
)
#: A smoke test: the figures of one scenario in a few minutes.
QUICK: Final = Effort(
    budgets=(1024,), caps=(256,), static_be=(16,), seeds=(1,), duration_s=90.0, short_seeds=(1,), short_s=45.0
)
