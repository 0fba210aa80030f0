"""The step that is being composed: what a policy may ask, and what it may do."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass
from typing import Final, NamedTuple, TypeAlias

from bros_router.kv.kv_manager import KVManager, Preemption
from bros_router.request import RequestClass
from bros_router.scheduling.latency_model import LatencyModel
from bros_router.scheduling.sequence import Sequence, SequenceState
from bros_shard.protocol import StepShape


@dataclass(frozen=True, slots=True)
class SchedulerLimits:
    """What a step may hold."""

    #: The token budget: most tokens computed in one step. TGI's `--max-batch-prefill-tokens`.
    max_batch_tokens: int
    #: Most sequences in one step. TGI's `--max-batch-size`.
    max_num_sequences: int
    #: The ranks can run a step in the middle of another.
    can_interrupt: bool = False


#: Copies that make a step longer by less than this factor are made although it is late as it is: what they save from
#: being computed anew takes a hundred times as long.
_NEGLIGIBLE: Final = 1.05


#: A sequence and how many of its pending tokens the step computes.
Chunk: TypeAlias = tuple[Sequence, int]


class Guesses(NamedTuple):
    """What the ranks may guess in a step behind the token that it decodes of a sequence."""

    #: Of that sequence, before the step.
    num_computed_tokens: int
    num_allowed: int
    num_expected: int


#: For sequences that nothing is guessed for.
NO_GUESSES: Final = Guesses(0, 0, 0)


class StepDraft:
    """A step on its way to a `StepPlan`. Every action takes effect at once, so ask first: there is no undo.

    The mechanism of scheduling: a policy decides by calling this, and can do nothing else. It keeps the limits of
    a step, lets sequences in, gives them memory and takes it from others, and predicts how long the step takes.
    """

    def __init__(
        self,
        now_s: float,
        start_s: float,
        step_id: int,
        kv: KVManager,
        latency_model: LatencyModel,
        limits: SchedulerLimits,
        running: dict[int, Sequence],
        on_preempted: Callable[[Sequence], None],
    ) -> None:
        self.now_s = now_s
        #: When the step will start: every deadline is judged by this.
        self.start_s = start_s
        self.step_id = step_id
        self.kv = kv
        self.latency_model = latency_model
        self.limits = limits
        self.chunks: list[Chunk] = []
        self.num_tokens_left = limits.max_batch_tokens
        #: Most sequences of this step; a policy may lower it.
        self.max_num_sequences = limits.max_num_sequences
        #: Who gave up memory for this step, and its class.
        self.victims: dict[int, RequestClass] = {}
        self.relegated: list[Sequence] = []
        #: When the step must have ended for those in it, as far as the policy knows.
        self.latest_end_s = math.inf
        #: By id of their sequences.
        self.guesses: dict[int, Guesses] = {}
        #: Who reads blocks of the cache since it is considered for this step, and how many blocks it had before.
        self._attached: tuple[Sequence, int] | None = None
        self._running = running
        self._on_preempted = on_preempted
        self._members: set[int] = set()
        self._num_prefill_tokens = 0
        self._num_prefill_sequences = 0
        self._num_decode_sequences = 0
        self._prefill_attention = 0.0
        self._decode_context_tokens = 0
        self._num_copied_tokens = 0

    # --- what there is

    @property
    def running(self) -> Collection[Sequence]:
        """Sequences that were let in and have not ended, in that order; some may be preempted in part."""
        return self._running.values()

    @property
    def num_sequences_left(self) -> int:
        """How many more sequences the step may hold."""
        return self.max_num_sequences - len(self.chunks)

    @property
    def shape(self) -> StepShape:
        """What the time of the step, as far as it is composed, depends on; with the guesses that are expected."""
        shape = self.shape_without_guesses
        for guesses in self.guesses.values():
            shape = shape.with_sequence(guesses.num_computed_tokens, 1 + guesses.num_expected)
        return shape

    @property
    def shape_without_guesses(self) -> StepShape:
        """The same, but for the sequences that the ranks may guess for."""
        return StepShape(
            self._num_prefill_tokens,
            self._num_prefill_sequences,
            self._num_decode_sequences,
            self._prefill_attention,
            self._decode_context_tokens,
            self._num_copied_tokens,
        )

    @property
    def end_s(self) -> float:
        """When the step, as far as it is composed, will have ended."""
        return self.start_s + self.latency_model.bound_s(self.shape)

    def holds(self, sequence: Sequence) -> bool:
        """Whether the sequence is in the step."""
        return sequence.sequence_id in self._members

    def may_run(self, sequence: Sequence) -> bool:
        """Whether this step may take up a sequence: it waits for no token, and gave up nothing for this very step."""
        return sequence.is_ready and sequence.sequence_id not in self.victims

    def shortfall(self, sequence: Sequence, num_tokens: int) -> int:
        """KV blocks that are missing before `num_tokens` more tokens of the sequence can be computed."""
        return self.kv.shortfall(sequence.sequence_id, sequence.request_class, sequence.num_stored_tokens(num_tokens))

    def largest_chunk(self, sequence: Sequence, end_s: float) -> int:
        """The most pending tokens of the sequence that the token budget and a step ending by `end_s` leave room for."""
        limit = min(sequence.num_pending_tokens, self.num_tokens_left)
        if limit <= 0:
            return 0
        return self.latency_model.largest_chunk(self.shape, sequence.num_computed_tokens, limit, end_s - self.start_s)

    # --- what can be done

    def attach_cached(self, sequence: Sequence) -> None:
        """Let a sequence that is about to be added read what the KV region holds of it already.

        If it is not added after all, it has nothing of that as soon as the next one is considered: whoever holds memory
        and waits for more, keeps others from going on.
        """
        self.detach_unused()
        if not sequence.block_hashes or sequence.num_in_flight_tokens:
            return
        block_size = self.kv.block_size
        # The last known token is computed anew, whatever is there: the next one comes from it.
        hashes = sequence.block_hashes[: (sequence.num_known_tokens - 1) // block_size]
        num_blocks = self.kv.num_owned_blocks(sequence.sequence_id)
        if num_blocks >= len(hashes) or num_blocks * block_size != sequence.num_computed_tokens:
            return
        sequence.num_computed_tokens = self.kv.attach(sequence.sequence_id, sequence.request_class, hashes)
        if sequence.state is SequenceState.WAITING:
            sequence.num_cached_tokens = sequence.num_computed_tokens
        self._attached = sequence, num_blocks

    def detach_unused(self) -> None:
        """Who was considered last and not added has what it had before."""
        if self._attached is None:
            return
        sequence, num_blocks = self._attached
        self._attached = None
        if self.holds(sequence):
            return
        if sequence.state is SequenceState.WAITING:
            self.kv.release(sequence.sequence_id)
        else:
            self.kv.detach(sequence.sequence_id, num_blocks)
        sequence.num_computed_tokens = min(sequence.num_computed_tokens, num_blocks * self.kv.block_size)

    def add(self, sequence: Sequence, num_tokens: int, num_reserved_tokens: int = 0) -> None:
        """Let the step compute the next `num_tokens` pending tokens of a sequence; let it in if it waits.

        Its `shortfall` is 0 for these, and for `num_reserved_tokens`: what it gets blocks for now, so that nobody can
        come between the chunks of a prompt.
        """
        assert sequence.sequence_id not in self._members and sequence.sequence_id not in self.victims
        num_computed_tokens = sequence.num_computed_tokens
        num_stored_tokens = sequence.num_stored_tokens(max(num_tokens, num_reserved_tokens))
        self.kv.grow(sequence.sequence_id, sequence.request_class, num_stored_tokens)
        if sequence.state is SequenceState.WAITING:
            sequence.state = SequenceState.RUNNING
            self._running[sequence.sequence_id] = sequence
            sequence.num_cached_tokens = 0
            if sequence.first_scheduled_s is None:
                sequence.num_reused_tokens = num_computed_tokens
        self._members.add(sequence.sequence_id)
        self.chunks.append((sequence, num_tokens))
        self.num_tokens_left -= num_tokens
        if num_tokens == 1:
            self._num_decode_sequences += 1
            self._decode_context_tokens += num_computed_tokens + 1
        else:
            self._num_prefill_sequences += 1
            self._num_prefill_tokens += num_tokens
            self._prefill_attention += num_tokens * (num_computed_tokens + num_tokens / 2)

    def most_guesses(self, sequence: Sequence, limit: int) -> int:
        """How many guesses, `limit` at most, there is room for behind a sequence that decodes in this step."""
        num_stored_tokens = sequence.num_stored_tokens(1)
        most = min(limit, self.num_tokens_left, sequence.max_total_tokens - 1 - num_stored_tokens)
        if most > 0 and self.shortfall(sequence, 1 + most):
            most = min(most, -num_stored_tokens % self.kv.block_size)  # as far as its last block goes
        return most if most > 0 and not self.shortfall(sequence, 1 + most) else 0

    def speculate(self, sequence: Sequence, num_guesses: int) -> None:
        """Let the ranks guess so many tokens, at most `most_guesses`, for a sequence that decodes in this step."""
        num_computed_tokens = sequence.num_computed_tokens
        self.kv.grow(sequence.sequence_id, sequence.request_class, sequence.num_stored_tokens(1 + num_guesses))
        self._num_decode_sequences -= 1
        self._decode_context_tokens -= num_computed_tokens + 1
        num_expected = sequence.guesses.num_expected(num_guesses)
        self.guesses[sequence.sequence_id] = Guesses(num_computed_tokens, num_guesses, num_expected)
        self.num_tokens_left -= num_guesses

    def preempt(self, victim: Sequence) -> None:
        """Take all memory of a running sequence; it waits again, to be computed anew from its first token."""
        assert not self.holds(victim)
        self.victims[victim.sequence_id] = victim.request_class
        del self._running[victim.sequence_id]
        self.kv.release(victim.sequence_id)
        victim.note_lost_memory()
        victim.start_over()
        self._on_preempted(victim)

    def relegate(self, sequence: Sequence) -> None:
        """Its targets cannot be met any more: from now on it holds up nobody."""
        sequence.is_late = True
        self.relegated.append(sequence)

    def make_room(
        self, sequence: Sequence, num_tokens: int, victims: Iterable[Sequence], end_s: float = math.inf
    ) -> bool:
        """See to it that `num_tokens` more tokens of the sequence can be computed, at the cost of `victims`.

        They lose their newest blocks first, each as many as are needed, the first victim before the second. What they
        lose is saved on the host, unless that would make the step end after `end_s`: then it is computed anew later.

        Returns:
            Whether there is room. Without enough victims nothing is taken.
        """
        num_missing = self.shortfall(sequence, num_tokens)
        if num_missing == 0:
            return True
        candidates = [victim for victim in victims if victim is not sequence and self._may_give(victim)]
        if self.kv.num_blocks_freed(victim.sequence_id for victim in candidates) < num_missing:
            return False

        def is_enough() -> bool:
            return self.shortfall(sequence, num_tokens) == 0

        # It may still fail: where their tails share blocks with others, taking them frees too little.
        return self._take(candidates, self.kv.num_own_blocks, is_enough, end_s) or self._take(
            candidates, self.kv.num_owned_blocks, is_enough, end_s
        )

    def keep_free(self, num_blocks: int, victims: Iterable[Sequence], end_s: float = math.inf) -> None:
        """See to it that so many blocks are free, as far as `victims` have them; they lose them as in `make_room`."""
        candidates = filter(self._may_give, victims)
        self._take(candidates, self.kv.num_own_blocks, lambda: self.kv.num_free_blocks >= num_blocks, end_s)

    def _may_give(self, victim: Sequence) -> bool:
        return not self.holds(victim) and self.kv.num_owned_blocks(victim.sequence_id) > 0

    def _take(
        self,
        victims: Iterable[Sequence],
        num_to_take: Callable[[int], int],
        is_enough: Callable[[], bool],
        end_s: float,
    ) -> bool:
        """Take the newest blocks of these, one victim after the other, of each as many as `num_to_take` says of its id.

        Returns:
            Whether it is enough.
        """
        for victim in victims:
            while not is_enough() and num_to_take(victim.sequence_id):
                if self.kv.preemption is Preemption.RECOMPUTE:
                    self.preempt(victim)
                else:
                    self._take_last_block(victim, end_s)
        return is_enough()

    def _take_last_block(self, victim: Sequence, end_s: float) -> None:
        num_copied = self.kv.num_tokens_to_save(victim.sequence_id, victim.num_computed_tokens)
        is_saved = False
        if num_copied and self.kv.num_free_host_blocks:
            shape = self.shape
            copied_s = self.latency_model.bound_s(shape.with_copies(num_copied))
            free_of_copies_s = self.latency_model.bound_s(shape.with_copies(-shape.num_copied_tokens))
            is_saved = self.start_s + copied_s <= end_s or copied_s <= _NEGLIGIBLE * free_of_copies_s
        victim.num_computed_tokens = self.kv.take_last_block(
            victim.sequence_id, victim.num_computed_tokens, is_saved=is_saved
        )
        if is_saved:
            self._num_copied_tokens += num_copied
        victim.note_lost_memory()
        self.victims[victim.sequence_id] = victim.request_class

    def restore(self, sequence: Sequence, num_tokens: int) -> None:
        """Give a sequence that was preempted in part the blocks of all it knows, and copy back `num_tokens` tokens."""
        self._attached = None
        num_known_tokens = sequence.num_computed_tokens + sequence.num_pending_tokens
        self.kv.grow(sequence.sequence_id, sequence.request_class, num_known_tokens)
        restored = self.kv.restore(
            sequence.sequence_id, sequence.num_computed_tokens, sequence.num_computed_tokens + num_tokens
        )
        num_copied = restored - sequence.num_computed_tokens
        sequence.num_computed_tokens = restored
        self._num_copied_tokens += num_copied

    def checkpoint(self, sequence: Sequence, index: int) -> None:
        """Copy a full block of the sequence to the host ahead of time."""
        self.kv.checkpoint(sequence.sequence_id, index)
        self._num_copied_tokens += self.kv.block_size
