"""What a scheduling policy is."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Protocol

from bros_router.scheduling.sequence import Sequence
from bros_router.scheduling.step_draft import StepDraft


class Policy(Protocol):
    """Decides each step. It owns the order of those that wait; time comes as an argument.

    Every call is a function of what the policy was told before: the same calls give the same plans.
    """

    @property
    def can_interrupt(self) -> bool:
        """Whether `interrupt` ever fills a step."""
        ...

    @property
    def num_waiting(self) -> int:
        """Sequences that wait."""
        ...

    def waiting(self) -> Iterator[Sequence]:
        """Those that wait, in no order."""
        ...

    def add(self, sequence: Sequence) -> None:
        """The sequence waits from now on: it is new, or was preempted with nothing left."""
        ...

    def remove(self, sequence: Sequence) -> None:
        """A sequence that waits has ended."""
        ...

    def compose(self, draft: StepDraft) -> None:
        """Fill the step. What is added to it from those that wait, no longer waits."""
        ...

    def interrupt(self, draft: StepDraft, next_s: float, latest_end_s: float) -> None:
        """Fill a step that is run in the middle of the one that runs now, or leave it empty.

        It holds sequences that the ranks do not know yet, in memory that is free: no victims, no copies.

        Args:
            next_s: when a prompt would begin if it waited, were the running step slow.
            latest_end_s: when this step must have ended for those that it interrupts.
        """
        ...

    def finished(self, sequence: Sequence) -> None:
        """A sequence got its last token."""
        ...
