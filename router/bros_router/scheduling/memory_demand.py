"""Whether the KV region has room for one more real-time request, and if not, how soon it will."""

from __future__ import annotations

from typing import Final

#: Replies that the mean output length is about.
_NUM_REMEMBERED: Final = 100


class MemoryDemand:
    """What real-time sequences that are in time are going to need of a region; the others make room for them.

    A request is taken to need its prompt and an output of mean length: some sequences end while others grow, so to keep
    the longest output free for each would refuse many that find room (Past-Future, ASPLOS 2025, asks for a high
    percentile; `docs/scheduling.md` has what we measured).
    """

    def __init__(self, num_kv_tokens: int) -> None:
        """`num_kv_tokens`: what the region holds."""
        self._num_kv_tokens = num_kv_tokens
        self._mean_output_tokens = 0.0
        self._num_replies = 0

    def note_output(self, num_tokens: int) -> None:
        """A real-time request ended with so many tokens."""
        self._num_replies = min(self._num_replies + 1, _NUM_REMEMBERED)
        self._mean_output_tokens += (num_tokens - self._mean_output_tokens) / self._num_replies

    def wait_s(
        self, num_prompt_tokens: int, max_new_tokens: int, tpot_s: float, *, num_held_tokens: int, num_due_tokens: int
    ) -> float:
        """Predicted seconds until there is room for a request; 0 where there is.

        What is held is given back within an output of mean length, each of whose tokens takes a TPOT at most.

        Args:
            tpot_s: the target of the request; others may have others.
            num_held_tokens: room that sequences have which are not to lose it.
            num_due_tokens: those of prompts that are to get memory before it.
        """
        num_left_tokens = self._num_kv_tokens - num_held_tokens - num_due_tokens
        num_missing_tokens = num_prompt_tokens + min(max_new_tokens, self._mean_output_tokens) - num_left_tokens
        if num_missing_tokens <= 0:
            return 0.0
        return num_missing_tokens / max(num_held_tokens, num_missing_tokens) * self._mean_output_tokens * tpot_s
