"""Who owns which blocks of the KV region: the router's half of the cache, numbers alone."""

from __future__ import annotations

from dataclasses import dataclass, field

from bros_router.kv.block_pool import BlockPool
from bros_router.request import RequestClass
from bros_shard.block_layout import block_of, forward_entry, num_blocks_for, reversed_entry


@dataclass(slots=True)
class _Owner:
    """One sequence's blocks, as signed entries, and how much of that the ranks have been told."""

    request_class: RequestClass
    entries: list[int] = field(default_factory=list)
    first_changed_index: int = 0


class KVManager:
    """Gives blocks to sequences and takes them back. The ranks own the tensors, this owns the numbers.

    A real-time sequence fills forward blocks from the low end of the region, a best-effort one reversed blocks
    from the high end (`bros_shard.block_layout`).
    """

    def __init__(self, num_blocks: int, block_size: int) -> None:
        self.block_size = block_size
        self._pool = BlockPool(num_blocks)
        self._owners: dict[int, _Owner] = {}
        self._num_used = dict.fromkeys(RequestClass, 0)

    @property
    def num_blocks(self) -> int:
        """Blocks of the region."""
        return self._pool.num_blocks

    @property
    def num_free_blocks(self) -> int:
        """Blocks that nobody owns."""
        return self._pool.num_free

    def num_used_blocks(self, request_class: RequestClass) -> int:
        """Blocks that sequences of this class own."""
        return self._num_used[request_class]

    def num_owned_blocks(self, sequence_id: int) -> int:
        """Blocks that the sequence owns; 0 where it is unknown."""
        owner = self._owners.get(sequence_id)
        return len(owner.entries) if owner else 0

    def num_missing_blocks(self, sequence_id: int, num_tokens: int) -> int:
        """Blocks that the sequence lacks to hold `num_tokens` tokens."""
        return max(0, num_blocks_for(num_tokens, self.block_size) - self.num_owned_blocks(sequence_id))

    def grow(self, sequence_id: int, request_class: RequestClass, num_tokens: int) -> None:
        """Let the sequence hold `num_tokens` tokens. The caller has seen that enough blocks are free."""
        num_missing = self.num_missing_blocks(sequence_id, num_tokens)
        assert num_missing <= self._pool.num_free
        owner = self._owners.setdefault(sequence_id, _Owner(request_class))
        for _ in range(num_missing):
            if request_class is RequestClass.RT:
                owner.entries.append(forward_entry(self._pool.take_lowest()))
            else:
                owner.entries.append(reversed_entry(self._pool.take_highest()))
        self._num_used[request_class] += num_missing

    def release(self, sequence_id: int) -> None:
        """Take every block back. A sequence that owns none is left alone."""
        owner = self._owners.pop(sequence_id, None)
        if owner is None:
            return
        for entry in owner.entries:
            self._pool.give_back(block_of(entry))
        self._num_used[owner.request_class] -= len(owner.entries)

    def take_changes(self, sequence_id: int) -> tuple[int, list[int]]:
        """`(first_changed_index, entries)`: the block table from the first entry the ranks do not know."""
        owner = self._owners[sequence_id]
        first = owner.first_changed_index
        owner.first_changed_index = len(owner.entries)
        return first, owner.entries[first:]

    def check_integrity(self) -> None:
        """Free and owned blocks make up the region, and no block has two owners.

        Raises:
            AssertionError: the books do not balance.
        """
        owned = [block_of(entry) for owner in self._owners.values() for entry in owner.entries]
        assert len(set(owned)) == len(owned), "a block has two owners"
        assert not any(self._pool.is_free(block_id) for block_id in owned), "an owned block counts as free"
        assert len(owned) + self._pool.num_free == self._pool.num_blocks, "a block is lost"
        num_free = sum(self._pool.is_free(block_id) for block_id in range(self._pool.num_blocks))
        assert num_free == self._pool.num_free, "the count of free blocks is off"
        for request_class in RequestClass:
            used = sum(len(o.entries) for o in self._owners.values() if o.request_class is request_class)
            assert used == self._num_used[request_class], f"the count of {request_class.value} blocks is off"
