"""The BROS policy: real-time sequences inside their targets, best-effort work in all the time that is left.

After BROS (arXiv 2504.09590), with chunked prefill, pacing and relegation from later work; `docs/scheduling.md`
tells how a step is decided, with an example.
"""

from __future__ import annotations

import itertools
import math
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final

from bros_router.request import RequestClass
from bros_router.scheduling.attainment import ATTAINMENT_GOAL, RecentAttainment
from bros_router.scheduling.batch_cap import BatchCap, CapControl
from bros_router.scheduling.deadlines import first_token_deadline_s, met_targets, paced_deadline_s, strict_deadline_s
from bros_router.scheduling.latency_model import LatencyModel
from bros_router.scheduling.policies.best_effort import BestEffort
from bros_router.scheduling.policies.chunking import Chunking, num_worth_restoring
from bros_router.scheduling.policies.floor import Floor
from bros_router.scheduling.policies.ordered import by_arrival
from bros_router.scheduling.policies.standing import Standing
from bros_router.scheduling.policies.step_end import GUARD, StepEnd
from bros_router.scheduling.queues import WaitingQueue
from bros_router.scheduling.real_time_queue import RealTimeQueue, due_s
from bros_router.scheduling.sequence import Sequence, SequenceState
from bros_router.scheduling.step_draft import SchedulerLimits, StepDraft
from bros_router.scheduling.step_limit import StepLimit
from bros_shard.protocol import StepShape

#: What every step costs is the time of this one.
_SHORTEST_STEP: Final = StepShape(num_decode_sequences=1, decode_context_tokens=1)
#: A prompt may wait for the end of the running step if so much of the time to its deadline would be left besides: the
#: step may be slower than predicted, the next one holds others, and an interruption costs what every step does.
_WAITING_GUARD: Final = 0.7
#: Steps without a chunk after which a small one of a real-time prompt is computed whatever the decodes say.
_MOST_STARVED_STEPS: Final = 4
#: Best-effort work may make a step of real-time decodes this many times as long, however little memory it has: with
#: less time, prompts would crumble.
_MEMORY_STRETCH: Final = 1.15
#: And this many times as long, whatever the limit of a step is, while targets are met: the less, the fewer are, and no
#: longer at this share.
_LIMIT_STRETCH: Final = 1.5
_LEAST_ATTAINMENT: Final = 0.97
#: A real-time prompt keeps steps short as long as its slack is more than so many times what it needs alone.
_PATIENT_SLACK: Final = 2.0
#: Share of KV blocks kept free of new best-effort sequences while there is real-time work, for bursts and for what runs
#: to grow into (Echo's idea; the share is ours).
_RESERVED_SHARE: Final = 0.05


@dataclass(frozen=True, kw_only=True, slots=True)
class BrosOptions:
    """What can be switched off, to see what it brings."""

    #: A lead earned by early tokens may be spent on later ones; else every gap counts.
    paces: bool = True
    #: Prompts are computed in pieces.
    chunks: bool = True
    #: A real-time sequence that cannot meet its targets any more stops holding up those that can.
    relegates: bool = True
    #: Best-effort work runs beside real-time work; else only while there is none.
    fills: bool = True
    #: A step with work in it that can wait stays short, for the real-time request that may come while it runs.
    keeps_steps_short: bool = True
    #: A real-time prompt that cannot wait for the end of a step is run in the middle of it, where the ranks can do so.
    interrupts: bool = True
    #: Best-effort work lengthens the steps of real-time sequences only as far as it has the memory to use that.
    gives_time_for_memory: bool = True
    cap_control: CapControl = CapControl.OFF
    #: Full best-effort blocks are copied to the host ahead of time.
    checkpoints: bool = False
    #: Longest time a best-effort sequence goes without a token before it gets one, in seconds.
    be_max_wait_s: float = 30.0
    #: It gets one even while real-time sequences miss their targets.
    is_floor_hard: bool = False


#: The policy as the BROS paper has it, as far as it says.
PAPER_OPTIONS: Final = BrosOptions(
    paces=False,
    chunks=False,
    relegates=False,
    keeps_steps_short=False,
    interrupts=False,
    gives_time_for_memory=False,
    cap_control=CapControl.RESET,
    be_max_wait_s=math.inf,
)


class BrosPolicy:
    """One instance schedules one engine."""

    def __init__(self, latency_model: LatencyModel, limits: SchedulerLimits, options: BrosOptions) -> None:
        self.cap = BatchCap(options.cap_control, limits.max_num_sequences)
        self._model = latency_model
        self._options = options
        self._rt_waiting = RealTimeQueue(latency_model, limits.max_batch_tokens)
        self._late_waiting = WaitingQueue(by_arrival)
        self._chunking = Chunking(options.chunks)
        self._attainment = RecentAttainment()
        self.can_interrupt = options.interrupts and limits.can_interrupt
        self._step_limit = StepLimit(can_interrupt=self.can_interrupt)
        self._num_starved_steps = 0
        floor = Floor(self._attainment, options.be_max_wait_s, is_hard=options.is_floor_hard)
        self._best_effort = BestEffort(self._chunking, floor)
        self._queues: tuple[RealTimeQueue | WaitingQueue, ...] = (
            self._rt_waiting,
            self._late_waiting,
            self._best_effort.waiting,
        )

    # --- those that wait

    @property
    def num_waiting(self) -> int:
        """Sequences that wait."""
        return sum(map(len, self._queues))

    def waiting(self) -> Iterator[Sequence]:
        """Those that wait, in no order."""
        return itertools.chain.from_iterable(self._queues)

    def add(self, sequence: Sequence) -> None:
        """The sequence waits from now on."""
        queue = self._queue_of(sequence)
        if queue is self._rt_waiting and sequence.first_scheduled_s is None:
            assert sequence.targets is not None
            slack_s = sequence.targets.ttft_s - self._rt_waiting.left_s(sequence)
            self._step_limit.note_arrival(sequence.arrival_s, slack_s, sequence.targets.tpot_s)
        queue.push(sequence)

    def remove(self, sequence: Sequence) -> None:
        """A sequence that waits has ended."""
        self._queue_of(sequence).remove(sequence)

    def _queue_of(self, sequence: Sequence) -> RealTimeQueue | WaitingQueue:
        if sequence.request_class is RequestClass.BE:
            return self._best_effort.waiting
        return self._late_waiting if sequence.is_late else self._rt_waiting

    def finished(self, sequence: Sequence) -> None:
        """A sequence got its last token."""
        if sequence.targets is None:
            self._best_effort.finished(sequence)
        elif not sequence.is_late:
            assert sequence.last_token_s is not None
            is_ttft_met, is_tpot_met = met_targets(sequence)
            assert sequence.first_token_s is not None
            self._step_limit.note_first_token(sequence.first_token_s - first_token_deadline_s(sequence))
            self._attainment.note(sequence.last_token_s, is_ttft_met and is_tpot_met)
            if not (is_ttft_met and is_tpot_met):
                self.cap.note_miss()

    # --- a step

    def compose(self, draft: StepDraft) -> None:
        """Fill the step: real-time decodes, real-time prompts, late ones, best-effort decodes and prompts."""
        step_limit_s = self._step_limit.seconds(draft.now_s, self._model.predict_s(_SHORTEST_STEP))
        has_real_time = step_limit_s < math.inf
        draft.kv.num_reserved_blocks = int(draft.kv.num_blocks * _RESERVED_SHARE) if has_real_time else 0
        draft.max_num_sequences = self.cap.value
        standing = Standing.of(draft.running)
        step_end = StepEnd(self._decode_real_time(draft, standing))
        is_too_long = draft.end_s > step_end.for_all_s
        decodes_s = self._model.predict_s(draft.shape)
        limit_s = math.inf
        if self._options.keeps_steps_short:
            # Where the decodes alone take about as long as the limit, it would leave nothing for other work and hardly
            # shorten the wait. But where that costs targets, they go first.
            is_met = (self._attainment.share(draft.now_s) - _LEAST_ATTAINMENT) / (ATTAINMENT_GOAL - _LEAST_ATTAINMENT)
            stretch = 1.0 + (_LIMIT_STRETCH - 1.0) * min(1.0, max(0.0, is_met))
            limit_s = max(step_limit_s, stretch * decodes_s)
        soft_end_s = self._soft_end_s(draft, limit_s)
        self._prefill_real_time(draft, standing, step_end, soft_end_s)
        self._run_late(draft, standing, min(step_end.for_all_s, soft_end_s))
        if self.can_interrupt and draft.kv.num_free_blocks < draft.kv.num_reserved_blocks:
            # An interruption can take nothing from anybody.
            draft.keep_free(draft.kv.num_reserved_blocks, standing.be_victims(), step_end.for_best_effort_s)
        draft.latest_end_s = step_end.for_all_s
        is_bound = False
        if self._options.fills or not (draft.chunks or self._rt_waiting):
            if self._options.gives_time_for_memory and standing.decoding:
                limit_s = min(limit_s, max(self._best_effort.useful_s(draft), _MEMORY_STRETCH * decodes_s))
            end_s = min(step_end.for_best_effort_s, self._soft_end_s(draft, limit_s))
            is_bound = not self._best_effort.decode(draft, standing, end_s)
            if not is_bound:
                self._best_effort.prefill(draft, standing, end_s)
            if self._options.checkpoints:
                self._best_effort.checkpoint(draft, standing, end_s)
        self.cap.note_step(is_bound=is_bound, is_too_long=is_too_long)

    def interrupt(self, draft: StepDraft, next_s: float, latest_end_s: float) -> None:
        """The real-time prompts that cannot wait for the next step, whole, as long as all of them are in time."""
        end_s = latest_end_s
        while (sequence := self._next_prompt(draft, deque(), takes_new=True)) is not None:
            spare_s = _WAITING_GUARD * (due_s(sequence) - draft.now_s)
            if sequence.is_on_ranks or self._rt_waiting.latest_start_s(sequence) - spare_s >= next_s:
                return
            if len(draft.running) >= self.cap.value:
                return  # the next step would have no place for it
            draft.attach_cached(sequence)
            num_tokens = sequence.num_pending_tokens
            # One that is only late if the step is slow is worth a try.
            hopes_s = draft.now_s + self._rt_waiting.left_s(sequence)
            end_s = min(end_s, max(due_s(sequence), hopes_s))
            if draft.largest_chunk(sequence, end_s) < num_tokens or draft.shortfall(sequence, num_tokens):
                return
            self._rt_waiting.remove(sequence)
            draft.add(sequence, num_tokens)

    def _soft_end_s(self, draft: StepDraft, limit_s: float) -> float:
        """When a step of `limit_s` ends, were it as slow as the margin allows for: a limit is no deadline, it is meant
        for the usual step."""
        return draft.start_s + limit_s * self._model.margin

    # --- real-time

    def _decode_real_time(self, draft: StepDraft, standing: Standing) -> float:
        """A token for every real-time sequence that decodes. Returns when the step must have ended for their sake."""
        deadline_of = paced_deadline_s if self._options.paces else strict_deadline_s
        start_s = draft.start_s
        first_deadline_s = math.inf
        decoding = standing.decoding
        most = min(draft.limits.max_num_sequences, draft.limits.max_batch_tokens)
        if len(decoding) > most:
            decoding = sorted(decoding, key=lambda sequence: deadline_of(sequence, start_s))[:most]
        for sequence in decoding:
            if sequence.sequence_id in draft.victims or not self._give_room(draft, standing, sequence, 1):
                continue
            draft.add(sequence, 1)
            first_deadline_s = min(first_deadline_s, deadline_of(sequence, start_s))
        return start_s + (first_deadline_s - start_s) * (1.0 - GUARD)

    def _give_room(
        self, draft: StepDraft, standing: Standing, sequence: Sequence, num_tokens: int, end_s: float = math.inf
    ) -> bool:
        """See to memory for a real-time sequence, at the cost of best-effort and late ones.

        As a last resort its own kind pays, those that can wait longer, if it was let in and decodes, or nothing else
        runs.
        """
        if draft.shortfall(sequence, num_tokens) == 0:
            return True
        victims = standing.victims_of(sequence)
        if draft.make_room(sequence, num_tokens, victims, end_s):
            return True
        if sequence.state is SequenceState.WAITING or (draft.chunks and not sequence.is_decoding):
            return False
        # Those that are behind already first: then few wait with memory that helps nobody.
        kind = [
            other
            for other in draft.running
            if other.request_class is RequestClass.RT and other.is_late == sequence.is_late and not draft.holds(other)
        ]
        kind.sort(key=lambda other: (not other.is_decoding, due_s(other)), reverse=True)
        can_wait_longer = itertools.takewhile(lambda other: other is not sequence, kind)
        return draft.make_room(sequence, num_tokens, [*victims, *can_wait_longer], end_s)

    def _restore(self, draft: StepDraft, standing: Standing, sequence: Sequence, end_s: float) -> None:
        """Copy back what a real-time sequence lost to another, if there is room and it is not faster computed anew."""
        if not draft.kv.num_restorable_tokens(sequence.sequence_id, sequence.num_computed_tokens):
            return
        if self._give_room(draft, standing, sequence, sequence.num_pending_tokens, end_s):
            num_tokens = num_worth_restoring(draft, sequence, end_s)
            if num_tokens:
                draft.restore(sequence, num_tokens)

    def _prefill_real_time(self, draft: StepDraft, standing: Standing, step_end: StepEnd, soft_end_s: float) -> None:
        """Chunks of real-time prompts, the most urgent first. Those that have time keep to `soft_end_s`."""
        is_any_left_out = False
        begun = deque(sorted(standing.behind, key=self._rt_waiting.latest_start_s))
        takes_new = True
        while draft.num_tokens_left > 0 and len(draft.chunks) < draft.limits.max_num_sequences:
            sequence = self._next_prompt(draft, begun, takes_new=takes_new)
            if sequence is None:
                break
            is_new = sequence.state is SequenceState.WAITING
            if is_new and draft.num_sequences_left <= 0:
                takes_new = False
                continue
            draft.attach_cached(sequence)
            self._restore(draft, standing, sequence, step_end.for_all_s)
            num_pending_tokens = sequence.num_pending_tokens
            has_time = soft_end_s < step_end.for_all_s and self._is_patient(draft, sequence)
            num_tokens = self._chunking.largest(draft, sequence, soft_end_s if has_time else step_end.for_all_s)
            if num_tokens == 0 and has_time:
                if draft.chunks:
                    break  # those that follow can wait as well
                num_tokens = self._chunking.largest(draft, sequence, step_end.for_all_s)
            if num_tokens == 0 and self._num_starved_steps >= _MOST_STARVED_STEPS:
                num_tokens = self._chunking.smallest(draft, sequence)
            if num_tokens == 0:
                is_any_left_out = True
                step_end.note_prompt(draft, self._rt_waiting.latest_start_s(sequence))
                break
            if not self._give_room(draft, standing, sequence, num_pending_tokens, step_end.for_all_s):
                # It waits for memory, which those that run free the sooner the more they do.
                takes_new = takes_new and not is_new
                continue
            if is_new:
                self._rt_waiting.remove(sequence)
            draft.add(sequence, num_tokens, num_pending_tokens)
            rest = num_pending_tokens - num_tokens
            rest_s = self._rt_waiting.alone_s(rest, sequence.num_computed_tokens + num_tokens)
            step_end.note_prompt(draft, due_s(sequence) - rest_s)
            self._num_starved_steps = 0
        self._num_starved_steps += is_any_left_out

    def _next_prompt(self, draft: StepDraft, begun: deque[Sequence], *, takes_new: bool) -> Sequence | None:
        """The real-time prompt to go on with, by when it must start at the latest: the first of `begun`, which gives it
        up, or of those that wait. Those that are too late are relegated on the way."""
        while begun and begun[0].sequence_id in draft.victims:
            begun.popleft()
        waiting = self._rt_waiting.peek()
        while waiting is not None and self._relegate(draft, waiting):
            waiting = self._rt_waiting.peek()
        if waiting is not None and not (takes_new and draft.may_run(waiting)):
            waiting = None
        latest_start_s = self._rt_waiting.latest_start_s
        if begun and (waiting is None or latest_start_s(begun[0]) <= latest_start_s(waiting)):
            return begun.popleft()
        return waiting

    def _is_patient(self, draft: StepDraft, sequence: Sequence) -> bool:
        """Whether a prompt has much more time than it needs, so that it may wait a little for those to come.
        Where they can interrupt it, it need not."""
        if self.can_interrupt:
            return False
        alone_s = self._rt_waiting.left_s(sequence)
        return due_s(sequence) - alone_s - draft.start_s > _PATIENT_SLACK * alone_s

    def _relegate(self, draft: StepDraft, sequence: Sequence) -> bool:
        """Put a waiting sequence with the late ones if it cannot meet its target even alone. Returns whether it is."""
        assert sequence.targets is not None
        if not self._options.relegates or not sequence.targets.are_given or sequence.first_token_s is not None:
            return False
        late_by_s = draft.start_s - self._rt_waiting.latest_hope_s(sequence)
        if late_by_s <= 0.0:
            return False
        self._rt_waiting.remove(sequence)
        draft.relegate(sequence)
        self._late_waiting.push(sequence)
        self._attainment.note(draft.now_s, False)
        self._step_limit.note_first_token(late_by_s)
        return True

    def _run_late(self, draft: StepDraft, standing: Standing, end_s: float) -> None:
        """Real-time sequences that missed a target: before best-effort work, but they bound nobody."""
        for sequence in standing.late:
            if sequence.sequence_id in draft.victims or draft.num_sequences_left <= 0:
                continue
            draft.attach_cached(sequence)
            self._restore(draft, standing, sequence, end_s)
            num_tokens = self._late_chunk(draft, sequence, end_s)
            if num_tokens and self._give_room(draft, standing, sequence, sequence.num_pending_tokens, end_s):
                draft.add(sequence, num_tokens, sequence.num_pending_tokens)
        while (late := self._late_waiting.peek()) is not None and draft.num_sequences_left > 0:
            if not draft.may_run(late):
                return
            draft.attach_cached(late)
            num_tokens = self._late_chunk(draft, late, end_s)
            if not num_tokens or not self._give_room(draft, standing, late, late.num_pending_tokens, end_s):
                return
            self._late_waiting.remove(late)
            draft.add(late, num_tokens, late.num_pending_tokens)

    def _late_chunk(self, draft: StepDraft, sequence: Sequence, end_s: float) -> int:
        """As much as there is time for, and never nothing where nothing else runs."""
        num_tokens = self._chunking.largest(draft, sequence, end_s)
        return num_tokens if num_tokens or draft.chunks else self._chunking.smallest(draft, sequence)
