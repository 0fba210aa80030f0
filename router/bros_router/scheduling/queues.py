"""The waiting sequences, in the order a policy gives them."""

from __future__ import annotations

import heapq
from collections.abc import Callable, Iterator

from bros_router.scheduling.sequence import Sequence

#: Sort key of a sequence; smaller goes first. It must not change while the sequence waits.
SortKey = Callable[[Sequence], tuple[float, ...]]


class WaitingQueue:
    """A heap with lazy deletion: push and remove are O(log n) and O(1), whatever the length of the queue."""

    def __init__(self, key: SortKey) -> None:
        self._key = key
        self._heap: list[tuple[tuple[float, ...], int, Sequence]] = []
        self._waiting: set[int] = set()

    def __len__(self) -> int:
        return len(self._waiting)

    def __iter__(self) -> Iterator[Sequence]:
        """Every waiting sequence, in no order."""
        return (sequence for _, sequence_id, sequence in self._heap if sequence_id in self._waiting)

    def push(self, sequence: Sequence) -> None:
        """Add a sequence that is not in the queue."""
        assert sequence.sequence_id not in self._waiting
        self._waiting.add(sequence.sequence_id)
        heapq.heappush(self._heap, (self._key(sequence), sequence.sequence_id, sequence))

    def peek(self) -> Sequence | None:
        """The first sequence, which stays in the queue."""
        while self._heap and self._heap[0][1] not in self._waiting:
            heapq.heappop(self._heap)
        return self._heap[0][2] if self._heap else None

    def pop(self) -> Sequence:
        """Take the first sequence."""
        sequence = self.peek()
        assert sequence is not None
        heapq.heappop(self._heap)
        self._waiting.remove(sequence.sequence_id)
        return sequence

    def remove(self, sequence: Sequence) -> None:
        """Take a sequence that may stand anywhere in the queue."""
        self._waiting.remove(sequence.sequence_id)
        # What was removed stays in the heap until it surfaces: keep that bounded by what waits.
        if len(self._heap) > 64 and len(self._heap) > 2 * len(self._waiting):
            self._heap = [item for item in self._heap if item[1] in self._waiting]
            heapq.heapify(self._heap)
