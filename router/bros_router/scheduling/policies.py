"""Scheduling policies: which sequence goes first, and which gives way when memory runs out."""

from __future__ import annotations

from typing import Final, Protocol

from bros_router.scheduling.sequence import Sequence


class Policy(Protocol):
    """What the scheduler asks. Pure: the answer depends on the sequence alone."""

    def waiting_key(self, sequence: Sequence) -> tuple[float, ...]:
        """Sort key of the waiting sequences: smaller goes first. Fixed while a sequence waits."""
        ...

    def victim_key(self, sequence: Sequence) -> tuple[float, ...]:
        """Sort key of the running sequences when blocks run out: the largest is preempted."""
        ...


class FirstComeFirstServed:
    """vLLM's default: in order of arrival, whatever the class; the last to arrive gives way.

    A preempted sequence keeps its arrival, so it stands at the head of those that wait.
    """

    def waiting_key(self, sequence: Sequence) -> tuple[float, ...]:
        """Arrival; the sequence id breaks ties."""
        return sequence.arrival_s, sequence.sequence_id

    def victim_key(self, sequence: Sequence) -> tuple[float, ...]:
        """Arrival as well: who came last has lost the least."""
        return sequence.arrival_s, sequence.sequence_id


#: What `--scheduler` may say.
POLICIES: Final[dict[str, type[Policy]]] = {"fcfs": FirstComeFirstServed}
