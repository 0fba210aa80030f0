"""How much of a prompt a step computes, and how much of what was preempted it copies back instead."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from bros_router.scheduling.sequence import Sequence
from bros_router.scheduling.step_draft import StepDraft

#: Chunks are multiples of this, so that a prompt does not crumble.
_UNIT: Final = 16


@dataclass(frozen=True, slots=True)
class Chunking:
    """Prompts are computed in pieces, as large as time allows; or whole, but for what no step can hold."""

    is_on: bool

    def largest(self, draft: StepDraft, sequence: Sequence, end_s: float) -> int:
        """How many pending tokens of a prompt fit a step that ends by `end_s`."""
        num_pending_tokens = sequence.num_pending_tokens
        if self.is_on:
            num_tokens = draft.largest_chunk(sequence, end_s)
            is_held_back = num_tokens < min(num_pending_tokens, draft.num_tokens_left)
            return num_tokens - num_tokens % _UNIT if is_held_back else num_tokens
        # Of a prompt that does not fit the token budget beside the decodes, as much as fits. One that no step can hold
        # in time gets a step without anything else.
        limit = min(num_pending_tokens, draft.num_tokens_left)
        if limit < min(num_pending_tokens, draft.limits.max_batch_tokens // 2):
            return 0
        return limit if not draft.chunks or draft.largest_chunk(sequence, end_s) == limit else 0

    def smallest(self, draft: StepDraft, sequence: Sequence) -> int:
        """How many pending tokens of a prompt go into a step where it must advance, however little time there is."""
        num_tokens = min(sequence.num_pending_tokens, draft.num_tokens_left)
        return min(_UNIT, num_tokens) if self.is_on else num_tokens


def num_worth_restoring(draft: StepDraft, sequence: Sequence, end_s: float) -> int:
    """How many tokens to copy back from the host rather than to compute anew."""
    num_tokens = draft.kv.num_restorable_tokens(sequence.sequence_id, sequence.num_computed_tokens)
    shape = draft.shape
    while num_tokens > 0:
        copied_s = draft.latency_model.bound_s(shape.with_copies(num_tokens))
        computed_s = draft.latency_model.bound_s(shape.with_sequence(sequence.num_computed_tokens, num_tokens))
        if copied_s > computed_s:
            return 0
        if draft.start_s + copied_s <= end_s or not draft.chunks:
            return num_tokens
        num_tokens = num_tokens // 2 // draft.kv.block_size * draft.kv.block_size
    return 0
