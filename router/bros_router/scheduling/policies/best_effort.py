"""Best-effort work of the BROS policy: what goes into the time and the memory that real-time sequences leave."""

from __future__ import annotations

import itertools
import math
from typing import Final

from bros_router.scheduling.policies.chunking import Chunking, num_worth_restoring
from bros_router.scheduling.policies.floor import Floor
from bros_router.scheduling.policies.ordered import by_arrival
from bros_router.scheduling.policies.standing import Standing
from bros_router.scheduling.policies.turnover import Turnover
from bros_router.scheduling.queues import WaitingQueue
from bros_router.scheduling.sequence import Sequence
from bros_router.scheduling.step_draft import StepDraft
from bros_shard.block_layout import num_blocks_for
from bros_shard.protocol import StepShape

#: Tokens of the forced chunk for a sequence that has starved, and how often it may run, in steps.
_TRICKLE_TOKENS: Final = 64
_TRICKLE_PERIOD: Final = 8
#: Background checkpoints begin when this share of the blocks is used, so many a step at most.
_CHECKPOINT_SHARE: Final = 0.8
_MOST_CHECKPOINTS: Final = 4


class BestEffort:
    """Fills a step that holds its real-time work already: `decode`, then `prefill`, then `checkpoint`.

    Best-effort sequences take memory only from younger ones of their kind.
    """

    def __init__(self, chunking: Chunking, floor: Floor) -> None:
        #: Those that wait, the oldest first; the policy adds to it, and removes what ends.
        self.waiting = WaitingQueue(by_arrival)
        self._chunking = chunking
        self._floor = floor
        self._turnover = Turnover()
        self._num_steps_since_trickle = _TRICKLE_PERIOD

    def finished(self, sequence: Sequence) -> None:
        """A best-effort sequence got its last token."""
        self._turnover.note(sequence)

    def useful_s(self, draft: StepDraft) -> float:
        """How long a step may last to make the most of best-effort memory; infinity where that is not known yet."""
        shape = self._turnover.added_to(draft)
        return math.inf if shape is None else draft.latency_model.predict_s(shape)

    # --- decodes

    def decode(self, draft: StepDraft, standing: Standing, end_s: float) -> bool:
        """A token for as many sequences as the step has time for, those that starve first, then the oldest.

        Returns:
            Whether that was all of them.
        """
        self._num_steps_since_trickle += 1
        ready = [sequence for sequence in standing.be_decoding if sequence.sequence_id not in draft.victims]
        if not ready:
            return True
        ready.sort(key=lambda sequence: not self._floor.is_starving(sequence, draft.now_s))
        most = max(0, min(len(ready), draft.num_sequences_left, draft.num_tokens_left))
        num_fitting = _num_fitting_decodes(draft, ready[:most], end_s)
        if num_fitting == 0 and most and (not draft.chunks or self._floor.is_owed(ready[0], draft.now_s)):
            num_fitting = 1
        for sequence in ready[:num_fitting]:
            if sequence.sequence_id in draft.victims:
                continue  # it gave way to one of those before it
            if _give_room(draft, standing, sequence, 1):
                draft.add(sequence, 1)
        return num_fitting == len(ready)

    # --- prompts

    def prefill(self, draft: StepDraft, standing: Standing, end_s: float) -> None:
        """Prompts, and what was preempted, oldest first; then new ones, if all that were let in could go on."""
        oldest = standing.be_behind[0] if standing.be_behind else self.waiting.peek()
        # Only the first one may be forced.
        is_trickle = (
            oldest is not None
            and self._num_steps_since_trickle >= _TRICKLE_PERIOD
            and self._floor.is_owed(oldest, draft.now_s)
        )
        for sequence in standing.be_behind:
            if not self._continue(draft, standing, sequence, end_s, is_trickle):
                return
            is_trickle = False
        while (new := self.waiting.peek()) is not None:
            if not self._admit(draft, new, end_s, is_trickle):
                return
            is_trickle = False

    def _continue(
        self, draft: StepDraft, standing: Standing, sequence: Sequence, end_s: float, is_trickle: bool
    ) -> bool:
        """Go on with a prompt, or bring back what was taken. Returns whether there may be time and room for more."""
        if sequence.sequence_id in draft.victims or draft.num_sequences_left <= 0 or draft.num_tokens_left <= 0:
            return False
        draft.attach_cached(sequence)
        if draft.chunks and not _leaves_reserve(draft, sequence):
            return False
        if not _give_room(draft, standing, sequence, sequence.num_pending_tokens):
            return False
        num_restored_tokens = num_worth_restoring(draft, sequence, end_s)
        if num_restored_tokens:
            draft.restore(sequence, num_restored_tokens)
        num_tokens = self._chunk(draft, sequence, end_s, is_trickle)
        if num_tokens == 0:
            return False
        draft.add(sequence, num_tokens, sequence.num_pending_tokens)
        return True

    def _admit(self, draft: StepDraft, sequence: Sequence, end_s: float, is_trickle: bool) -> bool:
        """Let in the first of those that wait. Returns whether there may be time and room for more."""
        if not draft.may_run(sequence) or draft.num_sequences_left <= 0:
            return False
        draft.attach_cached(sequence)
        num_pending_tokens = sequence.num_pending_tokens
        if draft.shortfall(sequence, num_pending_tokens) or not _leaves_reserve(draft, sequence):
            return False
        num_tokens = self._chunk(draft, sequence, end_s, is_trickle)
        if num_tokens == 0:
            return False
        self.waiting.pop()
        draft.add(sequence, num_tokens, num_pending_tokens)
        return True

    def _chunk(self, draft: StepDraft, sequence: Sequence, end_s: float, is_trickle: bool) -> int:
        """How many pending tokens of a prompt the step computes."""
        num_tokens = self._chunking.largest(draft, sequence, end_s)
        if num_tokens:
            return num_tokens
        if is_trickle:
            self._num_steps_since_trickle = 0
            return min(_TRICKLE_TOKENS, sequence.num_pending_tokens, draft.num_tokens_left)
        # Never an empty step while there is work.
        return 0 if draft.chunks else self._chunking.smallest(draft, sequence)

    # --- memory

    def checkpoint(self, draft: StepDraft, standing: Standing, end_s: float) -> None:
        """While memory is short, copy the full blocks that would be taken next to the host."""
        kv = draft.kv
        if (
            not draft.chunks
            or not kv.has_unused_host_block
            or kv.num_free_blocks > (1.0 - _CHECKPOINT_SHARE) * kv.num_blocks
        ):
            return
        num_left = _MOST_CHECKPOINTS
        for sequence in standing.be_victims():
            while (index := kv.newest_unsaved_block(sequence.sequence_id, sequence.num_computed_tokens)) is not None:
                with_copy_s = draft.latency_model.bound_s(draft.shape.with_copies(kv.block_size))
                if num_left == 0 or not kv.has_unused_host_block or draft.start_s + with_copy_s > end_s:
                    return
                draft.checkpoint(sequence, index)
                num_left -= 1


def _num_fitting_decodes(draft: StepDraft, ready: list[Sequence], end_s: float) -> int:
    """How many of these can decode in a step that ends by `end_s`: bisection, since time grows with each."""
    shape = draft.shape
    contexts = [0, *itertools.accumulate(sequence.num_computed_tokens + 1 for sequence in ready)]

    def fits(count: int) -> bool:
        with_decodes = StepShape(
            shape.num_prefill_tokens,
            shape.num_prefill_sequences,
            shape.num_decode_sequences + count,
            shape.prefill_attention,
            shape.decode_context_tokens + contexts[count],
            shape.num_copied_tokens,
        )
        return draft.start_s + draft.latency_model.bound_s(with_decodes) <= end_s

    if fits(len(ready)):
        return len(ready)
    low, high = 0, len(ready)  # low fits, or is none at all; high does not
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low


def _give_room(draft: StepDraft, standing: Standing, sequence: Sequence, num_tokens: int) -> bool:
    """See to memory for a sequence that runs, at the cost of younger ones."""
    return draft.shortfall(sequence, num_tokens) == 0 or draft.make_room(
        sequence, num_tokens, standing.be_younger_than(sequence)
    )


def _leaves_reserve(draft: StepDraft, sequence: Sequence) -> bool:
    """Whether one that is let in, or comes back, leaves room for a burst, and for those that run to grow into."""
    kv = draft.kv
    num_known_tokens = sequence.num_computed_tokens + sequence.num_pending_tokens
    num_blocks = num_blocks_for(num_known_tokens, kv.block_size) - kv.num_owned_blocks(sequence.sequence_id)
    return not draft.running or num_blocks <= 0 or kv.num_free_blocks - num_blocks >= kv.num_reserved_blocks
