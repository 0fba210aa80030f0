"""The waiting sequences, in the order a policy gives them."""

from __future__ import annotations

import heapq
from collections.abc import Callable, Iterator
from typing import TypeAlias

from bros_router.scheduling.sequence import Sequence

#: Sort key of a sequence; smaller goes first. It must not change while the sequence waits.
SortKey = Callable[[Sequence], tuple[float, ...]]
#: Key, number of the push, and the sequence itself.
_Entry: TypeAlias = tuple[tuple[float, ...], int, Sequence]


class WaitingQueue:
    """A heap with lazy deletion: push and remove are O(log n) and O(1), whatever the length of the queue."""

    def __init__(self, key: SortKey) -> None:
        self._key = key
        self._heap: list[_Entry] = []
        #: The entry of each sequence that waits. Any other in the heap is of one that was taken, which may be back
        #: with another key.
        self._waiting: dict[int, _Entry] = {}
        self._num_pushed = 0

    def __len__(self) -> int:
        return len(self._waiting)

    def __iter__(self) -> Iterator[Sequence]:
        """Every waiting sequence, in no order."""
        return (sequence for _, _, sequence in self._waiting.values())

    def push(self, sequence: Sequence) -> None:
        """Add a sequence that is not in the queue."""
        assert sequence.sequence_id not in self._waiting
        # The count keeps entries of equal keys in order, and sequences from being compared.
        entry = self._waiting[sequence.sequence_id] = (self._key(sequence), self._num_pushed, sequence)
        self._num_pushed += 1
        heapq.heappush(self._heap, entry)

    def peek(self) -> Sequence | None:
        """The first sequence, which stays in the queue."""
        while self._heap and not self._is_waiting(self._heap[0]):
            heapq.heappop(self._heap)
        return self._heap[0][2] if self._heap else None

    def pop(self) -> Sequence:
        """Take the first sequence."""
        sequence = self.peek()
        assert sequence is not None
        heapq.heappop(self._heap)
        del self._waiting[sequence.sequence_id]
        return sequence

    def remove(self, sequence: Sequence) -> None:
        """Take a sequence that may stand anywhere in the queue."""
        del self._waiting[sequence.sequence_id]
        # What was removed stays in the heap until it surfaces: keep that bounded by what waits.
        if len(self._heap) > 64 and len(self._heap) > 2 * len(self._waiting):
            self._heap = list(self._waiting.values())
            heapq.heapify(self._heap)

    def _is_waiting(self, entry: _Entry) -> bool:
        return self._waiting.get(entry[2].sequence_id) is entry
