"""The work that keeps the memory of best-effort sequences in use."""

from __future__ import annotations

from collections import deque
from typing import Final

from bros_router.request import RequestClass
from bros_router.scheduling.sequence import Sequence
from bros_router.scheduling.step_draft import StepDraft
from bros_shard.protocol import StepShape

#: Latest best-effort sequences that count.
_NUM_RECENT: Final = 64


class Turnover:
    """What best-effort sequences compute in a step if their memory is always full and never waits.

    As many of them as fit the memory that real-time sequences leave decode a token each; meanwhile some end, and new
    ones take their place: for each token that comes out, a sequence with a prompt of p and an output of o tokens has
    brought p / o prompt tokens. With less time than that, memory lies idle or best-effort sequences hold it for long;
    with more, real-time sequences stay longer, hold more memory, and best-effort ones get less done, not more.

    Of that work they get the share of the region that real-time sequences leave: near its end, what best-effort work
    adds to a step fills the rest. Measured, see `docs/scheduling.md`.
    """

    def __init__(self) -> None:
        self._recent: deque[tuple[int, int]] = deque(maxlen=_NUM_RECENT)
        #: Means of these.
        self._num_prompt_tokens = self._num_output_tokens = 0.0

    def note(self, sequence: Sequence) -> None:
        """A best-effort sequence got its last token."""
        self._recent.append((sequence.num_prompt_tokens - sequence.num_reused_tokens, len(sequence.output_token_ids)))
        self._num_prompt_tokens = sum(prompt for prompt, _ in self._recent) / len(self._recent)
        self._num_output_tokens = sum(output for _, output in self._recent) / len(self._recent)

    def added_to(self, draft: StepDraft) -> StepShape | None:
        """The step with that work in it; `None` before any best-effort sequence has ended."""
        if not self._recent:
            return None
        num_prompt_tokens, num_output_tokens = self._num_prompt_tokens, self._num_output_tokens
        kv = draft.kv
        num_blocks = max(0, kv.num_blocks - kv.num_used_blocks(RequestClass.RT) - kv.num_reserved_blocks)
        # A sequence holds its prompt all the time, and half of its output on average.
        context = num_prompt_tokens + num_output_tokens / 2
        num_decodes = num_blocks / kv.num_blocks * num_blocks * kv.block_size / context
        num_prefill_tokens = num_decodes * num_prompt_tokens / num_output_tokens
        shape = draft.shape
        return StepShape(
            shape.num_prefill_tokens + int(num_prefill_tokens),
            shape.num_prefill_sequences + 1,
            shape.num_decode_sequences + int(num_decodes),
            shape.prefill_attention + num_prefill_tokens * num_prompt_tokens / 2,
            shape.decode_context_tokens + int(num_decodes * context),
            shape.num_copied_tokens,
        )
