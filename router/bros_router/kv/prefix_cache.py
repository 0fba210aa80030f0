"""Full blocks that are found again by what they hold: those in use, and those that nobody uses any more."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass

from bros_router.request import RequestClass
from bros_shard.block_layout import block_of


@dataclass(slots=True, eq=False)
class CachedBlock:
    """A full block. Whoever reads it must not write to it."""

    block_hash: bytes
    #: The entry under which it is read: forward or reversed, as its first owner filled it.
    entry: int
    #: Number of the plan that fills it: only what runs after that may read it.
    plan_number: int
    #: Sequences that have it in their tables.
    num_rt_users: int = 0
    num_be_users: int = 0

    @property
    def block_id(self) -> int:
        """The block."""
        return block_of(self.entry)

    @property
    def num_users(self) -> int:
        """Sequences of both classes that have it in their tables."""
        return self.num_rt_users + self.num_be_users


class PrefixCache:
    """Which blocks hold what, who uses them, and which to give up first.

    Blocks without users are *idle*. The one that was let go longest ago is given up first, and of a sequence the last
    block first: without those before it, a block is of no use. Best-effort work lets go so many that it would flush
    what chats come back to; so an idle block that a real-time sequence used last counts as let go a whole region of
    blocks later.
    """

    def __init__(self, num_blocks: int) -> None:
        self._by_hash: dict[bytes, CachedBlock] = {}
        self._by_block: dict[int, CachedBlock] = {}
        #: Idle blocks to when they were let go, the longest ago first, by the class that used them last.
        self._idle: dict[RequestClass, OrderedDict[int, int]] = {c: OrderedDict() for c in RequestClass}
        self._num_let_go = 0
        self._lead = {RequestClass.RT: num_blocks, RequestClass.BE: 0}
        #: Idle blocks that must not be given up now.
        self._kept: frozenset[int] = frozenset()
        #: Block-table entries beyond the first of a block, which counts for the real-time class if one of it uses it.
        self.num_extra_users = dict.fromkeys(RequestClass, 0)

    @property
    def num_idle(self) -> int:
        """Blocks that can be given up."""
        return sum(map(len, self._idle.values())) - len(self._kept)

    def of(self, block_id: int) -> CachedBlock | None:
        """What is known of a block; `None`: what it holds is its owner's alone."""
        return self._by_block.get(block_id)

    def find(self, hashes: Sequence[bytes], start: int, before_plan: int) -> list[CachedBlock]:
        """The blocks from index `start` on without a gap, as far as they are filled before a plan of this number."""
        found = []
        for index in range(start, len(hashes)):
            block = self._by_hash.get(hashes[index])
            if block is None or block.plan_number >= before_plan:
                break
            found.append(block)
        return found

    def put(self, block_hash: bytes, entry: int, plan_number: int, request_class: RequestClass) -> None:
        """A block with one owner, of this class, is full. Where another holds the same already, nothing changes."""
        if block_hash in self._by_hash or block_of(entry) in self._by_block:
            return
        block = CachedBlock(block_hash, entry, plan_number)
        self._by_hash[block_hash] = self._by_block[block.block_id] = block
        self._add_user(block, request_class, 1)

    def hold(self, block: CachedBlock, request_class: RequestClass) -> None:
        """One more sequence has the block in its table."""
        if not block.num_users:
            for idle in self._idle.values():
                idle.pop(block.block_id, None)
            self._kept -= {block.block_id}
        self._add_user(block, request_class, 1)

    def let_go(self, block: CachedBlock, request_class: RequestClass) -> None:
        """A sequence has it no more."""
        self._add_user(block, request_class, -1)
        if not block.num_users:
            self._num_let_go += 1
            self._idle[request_class][block.block_id] = self._num_let_go + self._lead[request_class]

    def forget(self, block: CachedBlock) -> None:
        """From now on what the block holds is the business of its one user."""
        assert block.num_users == 1
        del self._by_hash[block.block_hash], self._by_block[block.block_id]

    def clear(self) -> list[int]:
        """Forget all blocks, which nobody uses. Returns them."""
        assert len(self._by_block) == sum(map(len, self._idle.values()))
        block_ids = list(self._by_block)
        self._by_hash.clear()
        self._by_block.clear()
        for idle in self._idle.values():
            idle.clear()
        return block_ids

    def give_up(self) -> int:
        """Forget the idle block that is worth least. Returns its id; there is one."""
        firsts = []
        for idle in self._idle.values():
            first = next((block_id for block_id in idle if block_id not in self._kept), None)
            if first is not None:
                firsts.append((idle[first], first, idle))
        _, block_id, idle = min(firsts, key=lambda first: first[:2])
        del idle[block_id]
        del self._by_hash[self._by_block.pop(block_id).block_hash]
        return block_id

    def keep(self, block_ids: frozenset[int]) -> None:
        """Give up none of these until the next call."""
        self._kept = frozenset(
            block_id for block_id in block_ids if (block := self.of(block_id)) is not None and not block.num_users
        )

    def _add_user(self, block: CachedBlock, request_class: RequestClass, change: int) -> None:
        for other in RequestClass:
            self.num_extra_users[other] -= _num_extra_users(block, other)
        if request_class is RequestClass.RT:
            block.num_rt_users += change
        else:
            block.num_be_users += change
        for other in RequestClass:
            self.num_extra_users[other] += _num_extra_users(block, other)


def _num_extra_users(block: CachedBlock, request_class: RequestClass) -> int:
    if request_class is RequestClass.RT:
        return max(0, block.num_rt_users - 1)
    return block.num_be_users - (block.num_be_users > 0 and block.num_rt_users == 0)
