"""How much work is due by when: tells whether one more deadline can be kept, in logarithmic time."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Final

#: 327 s ahead, and always more than half of that. What is due later is taken as due at the end.
_NUM_BUCKETS: Final = 2**16
_BUCKET_S: Final = 0.005


@dataclass(frozen=True, slots=True)
class _Work:
    seconds: float
    deadline_s: float
    is_binding: bool


class Demand:
    """Work with deadlines, for one machine that does the earliest deadline first.

    Time is cut into buckets. With `due(j)` the work whose deadline lies in bucket `j` or before it,

        room(j) = end of bucket j - base - due(j)

    Work with a deadline in bucket `k` takes room from `k` and every later bucket. It can be done in time where its own
    deadline leaves enough, and no *binding* deadline from `k` on loses what it needs (the processor demand of Baruah,
    Mok and Rosier, RTSS 1990, for work that has all arrived).

    `room` is the prefix sum of what each bucket adds to it: its length less its work. A segment tree over the buckets
    keeps of each node the sum, and the least and the greatest of its prefix sums; so a change touches one leaf and its
    ancestors, and a search goes down one path.
    """

    def __init__(self, num_buckets: int = _NUM_BUCKETS, bucket_s: float = _BUCKET_S) -> None:
        assert num_buckets & (num_buckets - 1) == 0, "the tree is a perfect one"
        self._num_buckets = num_buckets
        self._bucket_s = bucket_s
        self._base_s = 0.0
        self._works: dict[int, _Work] = {}
        self._clear()

    def __len__(self) -> int:
        return len(self._works)

    def __contains__(self, key: int) -> bool:
        return key in self._works

    def put(self, key: int, work_s: float, deadline_s: float, *, is_binding: bool, now_s: float) -> None:
        """Add work under a new key.

        Args:
            work_s: seconds that it takes the machine alone.
            is_binding: whether this deadline must be kept, so that nothing may be added that breaks it.
        """
        assert key not in self._works
        self._advance(now_s)
        self._works[key] = work = _Work(work_s, deadline_s, is_binding)
        self._add(work, 1)

    def change(self, key: int, work_s: float) -> None:
        """So much of a work is left."""
        work = self._works[key]
        self._add(work, -1)
        self._works[key] = work = _Work(work_s, work.deadline_s, work.is_binding)
        self._add(work, 1)

    def remove(self, key: int) -> None:
        """The work is done, or nobody wants it any more. A key that is not there is no error."""
        work = self._works.pop(key, None)
        if work is not None:
            self._add(work, -1)

    def earliest_deadline_s(self, work_s: float, deadline_s: float, now_s: float) -> float:
        """The earliest deadline, from `deadline_s` on, by which more work could be done and break no binding one.

        Work that was put with a deadline in the same bucket counts as due before it, and a binding deadline as due at
        the start of its bucket: both err on the safe side, by less than a bucket.
        """
        self._advance(now_s)
        needed_s = now_s - self._base_s + work_s
        start = self._bucket(deadline_s)
        broken = self._last_binding_below(needed_s + self._bucket_s)
        if broken is not None and broken >= start:
            start = broken + 1
            deadline_s = max(deadline_s, self._base_s + start * self._bucket_s)
        found = self._first_above(start, needed_s)
        if found is None:  # beyond the buckets, where everything is due before it
            return max(deadline_s, now_s + work_s + self._num_buckets * self._bucket_s - self._sum[1])
        bucket, room_s = found
        due_s = (bucket + 1) * self._bucket_s - room_s
        return max(deadline_s, now_s + due_s + work_s)

    # --- the tree: node 1 is the root, 2n and 2n + 1 are the children of n, the leaves are the last half

    def _clear(self) -> None:
        """A tree without work. Nodes of a level are alike, so it costs a few list operations."""
        self._sum, self._low, self._high = [0.0], [math.inf], [0.0]
        num_nodes, length_s = 1, self._num_buckets * self._bucket_s
        while num_nodes <= self._num_buckets:
            self._sum += [length_s] * num_nodes
            self._low += [math.inf] * num_nodes
            self._high += [length_s] * num_nodes
            num_nodes, length_s = 2 * num_nodes, length_s / 2
        self._num_binding = [0] * self._num_buckets

    def _advance(self, now_s: float) -> None:
        """Start the buckets anew from `now_s` once half of them have passed. What is overdue is due at once."""
        if now_s - self._base_s < self._num_buckets * self._bucket_s / 2:
            return
        self._base_s = now_s
        self._clear()
        for work in self._works.values():
            self._add(work, 1)

    def _bucket(self, deadline_s: float) -> int:
        return int(min(max((deadline_s - self._base_s) / self._bucket_s, 0), self._num_buckets - 1))

    def _add(self, work: _Work, sign: int) -> None:
        bucket = self._bucket(work.deadline_s)
        node = bucket + self._num_buckets
        total, low, high = self._sum, self._low, self._high
        self._num_binding[bucket] += sign * work.is_binding
        total[node] -= sign * work.seconds
        high[node] = total[node]
        low[node] = total[node] if self._num_binding[bucket] else math.inf
        while node > 1:
            node //= 2
            left, right = 2 * node, 2 * node + 1
            total[node] = total[left] + total[right]
            low[node] = min(low[left], total[left] + low[right])
            high[node] = max(high[left], total[left] + high[right])

    def _last_binding_below(self, room_s: float) -> int | None:
        """The last bucket with a binding deadline that has less room."""
        if self._low[1] >= room_s:
            return None
        node, before_s = 1, 0.0
        while node < self._num_buckets:
            node *= 2
            behind_s = before_s + self._sum[node]
            if behind_s + self._low[node + 1] < room_s:
                node, before_s = node + 1, behind_s
        return node - self._num_buckets

    def _first_above(self, start: int, room_s: float) -> tuple[int, float] | None:
        """The first bucket from `start` on that has more room, and its room."""

        def search(node: int, first: int, size: int, before_s: float) -> tuple[int, float] | None:
            if first + size <= start or before_s + self._high[node] <= room_s:
                return None
            if size == 1:
                return first, before_s + self._sum[node]
            half, left = size // 2, 2 * node
            return search(left, first, half, before_s) or search(
                left + 1, first + half, half, before_s + self._sum[left]
            )

        return search(1, 0, self._num_buckets, 0.0)
