"""The real-time sequences that wait for their first step, the most urgent first."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final

from bros_router.scheduling.deadlines import first_token_deadline_s, paced_deadline_s
from bros_router.scheduling.latency_model import LatencyModel
from bros_router.scheduling.queues import WaitingQueue
from bros_router.scheduling.sequence import Sequence

#: What a token of a prompt costs in the order of waiting, in seconds: while there is no backlog, and while the queue
#: holds more work than fits a target (QoServe's values).
_ALPHA_S: Final = 0.001
_BACKLOG_ALPHA_S: Final = 0.008


def due_s(sequence: Sequence) -> float:
    """When the next token is due: the first one, or for a sequence that was preempted, the next."""
    if sequence.last_token_s is None:
        return first_token_deadline_s(sequence)
    return paced_deadline_s(sequence, sequence.last_token_s)


class RealTimeQueue:
    """Ordered by latest start: the deadline, less the time that what is left of the prompt needs alone.

    That does not change while a sequence waits, so both orders are heaps and nothing is sorted again.
    """

    def __init__(self, latency_model: LatencyModel, max_batch_tokens: int) -> None:
        self._model = latency_model
        self._max_batch_tokens = max_batch_tokens
        self._queue = WaitingQueue(lambda sequence: self._key(sequence, _ALPHA_S))
        self._backlog_queue = WaitingQueue(lambda sequence: self._key(sequence, _BACKLOG_ALPHA_S))
        self._work_s = 0.0
        self._latest_ttft_s = 0.0

    def __len__(self) -> int:
        return len(self._queue)

    def __iter__(self) -> Iterator[Sequence]:
        """Every waiting sequence, in no order."""
        return iter(self._queue)

    def push(self, sequence: Sequence) -> None:
        """Add a sequence that is not in the queue."""
        assert sequence.targets is not None
        self._latest_ttft_s = sequence.targets.ttft_s
        self._work_s += self.left_s(sequence)
        self._queue.push(sequence)
        self._backlog_queue.push(sequence)

    def remove(self, sequence: Sequence) -> None:
        """Take a sequence that may stand anywhere in the queue."""
        self._queue.remove(sequence)
        self._backlog_queue.remove(sequence)
        # The model may have changed in between: an empty queue holds no work, whatever the sums say.
        self._work_s = max(0.0, self._work_s - self.left_s(sequence)) if len(self._queue) else 0.0

    def peek(self) -> Sequence | None:
        """The most urgent sequence, which stays in the queue. While there is a backlog, long prompts count for less."""
        is_backlogged = self._work_s > self._latest_ttft_s
        return (self._backlog_queue if is_backlogged else self._queue).peek()

    def latest_start_s(self, sequence: Sequence) -> float:
        """The last moment at which what is left of a prompt still meets its target, alone."""
        return due_s(sequence) - self.left_s(sequence)

    def latest_hope_s(self, sequence: Sequence) -> float:
        """The same if everything takes as long as predicted, and no longer."""
        return due_s(sequence) - self.left_s(sequence) / self._model.margin

    def left_s(self, sequence: Sequence) -> float:
        """Seconds that the pending tokens of a sequence need alone, but for those that the KV region holds."""
        start = max(sequence.num_computed_tokens, sequence.num_cached_tokens)
        return self.alone_s(sequence.num_computed_tokens + sequence.num_pending_tokens - start, start)

    def alone_s(self, num_tokens: int, num_computed_tokens: int = 0) -> float:
        """Seconds that the next tokens of a prompt need with nothing else to do, by the model's bound."""
        return self._model.margin * self._model.prefill_s(num_tokens, num_computed_tokens, self._max_batch_tokens)

    def _key(self, sequence: Sequence, alpha_s: float) -> tuple[float, ...]:
        return self.latest_start_s(sequence) + alpha_s * sequence.num_pending_tokens, sequence.sequence_id
