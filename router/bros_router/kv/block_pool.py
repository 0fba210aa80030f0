"""Which blocks of the KV region are free."""

from __future__ import annotations

import heapq


class BlockPool:
    """Block ids 0 to `num_blocks - 1`, taken from either end of the region.

    Real-time sequences take the lowest free block and best-effort sequences the highest, so the two classes
    grow towards each other and the free blocks between them stay together. O(log n) an operation.
    """

    def __init__(self, num_blocks: int) -> None:
        self.num_blocks = num_blocks
        self.num_free = num_blocks
        self._is_free = bytearray(b"\1" * num_blocks)
        # Each heap holds every free block and some that were since taken from the other end. A block is
        # pushed only where it is absent, so neither heap outgrows the region.
        self._low = list(range(num_blocks))
        self._high = list(range(-num_blocks + 1, 1))
        self._in_low = bytearray(b"\1" * num_blocks)
        self._in_high = bytearray(b"\1" * num_blocks)

    def is_free(self, block_id: int) -> bool:
        """Whether nobody owns the block."""
        return bool(self._is_free[block_id])

    def take_lowest(self) -> int:
        """Take the free block with the smallest id."""
        while True:
            block_id = heapq.heappop(self._low)
            self._in_low[block_id] = 0
            if self._is_free[block_id]:
                return self._take(block_id)

    def take_highest(self) -> int:
        """Take the free block with the largest id."""
        while True:
            block_id = -heapq.heappop(self._high)
            self._in_high[block_id] = 0
            if self._is_free[block_id]:
                return self._take(block_id)

    def take(self, block_id: int) -> None:
        """Take this very block, which is free. The heaps forget it when they come across it."""
        assert self._is_free[block_id], f"block {block_id} has an owner"
        self._take(block_id)

    def give_back(self, block_id: int) -> None:
        """Free a block that was taken."""
        assert not self._is_free[block_id], f"block {block_id} was free already"
        self._is_free[block_id] = 1
        self.num_free += 1
        if not self._in_low[block_id]:
            self._in_low[block_id] = 1
            heapq.heappush(self._low, block_id)
        if not self._in_high[block_id]:
            self._in_high[block_id] = 1
            heapq.heappush(self._high, -block_id)

    def _take(self, block_id: int) -> int:
        self._is_free[block_id] = 0
        self.num_free -= 1
        return block_id
