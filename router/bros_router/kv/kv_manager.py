"""Who owns which slots of the KV region: the router's half of the cache, numbers alone."""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from enum import Enum
from itertools import islice
from typing import Final

from bros_router.kv.block_pool import BlockPool
from bros_router.kv.host_pool import HostPool
from bros_router.kv.prefix_cache import CachedBlock, PrefixCache
from bros_router.request import RequestClass
from bros_shard.block_layout import block_of, forward_entry, num_blocks_for, reversed_entry
from bros_shard.protocol import HostCopy, TailMove

#: How many of a sequence's newest blocks are kept saved ahead of time: what a burst takes at first.
_NUM_NEWEST: Final = 8


class Preemption(str, Enum):
    """How memory is taken from a best-effort sequence, and whether the classes share blocks."""

    RECOMPUTE = "recompute"  # all of its blocks at once; computed anew later. No sharing.
    BLOCK = "block"  # a block at a time, checkpointed to the host where that is worth it. No sharing.
    BIDIR = "bidir"  # as BLOCK, and tails of the two classes share blocks


@dataclass(frozen=True, slots=True)
class Copies:
    """What a step must copy before its forward pass, in this order."""

    out: list[HostCopy]
    tail_moves: list[TailMove]
    in_: list[HostCopy]


@dataclass(slots=True)
class _HostCopy:
    """The first `num_tokens` tokens of one block of a sequence, on the host."""

    host_block: int
    num_tokens: int


@dataclass(slots=True, eq=False)
class _Owner:
    """One sequence's blocks, as signed entries, and how much of that the ranks have been told."""

    sequence_id: int
    request_class: RequestClass
    entries: list[int] = field(default_factory=list)
    #: Tokens that the entries are to hold, those of the step being planned included.
    num_tokens: int = 0
    #: Who fills the block of the last entry from its other end.
    partner: _Owner | None = None
    #: Entries from here on are news to the ranks.
    first_changed_index: int = 0
    #: Copies on the host, by index in `entries`; an index beyond them can be restored.
    host_copies: dict[int, _HostCopy] = field(default_factory=dict)
    #: So many of the entries were published, or came from the cache.
    num_published: int = 0


@dataclass(slots=True)
class _Move:
    """The tail of a sequence leaves `source_entry` in the step being planned."""

    owner: _Owner
    index: int
    source_entry: int
    num_tokens: int


class KVManager:
    """Gives slots to sequences and takes them back. The ranks own the tensors, this owns the numbers.

    A real-time sequence fills forward blocks from the low end of the region, a best-effort one reversed blocks
    from the high end. While free blocks are few, the *tail* (the last, partly filled block) of a new sequence may
    share a block with a tail of the other class; when the two meet, the best-effort tail moves
    (`bros_shard.block_layout` has the arithmetic, `docs/kv-cache.md` the rules).

    Ask with `shortfall`, then act with `grow`. What a step must copy accumulates until `take_copies`.

    A full block can be *published* under the hash of what it holds. Others then `attach` it, of either class; whose it
    was keeps no right to it. When nobody uses it any more it stays until its memory is needed, and counts as free.
    """

    def __init__(
        self,
        num_blocks: int,
        block_size: int,
        num_host_blocks: int = 0,
        preemption: Preemption = Preemption.BIDIR,
    ) -> None:
        self.block_size = block_size
        self.preemption = preemption
        #: Free blocks below which tails share, kept for bursts of real-time requests. The policy sets it.
        self.num_reserved_blocks = 0
        self._pool = BlockPool(num_blocks)
        self._host = HostPool(num_host_blocks if preemption is not Preemption.RECOMPUTE else 0)
        self._cache = PrefixCache(num_blocks)
        #: Steps that were sent, those that run in the middle of others aside. Blocks that are filled before this one
        #: may be attached now.
        self._num_plans = self._visible_before = 0
        self._owners: dict[int, _Owner] = {}
        self._num_used = dict.fromkeys(RequestClass, 0)
        self._num_shared = 0
        # Of the step being planned:
        self._copies_out: list[HostCopy] = []
        self._moves: dict[int, _Move] = {}
        self._restored: list[tuple[_Owner, int]] = []
        #: Blocks that a tail leaves: nothing else may move into them within the same step.
        self._move_sources: set[int] = set()
        self._held_back: list[int] = []
        #: Blocks given back since the last step was planned, since the one before and the one before that: these steps
        #: may still read and write them.
        self._given_back: deque[set[int]] = deque([set(), set(), set()], maxlen=3)
        self._may_share = preemption is Preemption.BIDIR

    # --- what there is

    @property
    def num_blocks(self) -> int:
        """Blocks of the region."""
        return self._pool.num_blocks

    @property
    def num_free_blocks(self) -> int:
        """Blocks that nobody uses."""
        return self._pool.num_free + self._cache.num_idle

    @property
    def num_idle_blocks(self) -> int:
        """Those of the free blocks that hold what may be asked for again."""
        return self._cache.num_idle

    @property
    def num_free_host_blocks(self) -> int:
        """Blocks of the host pool that hold nothing, or nothing that is needed."""
        return self._host.num_free + self._host.num_spare

    @property
    def has_unused_host_block(self) -> bool:
        """Whether the host pool has a block that holds nothing."""
        return self._host.num_free > 0

    @property
    def num_shared_blocks(self) -> int:
        """Blocks with two owners."""
        return self._num_shared

    def num_used_blocks(self, request_class: RequestClass) -> int:
        """Blocks that sequences of this class use; one that both classes use counts for real-time alone."""
        shared = self._num_shared if request_class is RequestClass.BE else 0
        return self._num_used[request_class] - shared - self._cache.num_extra_users[request_class]

    def num_owned_blocks(self, sequence_id: int) -> int:
        """Blocks that hold tokens of the sequence; 0 where it is unknown."""
        owner = self._owners.get(sequence_id)
        return len(owner.entries) if owner else 0

    def num_own_blocks(self, sequence_id: int) -> int:
        """Those of its blocks that nobody else reads: taking others frees nothing, unless all readers lose them."""
        return self.num_owned_blocks(sequence_id) - len(self._read_by_others(sequence_id))

    def num_blocks_freed(self, sequence_ids: Iterable[int]) -> int:
        """How many blocks there would be if all of these sequences lost theirs."""
        num_blocks = 0
        num_readers = Counter[CachedBlock]()
        for sequence_id in sequence_ids:
            num_blocks += self.num_own_blocks(sequence_id)
            num_readers.update(self._read_by_others(sequence_id))
        return num_blocks + sum(count == block.num_users for block, count in num_readers.items())

    def _read_by_others(self, sequence_id: int) -> list[CachedBlock]:
        """They stand in front: the hash of a block covers all before it."""
        owner = self._owners.get(sequence_id)
        blocks: list[CachedBlock] = []
        for entry in owner.entries[: owner.num_published] if owner else ():
            block = self._cache.of(block_of(entry))
            if block is None or block.num_users == 1:
                break
            blocks.append(block)
        return blocks

    # --- growing

    def shortfall(self, sequence_id: int, request_class: RequestClass, num_tokens: int) -> int:
        """Blocks that are missing before the sequence can hold `num_tokens` tokens; 0: `grow` will do."""
        owner = self._owners.get(sequence_id)
        num_new = num_blocks_for(num_tokens, self.block_size)
        if owner is not None:
            num_new -= len(owner.entries)
            if num_new <= 0 and owner.partner is None:
                return 0
        is_tail_leaving = owner is not None and self._meets_partner(owner, num_tokens)
        num_missing = max(0, num_new) + is_tail_leaving - self.num_free_blocks
        if num_missing <= 0:
            return 0
        # What needs no block of its own: the new last block, and a tail that has to leave.
        if num_new > 0:
            num_missing -= self._find_gap(request_class, self._tail_of(num_tokens)) is not None
        if is_tail_leaving:
            assert owner is not None and owner.partner is not None
            leaving = owner if request_class is RequestClass.BE else owner.partner
            # A best-effort tail that is about to fill its block cannot share one again.
            if leaving is not owner or num_new <= 0:
                size = self._tail_of(num_tokens) if leaving is owner else self._num_tail_tokens(leaving)
                num_missing -= self._find_gap(RequestClass.BE, size) is not None
        return max(0, num_missing)

    def grow(self, sequence_id: int, request_class: RequestClass, num_tokens: int) -> None:
        """Let the sequence hold `num_tokens` tokens. The caller has seen that `shortfall` is 0."""
        owner = self._owners.get(sequence_id)
        if owner is None:
            owner = self._owners[sequence_id] = _Owner(sequence_id, request_class)
        num_new = num_blocks_for(num_tokens, self.block_size) - len(owner.entries)
        is_tail_leaving = self._meets_partner(owner, num_tokens)
        if num_new > 0 or is_tail_leaving:
            num_free = self.num_free_blocks
            is_tight = num_free < num_new + is_tail_leaving or num_free <= self.num_reserved_blocks
            if is_tail_leaving:
                self._part(owner, num_tokens, is_tight, is_to_fill=num_new > 0)
            for position in range(num_new):
                is_shared = is_tight and position == num_new - 1
                self._append(owner, self._find_gap(request_class, self._tail_of(num_tokens)) if is_shared else None)
        owner.num_tokens = max(owner.num_tokens, num_tokens)

    def _append(self, owner: _Owner, gap: _Owner | None) -> None:
        """One more block at the end: shared with the tail of `gap`, or a fresh one."""
        if gap is not None:
            self._pair(owner, gap)
            block_id = block_of(gap.entries[-1])
        else:
            block_id = self._take_block(owner.request_class)
        is_forward = owner.request_class is RequestClass.RT
        owner.entries.append(forward_entry(block_id) if is_forward else reversed_entry(block_id))
        self._num_used[owner.request_class] += 1

    def _take_block(self, request_class: RequestClass) -> int:
        if not self._pool.num_free:
            return self._cache.give_up()
        return self._pool.take_lowest() if request_class is RequestClass.RT else self._pool.take_highest()

    # --- sharing

    def _tail_of(self, num_tokens: int) -> int:
        """Tokens in the last block of `num_tokens` tokens: 1 to `block_size`."""
        return (num_tokens - 1) % self.block_size + 1

    def _num_tail_tokens(self, owner: _Owner) -> int:
        return owner.num_tokens - (len(owner.entries) - 1) * self.block_size

    def _meets_partner(self, owner: _Owner, num_tokens: int) -> bool:
        """Whether growing to `num_tokens` takes more of the shared block than its other owner leaves."""
        if owner.partner is None:
            return False
        num_tail_tokens = num_tokens - (len(owner.entries) - 1) * self.block_size
        return num_tail_tokens + self._num_tail_tokens(owner.partner) > self.block_size

    def _find_gap(self, request_class: RequestClass, num_tail_tokens: int) -> _Owner | None:
        """The owner of the other class whose tail block has the most room, and a quarter of a block to spare.

        The spare quarter keeps the two from meeting again within a few tokens.
        """
        if not self._may_share:
            return None
        most = self.block_size - num_tail_tokens - self.block_size // 4
        best: _Owner | None = None
        for owner in self._owners.values():
            if owner.request_class is request_class or owner.partner is not None or not owner.entries:
                continue
            num_tokens = self._num_tail_tokens(owner)
            if num_tokens <= most and block_of(owner.entries[-1]) not in self._move_sources:
                best, most = owner, num_tokens - 1
        return best

    def _pair(self, owner: _Owner, other: _Owner) -> None:
        owner.partner, other.partner = other, owner
        self._num_shared += 1

    def _unpair(self, owner: _Owner) -> None:
        assert owner.partner is not None
        owner.partner.partner = None
        owner.partner = None
        self._num_shared -= 1

    def _part(self, owner: _Owner, num_tokens: int, is_tight: bool, is_to_fill: bool) -> None:
        """Two owners of a block have met: the best-effort tail moves, into another gap where memory is tight.

        Args:
            num_tokens: what `owner` grows to.
            is_to_fill: it fills the block it has, so if its own tail is the one that moves, it needs a whole one.
        """
        assert owner.partner is not None
        leaving = owner if owner.request_class is RequestClass.BE else owner.partner
        size = self._num_tail_tokens(leaving)
        index = len(leaving.entries) - 1
        source_entry = leaving.entries.pop()
        self._num_used[RequestClass.BE] -= 1
        self._unpair(owner)
        self._move_sources.add(block_of(source_entry))
        gap = None
        if is_tight and (leaving is not owner or not is_to_fill):
            gap = self._find_gap(RequestClass.BE, self._tail_of(num_tokens) if leaving is owner else size)
        self._append(leaving, gap)
        leaving.first_changed_index = min(leaving.first_changed_index, index)
        if leaving.sequence_id not in self._moves:  # a second move within a step starts where the first did
            self._moves[leaving.sequence_id] = _Move(leaving, index, source_entry, size)

    # --- reading what others have computed

    def num_cached_tokens(self, hashes: Sequence[bytes]) -> int:
        """Tokens that a new sequence with these block hashes would find computed."""
        return len(self._cache.find(hashes, 0, self._visible_before)) * self.block_size

    def attach(self, sequence_id: int, request_class: RequestClass, hashes: Sequence[bytes]) -> int:
        """Let a sequence read the blocks that hold what comes after its own ones, which are full and computed.

        Args:
            hashes: those of its blocks from the first one on. The last known token must not be among them: computing it
                gives the next.

        Returns:
            How many of its tokens are computed then.
        """
        owner = self._owners.get(sequence_id)
        num_entries = len(owner.entries) if owner else 0
        found = self._cache.find(hashes, num_entries, self._visible_before)
        if not found:
            return num_entries * self.block_size
        if owner is None:
            owner = self._owners[sequence_id] = _Owner(sequence_id, request_class)
        assert owner.partner is None, "its last block is not full"
        for index, block in enumerate(found, start=num_entries):
            self._cache.hold(block, request_class)
            owner.entries.append(block.entry)
            self._num_used[request_class] += 1
            copy = owner.host_copies.get(index)
            if copy is not None:
                self._host.mark_spare(copy.host_block, sequence_id, index)
        owner.num_published = len(owner.entries)
        owner.num_tokens = len(owner.entries) * self.block_size
        return owner.num_tokens

    def detach(self, sequence_id: int, num_blocks: int) -> None:
        """Undo `attach`: the sequence has `num_blocks` blocks again, or fewer."""
        owner = self._owners[sequence_id]
        while len(owner.entries) > num_blocks:
            self._drop_last(owner)
            copy = owner.host_copies.get(len(owner.entries))
            if copy is not None:
                self._host.mark_needed(copy.host_block)

    def publish(
        self, sequence_id: int, hashes: Sequence[bytes], num_computed_tokens: int, *, is_interruption: bool = False
    ) -> None:
        """The full blocks of these hashes may be read by others from the next plan on.

        Args:
            num_computed_tokens: computed once the last plan has run, or what is about to interrupt it.
        """
        owner = self._owners[sequence_id]
        # When a step that interrupts others runs is not known but for this: before the next plan.
        plan_number = self._num_plans if is_interruption else self._num_plans - 1
        num_full = min(len(hashes), num_computed_tokens // self.block_size, len(owner.entries))
        for index in range(owner.num_published, num_full):
            self._cache.put(hashes[index], owner.entries[index], plan_number, owner.request_class)
        owner.num_published = max(owner.num_published, num_full)

    def forget_cached(self) -> None:
        """What the region held is lost, and nobody uses any of it."""
        for block_id in self._cache.clear():
            self._pool.give_back(block_id)

    # --- giving up

    def release(self, sequence_id: int, *, is_sound: bool = True) -> None:
        """Take everything back, host copies too. A sequence that owns nothing is left alone.

        Args:
            is_sound: whether what it computed may be read by others.
        """
        owner = self._owners.pop(sequence_id, None)
        if owner is None:
            return
        if not is_sound:
            for entry in owner.entries:
                block = self._cache.of(block_of(entry))
                if block is not None and block.num_users == 1:
                    self._cache.forget(block)
        while owner.entries:
            self._drop_last(owner)
        for copy in owner.host_copies.values():
            self._host.give_back(copy.host_block)

    def _drop_last(self, owner: _Owner) -> None:
        """Take the last block back, unless another sequence shares it."""
        move = self._moves.get(owner.sequence_id)
        if move is not None and move.index == len(owner.entries) - 1:
            del self._moves[owner.sequence_id]
        block_id = block_of(owner.entries.pop())
        self._num_used[owner.request_class] -= 1
        owner.num_tokens = min(owner.num_tokens, len(owner.entries) * self.block_size)
        owner.first_changed_index = min(owner.first_changed_index, len(owner.entries))
        owner.num_published = min(owner.num_published, len(owner.entries))
        block = self._cache.of(block_id)
        if block is not None:
            self._cache.let_go(block, owner.request_class)
            self._given_back[-1].add(block_id)
        elif owner.partner is not None:
            self._unpair(owner)
        elif block_id in self._move_sources:
            self._held_back.append(block_id)
        else:
            self._pool.give_back(block_id)
            self._given_back[-1].add(block_id)

    def num_tokens_to_save(self, sequence_id: int, num_computed_tokens: int) -> int:
        """Tokens that would have to be copied to the host before the sequence's last block is taken; 0: none."""
        owner = self._owners[sequence_id]
        index = len(owner.entries) - 1
        num_tokens = min(num_computed_tokens - index * self.block_size, self.block_size)
        copy = owner.host_copies.get(index)
        return 0 if num_tokens <= 0 or (copy is not None and copy.num_tokens >= num_tokens) else num_tokens

    def take_last_block(self, sequence_id: int, num_computed_tokens: int, *, is_saved: bool) -> int:
        """Take the sequence's newest block, first saving its tokens on the host where `is_saved`, if it has room.

        Returns:
            How many of its computed tokens the sequence has left.
        """
        owner = self._owners[sequence_id]
        index = len(owner.entries) - 1
        if is_saved and self.num_tokens_to_save(sequence_id, num_computed_tokens):
            self._copy_out(owner, index, num_computed_tokens)
        copy = owner.host_copies.get(index)
        if copy is not None:
            self._host.mark_needed(copy.host_block)
        self._drop_last(owner)
        return min(num_computed_tokens, index * self.block_size)

    def checkpoint(self, sequence_id: int, index: int) -> None:
        """Copy a full, computed block to the host ahead of time: taking it later costs nothing."""
        owner = self._owners[sequence_id]
        self._copy_out(owner, index, (index + 1) * self.block_size)
        copy = owner.host_copies.get(index)
        if copy is not None:
            self._host.mark_spare(copy.host_block, sequence_id, index)

    def newest_unsaved_block(self, sequence_id: int, num_computed_tokens: int) -> int | None:
        """Index of a full computed block without a copy on the host, among the newest few of the sequence."""
        owner = self._owners[sequence_id]
        num_full = min(num_computed_tokens // self.block_size, len(owner.entries))
        for index in range(num_full - 1, max(-1, num_full - 1 - _NUM_NEWEST), -1):
            if index not in owner.host_copies:
                return index
        return None

    def _copy_out(self, owner: _Owner, index: int, num_computed_tokens: int) -> None:
        """Plan a copy of the block at `index`; without a free host block, nothing."""
        num_tokens = min(num_computed_tokens - index * self.block_size, self.block_size)
        copy = owner.host_copies.get(index)
        if copy is None:
            if self._host.num_free == 0 and not self._give_up_spare():
                return
            copy = owner.host_copies[index] = _HostCopy(self._host.take(), num_tokens)
        copy.num_tokens = num_tokens
        move = self._moves.get(owner.sequence_id)
        # Copies out come first in a step: a tail that moves in this one is still where it was.
        entry = owner.entries[index] if move is None or move.index != index else move.source_entry
        self._copies_out.append(HostCopy(entry, copy.host_block, num_tokens))

    def _give_up_spare(self) -> bool:
        spare = self._host.oldest_spare()
        if spare is None:
            return False
        sequence_id, index = spare
        self._host.give_back(self._owners[sequence_id].host_copies.pop(index).host_block)
        return True

    # --- restoring

    def num_restorable_tokens(self, sequence_id: int, num_computed_tokens: int) -> int:
        """Tokens after the computed ones that the host has without a gap."""
        owner = self._owners.get(sequence_id)
        if owner is None or num_computed_tokens % self.block_size:
            return 0
        num_tokens = 0
        index = num_computed_tokens // self.block_size
        while (copy := owner.host_copies.get(index)) is not None:
            num_tokens += copy.num_tokens
            if copy.num_tokens < self.block_size:
                break
            index += 1
        return num_tokens

    def restore(self, sequence_id: int, num_computed_tokens: int, num_tokens: int) -> int:
        """Copy back what the host has of the tokens up to `num_tokens`, for which the sequence has blocks again.

        Returns:
            How many tokens are computed then.
        """
        owner = self._owners[sequence_id]
        index = num_computed_tokens // self.block_size
        while num_computed_tokens < num_tokens and (copy := owner.host_copies.get(index)) is not None:
            num_copied = min(copy.num_tokens, num_tokens - num_computed_tokens)
            copy.num_tokens = num_copied  # the rest is computed anew, and the block is copied whole next time
            self._restored.append((owner, index))
            num_computed_tokens += num_copied
            index += 1
        return num_computed_tokens

    # --- telling the ranks

    def take_changes(self, sequence_id: int) -> tuple[int, list[int]]:
        """`(first_changed_index, entries)`: the block table from the first entry the ranks do not know."""
        owner = self._owners[sequence_id]
        first = owner.first_changed_index
        if first == len(owner.entries):
            return first, []
        owner.first_changed_index = len(owner.entries)
        return first, owner.entries[first:]

    def take_copies(self) -> Copies:
        """What the step that was composed must copy. The next one begins with none."""
        moves = [
            TailMove(move.source_entry, move.owner.entries[move.index], move.num_tokens)
            for move in self._moves.values()
        ]
        copies_in = []
        for owner, index in self._restored:
            copy = owner.host_copies[index]
            copies_in.append(HostCopy(owner.entries[index], copy.host_block, copy.num_tokens))
            self._host.mark_spare(copy.host_block, owner.sequence_id, index)
        copies = Copies(self._copies_out, moves, copies_in)
        self._copies_out = []
        self._moves.clear()
        self._restored.clear()
        self._move_sources.clear()
        for block_id in self._held_back:
            self._pool.give_back(block_id)
        self._given_back[-1].update(self._held_back)
        self._held_back.clear()
        return copies

    def step_planned(self) -> None:
        """The step that was composed is sent: what is given back or published from now on came after it."""
        self._given_back.append(set())
        self._num_plans += 1
        self._visible_before = self._num_plans

    @contextmanager
    def beside_planned_steps(self, num_steps: int) -> Iterator[None]:
        """Within this, only whole blocks can be taken that were free when the last `num_steps` steps were planned.

        What runs in the middle of that one must not write where it still reads or writes, or where the last one copies
        from: blocks whose sequences have ended or given way since, and their part of blocks that they shared. Nor can
        it read what these steps are to compute.

        Args:
            num_steps: how many of the steps that were planned last may not have ended: 1 to 3.
        """
        may_share, self._may_share = self._may_share, False
        given_back = set[int]().union(*islice(reversed(self._given_back), num_steps))
        set_aside = [block_id for block_id in given_back if self._pool.is_free(block_id)]
        for block_id in set_aside:
            self._pool.take(block_id)
        self._cache.keep(frozenset(given_back))
        self._visible_before = self._num_plans - num_steps
        try:
            yield
        finally:
            self._may_share = may_share
            for block_id in set_aside:
                self._pool.give_back(block_id)
            self._cache.keep(frozenset())
            self._visible_before = self._num_plans

    # --- checking

    def check_integrity(self) -> None:
        """Free and owned blocks make up the region, no slot has two owners, and the counts are right.

        Raises:
            AssertionError: the books do not balance.
        """
        owners: dict[int, list[_Owner]] = {}
        for owner in self._owners.values():
            assert num_blocks_for(owner.num_tokens, self.block_size) == len(owner.entries), "tokens without a block"
            for entry in owner.entries:
                owners.setdefault(block_of(entry), []).append(owner)
        num_shared = 0
        for block_id, sharers in owners.items():
            assert not self._pool.is_free(block_id), "an owned block counts as free"
            block = self._cache.of(block_id)
            if block is not None:
                for request_class, num_users in zip(
                    (RequestClass.RT, RequestClass.BE), (block.num_rt_users, block.num_be_users), strict=True
                ):
                    assert num_users == sum(owner.request_class is request_class for owner in sharers), (
                        "miscounted users"
                    )
            elif len(sharers) > 1:
                num_shared += 1
                self._check_shared(block_id, sharers)
        assert num_shared == self._num_shared, "the count of shared blocks is off"
        assert num_shared * 2 == sum(owner.partner is not None for owner in self._owners.values())
        assert len(owners) + self.num_free_blocks == self._pool.num_blocks, "a block is lost"
        for request_class in RequestClass:
            is_rt = request_class is RequestClass.RT
            num_blocks = sum(
                any(owner.request_class is RequestClass.RT for owner in sharers) is is_rt for sharers in owners.values()
            )
            assert num_blocks == self.num_used_blocks(request_class), "blocks of a class are miscounted"
        num_free = sum(self._pool.is_free(block_id) for block_id in range(self._pool.num_blocks))
        assert num_free == self._pool.num_free, "the count of free blocks is off"
        for request_class in RequestClass:
            used = sum(len(o.entries) for o in self._owners.values() if o.request_class is request_class)
            assert used == self._num_used[request_class], f"the count of {request_class.value} blocks is off"
        copies = [copy.host_block for owner in self._owners.values() for copy in owner.host_copies.values()]
        assert len(set(copies)) == len(copies), "a host block holds two copies"
        assert len(copies) + self._host.num_free == self._host.num_blocks, "a host block is lost"

    def _check_shared(self, block_id: int, sharers: list[_Owner]) -> None:
        assert len(sharers) == 2, "a block has three owners"
        first, second = sharers
        assert first.partner is second and second.partner is first, "owners of a block do not know each other"
        assert first.request_class is not second.request_class
        assert block_of(first.entries[-1]) == block_of(second.entries[-1]) == block_id, "not a tail is shared"
        num_tokens = self._num_tail_tokens(first) + self._num_tail_tokens(second)
        assert num_tokens <= self.block_size, "a slot has two owners"
