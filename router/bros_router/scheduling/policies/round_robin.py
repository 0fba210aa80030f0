"""The BROS paper's round-robin baseline."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from bros_router.request import RequestClass
from bros_router.scheduling.policies.ordered import OrderedPolicy, by_arrival
from bros_router.scheduling.queues import WaitingQueue
from bros_router.scheduling.sequence import Sequence
from bros_router.scheduling.step_draft import StepDraft


class RoundRobin(OrderedPolicy):
    """The two classes take turns at filling a step first (BROS-RR; the rule of the turn is our reading).

    Within a class, in order of arrival. The class whose turn it is takes as much of the token budget as it can use.
    """

    def __init__(self) -> None:
        super().__init__(by_arrival)
        self._queues = {request_class: WaitingQueue(by_arrival) for request_class in RequestClass}
        self._turn = RequestClass.BE

    @property
    def num_waiting(self) -> int:
        """Sequences that wait."""
        return sum(map(len, self._queues.values()))

    def waiting(self) -> Iterator[Sequence]:
        """Those that wait, in no order."""
        return (sequence for queue in self._queues.values() for sequence in queue)

    def add(self, sequence: Sequence) -> None:
        """The sequence waits from now on."""
        self._queues[sequence.request_class].push(sequence)

    def remove(self, sequence: Sequence) -> None:
        """A sequence that waits has ended."""
        self._queues[sequence.request_class].remove(sequence)

    def compose(self, draft: StepDraft) -> None:
        """Fill the step; then it is the other class's turn."""
        self._turn = _other(self._turn)
        super().compose(draft)

    def _order(self, running: Iterable[Sequence]) -> list[Sequence]:
        return sorted(running, key=lambda sequence: sequence.request_class is not self._turn)

    def _admit(self, draft: StepDraft) -> None:
        for request_class in (self._turn, _other(self._turn)):
            self._queue = self._queues[request_class]
            super()._admit(draft)


def _other(request_class: RequestClass) -> RequestClass:
    return RequestClass.BE if request_class is RequestClass.RT else RequestClass.RT
