"""Text Generation Inference's own batching."""

from __future__ import annotations

from typing import Final

from bros_router.scheduling.policies.ordered import OrderedPolicy, by_arrival
from bros_router.scheduling.step_draft import StepDraft

#: TGI's `--waiting-served-ratio` and `--max-waiting-tokens`, at their defaults.
WAITING_SERVED_RATIO: Final = 0.3
MAX_WAITING_TOKENS: Final = 20


class TextGenerationInference(OrderedPolicy):
    """New sequences join when enough of them wait, or enough decode steps have passed; their prefill pauses decoding.

    A sequence gets the memory of the longest reply it may have when it is let in, so nobody is ever preempted.
    """

    def __init__(self) -> None:
        super().__init__(by_arrival, is_sorted=False)
        self._num_decode_steps = 0

    def compose(self, draft: StepDraft) -> None:
        """A step of prefill alone, or of decoding alone."""
        self._continue_prefill(draft)
        if self._may_prefill(draft):
            self._admit(draft)
        if draft.chunks:
            self._num_decode_steps = 0
            return
        self._num_decode_steps += 1
        for sequence in [*draft.running]:
            if sequence.is_decoding and draft.num_tokens_left > 0:
                draft.add(sequence, 1)

    def _continue_prefill(self, draft: StepDraft) -> None:
        """Prompts longer than the token budget take several steps."""
        for sequence in [*draft.running]:
            num_tokens = min(sequence.num_pending_tokens, draft.num_tokens_left)
            if sequence.num_pending_tokens > 1 and num_tokens > 0:
                draft.add(sequence, num_tokens)

    def _may_prefill(self, draft: StepDraft) -> bool:
        num_running = len(draft.running)
        return (
            bool(draft.chunks)
            or self.num_waiting >= WAITING_SERVED_RATIO * num_running
            or self._num_decode_steps >= MAX_WAITING_TOKENS
        )

    def _admit(self, draft: StepDraft) -> None:
        while draft.num_tokens_left > 0 and (sequence := self._queue.peek()) is not None:
            if len(draft.running) >= draft.limits.max_num_sequences or not sequence.is_ready:
                break
            draft.attach_cached(sequence)
            num_reserved_tokens = sequence.max_total_tokens - 1 - sequence.num_computed_tokens
            if draft.shortfall(sequence, num_reserved_tokens):
                break
            self._queue.pop()
            draft.add(sequence, min(sequence.num_pending_tokens, draft.num_tokens_left), num_reserved_tokens)
