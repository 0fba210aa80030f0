"""The baselines that are an order: who goes first, and who gives way when memory runs out."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Final

from bros_router.request import RequestClass
from bros_router.scheduling.queues import SortKey, WaitingQueue
from bros_router.scheduling.sequence import Sequence
from bros_router.scheduling.step_draft import StepDraft


class OrderedPolicy:
    """Continuous batching with chunked prefill under a token budget, in a fixed order.

    Running sequences first, then those that wait, strictly in order: the first that does not fit holds up those
    behind it, or it might never fit. When blocks run out, the last in order among the running loses all of its KV
    and waits again. A step that preempts admits nobody.
    """

    can_interrupt = False

    def __init__(self, key: SortKey, *, is_sorted: bool = True) -> None:
        """`is_sorted`: running sequences go in the order of `key` as well, not in that of their admission."""
        self._key = key
        self._is_sorted = is_sorted
        self._queue = WaitingQueue(key)

    @property
    def num_waiting(self) -> int:
        """Sequences that wait."""
        return len(self._queue)

    def waiting(self) -> Iterator[Sequence]:
        """Those that wait, in no order."""
        return iter(self._queue)

    def add(self, sequence: Sequence) -> None:
        """The sequence waits from now on."""
        self._queue.push(sequence)

    def remove(self, sequence: Sequence) -> None:
        """A sequence that waits has ended."""
        self._queue.remove(sequence)

    def finished(self, sequence: Sequence) -> None:
        """Nothing to learn from it."""

    def compose(self, draft: StepDraft) -> None:
        """Fill the step."""
        if self._continue(draft):
            self._admit(draft)

    def interrupt(self, draft: StepDraft, next_s: float, latest_end_s: float) -> None:
        """Nothing is so urgent."""

    def _order(self, running: Iterable[Sequence]) -> list[Sequence]:
        return sorted(running, key=self._key) if self._is_sorted else list(running)

    def _continue(self, draft: StepDraft) -> bool:
        """The running sequences, as far as the token budget goes. Returns whether memory sufficed for all."""
        suffices = True
        for sequence in self._order(draft.running):
            num_tokens = min(sequence.num_pending_tokens, draft.num_tokens_left)
            if num_tokens == 0 or sequence.sequence_id in draft.victims:
                continue
            while draft.shortfall(sequence, num_tokens) and sequence.sequence_id not in draft.victims:
                draft.preempt(self._victim(draft))
                suffices = False
            if sequence.sequence_id not in draft.victims:  # else it gave way itself
                draft.add(sequence, num_tokens)
        return suffices

    def _victim(self, draft: StepDraft) -> Sequence:
        return max((sequence for sequence in draft.running if not draft.holds(sequence)), key=self._key)

    def _admit(self, draft: StepDraft) -> None:
        while draft.num_tokens_left > 0 and (sequence := self._queue.peek()) is not None:
            if not draft.may_run(sequence) or not self._may_join(sequence, draft):
                break
            draft.attach_cached(sequence)
            if draft.shortfall(sequence, sequence.num_pending_tokens):
                break
            self._queue.pop()
            num_tokens = min(sequence.num_pending_tokens, draft.num_tokens_left)
            draft.add(sequence, num_tokens, sequence.num_pending_tokens)

    def _may_join(self, sequence: Sequence, draft: StepDraft) -> bool:
        """Whether one more sequence may run. In these policies, all that run are in every step."""
        return len(draft.running) < draft.limits.max_num_sequences


def by_arrival(sequence: Sequence) -> tuple[float, ...]:
    """Arrival; the sequence id breaks ties. A preempted sequence keeps its arrival."""
    return sequence.arrival_s, sequence.sequence_id


def by_class(sequence: Sequence) -> tuple[float, ...]:
    """Real-time before best-effort, then arrival."""
    return sequence.request_class is RequestClass.BE, sequence.arrival_s, sequence.sequence_id


#: By when a best-effort sequence is to be done, in seconds from its arrival: its deadline under `edf`.
BE_HORIZON_S: Final = 300.0


def by_deadline(sequence: Sequence) -> tuple[float, ...]:
    """The time by which the first token is due; a best-effort sequence has a far one."""
    horizon_s = BE_HORIZON_S if sequence.targets is None else sequence.targets.ttft_s
    return sequence.arrival_s + horizon_s, sequence.sequence_id


class FirstComeFirstServed(OrderedPolicy):
    """vLLM's default: in order of arrival, whatever the class; the last to arrive gives way."""

    def __init__(self) -> None:
        super().__init__(by_arrival, is_sorted=False)


class EarliestDeadlineFirst(OrderedPolicy):
    """In the order of deadlines, without looking at what a step costs."""

    def __init__(self) -> None:
        super().__init__(by_deadline)


class StrictPriority(OrderedPolicy):
    """Real-time before best-effort, always; a best-effort sequence is preempted when memory runs out.

    With `preempts_when_full` also when a real-time one waits and the step has no place left.
    """

    def __init__(self, *, preempts_when_full: bool = False) -> None:
        super().__init__(by_class)
        self._preempts_when_full = preempts_when_full

    def compose(self, draft: StepDraft) -> None:
        """Fill the step."""
        self._make_room(draft)
        super().compose(draft)

    def _make_room(self, draft: StepDraft) -> None:
        """Preempt the last best-effort sequences for the real-time one that waits first."""
        first = self._queue.peek()
        if first is None or first.request_class is RequestClass.BE or not first.is_ready:
            return
        draft.attach_cached(first)
        victims = [sequence for sequence in draft.running if sequence.request_class is RequestClass.BE]
        for victim in sorted(victims, key=by_class, reverse=True):
            is_full = self._preempts_when_full and len(draft.running) >= draft.limits.max_num_sequences
            if not is_full and not draft.shortfall(first, first.num_pending_tokens):
                return
            draft.preempt(victim)


class StaticLimit(StrictPriority):
    """Strict priority with a fixed number of best-effort sequences beside it: what operators do by hand."""

    def __init__(self, max_num_be_sequences: int) -> None:
        super().__init__()
        self._max_num_be_sequences = max_num_be_sequences

    def _may_join(self, sequence: Sequence, draft: StepDraft) -> bool:
        if sequence.request_class is RequestClass.BE:
            num_running = sum(other.request_class is RequestClass.BE for other in draft.running)
            if num_running >= self._max_num_be_sequences:
                return False
        return super()._may_join(sequence, draft)
