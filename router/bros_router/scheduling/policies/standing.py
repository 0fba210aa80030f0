"""Where the running sequences stand when a step is composed, and which of them give way to others."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

from bros_router.request import RequestClass
from bros_router.scheduling.policies.ordered import by_arrival
from bros_router.scheduling.sequence import Sequence, SequenceState


@dataclass(slots=True)
class Standing:
    """The running sequences that a step may take up, by what they need. Each list in order of admission."""

    decoding: list[Sequence] = field(default_factory=list)
    #: More than a token behind: in prefill, or preempted in part.
    behind: list[Sequence] = field(default_factory=list)
    late: list[Sequence] = field(default_factory=list)
    be_decoding: list[Sequence] = field(default_factory=list)
    be_behind: list[Sequence] = field(default_factory=list)
    #: All late and all best-effort ones, those too that the step cannot take up.
    late_all: list[Sequence] = field(default_factory=list)
    be_all: list[Sequence] = field(default_factory=list)

    @classmethod
    def of(cls, running: Iterable[Sequence]) -> Standing:
        """Take stock."""
        standing = cls()
        for sequence in running:
            is_be = sequence.request_class is RequestClass.BE
            if is_be:
                standing.be_all.append(sequence)
            elif sequence.is_late:
                standing.late_all.append(sequence)
            if not sequence.is_ready:
                continue  # its last token is in flight; or it was preempted with one
            is_decoding = sequence.is_decoding
            if is_be:
                (standing.be_decoding if is_decoding else standing.be_behind).append(sequence)
            elif sequence.is_late:
                standing.late.append(sequence)
            else:
                (standing.decoding if is_decoding else standing.behind).append(sequence)
        return standing

    def be_victims(self) -> list[Sequence]:
        """Best-effort sequences in the order in which they give way: those preempted before, then the youngest."""
        decoding = {sequence.sequence_id for sequence in self.be_decoding}
        return sorted(
            (sequence for sequence in self.be_all if sequence.state is SequenceState.RUNNING),
            key=lambda sequence: (sequence.sequence_id not in decoding, by_arrival(sequence)),
            reverse=True,
        )

    def victims_of(self, sequence: Sequence) -> list[Sequence]:
        """Who gives way to a real-time sequence before any of its own kind: best-effort ones, and to one that is in
        time late ones too, the youngest first."""
        if sequence.is_late:
            return self.be_victims()
        late = (other for other in self.late_all if other.state is SequenceState.RUNNING)
        return [*self.be_victims(), *sorted(late, key=by_arrival, reverse=True)]

    def be_younger_than(self, sequence: Sequence) -> list[Sequence]:
        """Those of the victims that arrived later: only they give way to a best-effort sequence, so that no two take
        turns."""
        key = by_arrival(sequence)
        return [victim for victim in self.be_victims() if by_arrival(victim) > key]
