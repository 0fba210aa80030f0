"""The BROS policy: real-time sequences inside their targets, best-effort work in all the time that is left.

After BROS (arXiv 2504.09590), with chunked prefill, pacing and relegation from later work; `docs/scheduling.md`
tells how a step is decided, with an example.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Final

from bros_router.request import RequestClass
from bros_router.scheduling.attainment import RecentAttainment
from bros_router.scheduling.batch_cap import BatchCap, CapControl
from bros_router.scheduling.deadlines import first_token_deadline_s, met_targets, paced_deadline_s, strict_deadline_s
from bros_router.scheduling.latency_model import LatencyModel
from bros_router.scheduling.policies.ordered import by_arrival
from bros_router.scheduling.queues import WaitingQueue
from bros_router.scheduling.real_time_queue import RealTimeQueue, due_s
from bros_router.scheduling.sequence import Sequence, SequenceState
from bros_router.scheduling.step_draft import SchedulerLimits, StepDraft
from bros_router.scheduling.step_limit import StepLimit
from bros_shard.protocol import StepShape

#: Share of the time to a deadline that a step leaves unused.
_GUARD: Final = 0.05
#: Chunks are multiples of this, so that a prompt does not crumble.
_CHUNK_UNIT: Final = 16
#: Steps without a chunk after which one unit of a real-time prompt is computed whatever the decodes say.
_MOST_STARVED_STEPS: Final = 4
#: Tokens of the forced chunk for a best-effort sequence that has starved, and how often it may run, in steps.
_TRICKLE_TOKENS: Final = 64
_TRICKLE_PERIOD: Final = 8
#: Best-effort work may make a step of real-time decodes this many times as long, whatever the limit of a step is.
_SMALLEST_STRETCH: Final = 1.5
#: KV blocks kept free of new best-effort sequences while there is real-time work, for bursts and for the growth of what
#: runs (Echo's idea; the shares are ours): a share of all blocks, or of those that real-time sequences hold, if more.
_RESERVED_SHARE: Final = 0.05
_RESERVED_RT_SHARE: Final = 0.25
#: Background checkpoints begin when this share of the blocks is used, so many a step at most.
_CHECKPOINT_SHARE: Final = 0.8
_MOST_CHECKPOINTS: Final = 4
#: Attainment below which best-effort sequences that starve get nothing either, unless the floor is hard.
_ATTAINMENT_GOAL: Final = 0.99


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
    #: A step with best-effort work in it stays short, for the real-time request that may come while it runs.
    keeps_steps_short: bool = True
    #: Full best-effort blocks are copied to the host ahead of time.
    checkpoints: bool = True
    cap_control: CapControl = CapControl.AIMD
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
    checkpoints=False,
    cap_control=CapControl.RESET,
    be_max_wait_s=math.inf,
)


@dataclass(slots=True)
class _Standing:
    """The running sequences that a step may take up, by what they need. Each list in order of admission."""

    decoding: list[Sequence] = field(default_factory=list)
    prefilling: list[Sequence] = field(default_factory=list)
    late: list[Sequence] = field(default_factory=list)
    be_decoding: list[Sequence] = field(default_factory=list)
    #: More than a token behind: in prefill, or preempted in part.
    be_behind: list[Sequence] = field(default_factory=list)
    be_all: list[Sequence] = field(default_factory=list)


class BrosPolicy:
    """One instance schedules one engine."""

    def __init__(self, latency_model: LatencyModel, limits: SchedulerLimits, options: BrosOptions) -> None:
        self.cap = BatchCap(options.cap_control, limits.max_num_sequences)
        self._model = latency_model
        self._limits = limits
        self._options = options
        self._rt_waiting = RealTimeQueue(latency_model, limits.max_batch_tokens)
        self._late_waiting = WaitingQueue(by_arrival)
        self._be_waiting = WaitingQueue(by_arrival)
        self._attainment = RecentAttainment()
        self._step_limit = StepLimit()
        self._num_starved_steps = 0
        self._last_trickle_step = -_TRICKLE_PERIOD

    # --- those that wait

    @property
    def num_waiting(self) -> int:
        """Sequences that wait."""
        return len(self._rt_waiting) + len(self._late_waiting) + len(self._be_waiting)

    def waiting(self) -> Iterator[Sequence]:
        """Those that wait, in no order."""
        return itertools.chain(self._rt_waiting, self._late_waiting, self._be_waiting)

    def add(self, sequence: Sequence) -> None:
        """The sequence waits from now on."""
        if sequence.request_class is RequestClass.BE:
            self._be_waiting.push(sequence)
        elif sequence.is_late:
            self._late_waiting.push(sequence)
        else:
            if sequence.first_scheduled_s is None:
                assert sequence.targets is not None
                alone_s = self._rt_waiting.alone_s(sequence.num_prompt_tokens)
                self._step_limit.note_arrival(sequence.arrival_s, sequence.targets.ttft_s - alone_s)
            self._rt_waiting.push(sequence)

    def remove(self, sequence: Sequence) -> None:
        """A sequence that waits has ended."""
        if sequence.request_class is RequestClass.BE:
            self._be_waiting.remove(sequence)
        elif sequence.is_late:
            self._late_waiting.remove(sequence)
        else:
            self._rt_waiting.remove(sequence)

    def finished(self, sequence: Sequence) -> None:
        """A sequence got its last token."""
        if sequence.targets is not None and not sequence.is_late:
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
        step_limit_s = self._step_limit.seconds(draft.now_s)
        has_real_time = step_limit_s < math.inf
        draft.kv.num_reserved_blocks = self._num_blocks_to_reserve(draft) if has_real_time else 0
        draft.max_num_sequences = self.cap.value
        standing = self._take_stock(draft)
        end_s = self._decode_real_time(draft, standing)
        is_too_long = draft.end_s > end_s
        # Where the decodes alone take about as long as the limit, it would leave nothing for best-effort work and
        # hardly shorten the wait.
        step_limit_s = max(step_limit_s, _SMALLEST_STRETCH * self._model.predict_s(draft.shape))
        end_s = self._prefill_real_time(draft, standing, end_s)
        self._run_late(draft, standing, end_s)
        is_bound = False
        if self._options.fills or not (draft.chunks or self._rt_waiting):
            if self._options.keeps_steps_short:
                # The limit is no deadline: it is meant for the usual step, not for the slowest of twenty.
                end_s = min(end_s, draft.start_s + step_limit_s * self._model.margin)
            is_bound = not self._decode_best_effort(draft, standing, end_s)
            if not is_bound:
                self._prefill_best_effort(draft, standing, end_s)
            if self._options.checkpoints:
                self._checkpoint(draft, standing, end_s)
        self.cap.note_step(is_bound=is_bound, is_too_long=is_too_long)

    def _num_blocks_to_reserve(self, draft: StepDraft) -> int:
        # The more memory real-time sequences hold, the more it matters that they are done soon: best-effort work makes
        # their steps longer, so they hold it for longer, until they do not fit any more.
        kv = draft.kv
        num_rt_blocks = kv.num_used_blocks(RequestClass.RT)
        return int(max(_RESERVED_SHARE * kv.num_blocks, _RESERVED_RT_SHARE * num_rt_blocks))

    def _take_stock(self, draft: StepDraft) -> _Standing:
        standing = _Standing()
        for sequence in draft.running:
            is_be = sequence.request_class is RequestClass.BE
            if is_be:
                standing.be_all.append(sequence)
            num_pending_tokens = sequence.num_pending_tokens
            if num_pending_tokens == 1:
                if is_be:
                    standing.be_decoding.append(sequence)
                else:
                    (standing.late if sequence.is_late else standing.decoding).append(sequence)
            elif num_pending_tokens and sequence.num_in_flight_tokens == 0:
                if is_be:
                    standing.be_behind.append(sequence)
                else:
                    (standing.late if sequence.is_late else standing.prefilling).append(sequence)
        return standing

    # --- real-time

    def _decode_real_time(self, draft: StepDraft, standing: _Standing) -> float:
        """A token for every real-time sequence that decodes. Returns when the step must have ended for their sake."""
        deadline_of = paced_deadline_s if self._options.paces else strict_deadline_s
        start_s = draft.start_s
        first_deadline_s = math.inf
        decoding = standing.decoding
        most = min(self._limits.max_num_sequences, self._limits.max_batch_tokens)
        if len(decoding) > most:
            decoding = sorted(decoding, key=lambda sequence: deadline_of(sequence, start_s))[:most]
        for sequence in decoding:
            if sequence.sequence_id in draft.victims or not self._give_room(draft, standing, sequence, 1):
                continue
            draft.add(sequence, 1)
            first_deadline_s = min(first_deadline_s, deadline_of(sequence, start_s))
        return start_s + (first_deadline_s - start_s) * (1.0 - _GUARD)

    def _give_room(
        self, draft: StepDraft, standing: _Standing, sequence: Sequence, num_tokens: int, end_s: float = math.inf
    ) -> bool:
        """See to memory for a real-time sequence: at the cost of best-effort ones; as a last resort, if it decodes
        already, at the cost of the real-time one that can wait longest, which may be itself."""
        if draft.shortfall(sequence, num_tokens) == 0:
            return True
        if draft.make_room(sequence, num_tokens, self._be_victims(standing), end_s):
            return True
        if sequence.state is SequenceState.WAITING or not sequence.is_decoding:
            return False
        others = [other for other in draft.running if other.request_class is RequestClass.RT and not draft.holds(other)]
        others.sort(key=due_s, reverse=True)
        for other in others:
            draft.preempt(other)
            if other is sequence:
                return False
            if draft.shortfall(sequence, num_tokens) == 0:
                return True
        return False

    def _be_victims(self, standing: _Standing) -> list[Sequence]:
        """Best-effort sequences in the order in which they give way: those preempted before, then the youngest."""
        decoding = {sequence.sequence_id for sequence in standing.be_decoding}
        return sorted(
            (sequence for sequence in standing.be_all if sequence.state is SequenceState.RUNNING),
            key=lambda sequence: (sequence.sequence_id not in decoding, sequence.arrival_s, sequence.sequence_id),
            reverse=True,
        )

    def _prefill_real_time(self, draft: StepDraft, standing: _Standing, end_s: float) -> float:
        """Chunks of real-time prompts, the most urgent first. Returns when the step must have ended for all."""
        prefilling = sorted(standing.prefilling, key=self._rt_waiting.latest_start_s)
        bound_s = end_s
        is_any_left_out = False
        for sequence in self._next_prompts(draft, prefilling):
            is_new = sequence.state is SequenceState.WAITING
            num_pending_tokens = sequence.num_pending_tokens
            num_tokens = self._chunk(draft, sequence, bound_s)
            if num_tokens == 0 and self._num_starved_steps >= _MOST_STARVED_STEPS:
                num_tokens = min(_CHUNK_UNIT if self._options.chunks else num_pending_tokens, num_pending_tokens)
                num_tokens = min(num_tokens, draft.num_tokens_left)
            if num_tokens == 0:
                is_any_left_out = True
                bound_s = min(bound_s, self._reachable_s(draft, self._rt_waiting.latest_start_s(sequence)))
                break
            if is_new and draft.num_sequences_left <= 0:
                break
            if not self._give_room(draft, standing, sequence, num_pending_tokens, bound_s):
                break  # it waits for memory, which others free the sooner the more they do
            if is_new:
                self._rt_waiting.remove(sequence)
            draft.add(sequence, num_tokens, num_pending_tokens)
            rest = num_pending_tokens - num_tokens
            rest_s = self._rt_waiting.alone_s(rest, sequence.num_computed_tokens + num_tokens)
            bound_s = min(bound_s, self._reachable_s(draft, due_s(sequence) - rest_s))
            self._num_starved_steps = 0
        self._num_starved_steps += is_any_left_out
        return bound_s

    def _next_prompts(self, draft: StepDraft, prefilling: list[Sequence]) -> Iterator[Sequence]:
        """Real-time prompts to go on with, the most urgent first; those that are too late are relegated on the way."""
        position = 0
        while draft.num_tokens_left > 0:
            waiting = self._rt_waiting.peek()
            if waiting is not None and self._relegate(draft, waiting):
                continue
            if position < len(prefilling):
                # A prompt that was begun goes first: it holds memory.
                if prefilling[position].sequence_id not in draft.victims:
                    yield prefilling[position]
                position += 1
            elif waiting is not None and draft.may_run(waiting):
                yield waiting
            else:
                return

    def _relegate(self, draft: StepDraft, sequence: Sequence) -> bool:
        """Put a waiting sequence with the late ones if it cannot meet its target even alone. Returns whether it is."""
        assert sequence.targets is not None
        if not self._options.relegates or not sequence.targets.are_given or sequence.first_token_s is not None:
            return False
        late_by_s = draft.start_s - self._rt_waiting.latest_start_s(sequence)
        if late_by_s <= 0.0:
            return False
        self._rt_waiting.remove(sequence)
        draft.relegate(sequence)
        self._late_waiting.push(sequence)
        self._attainment.note(draft.now_s, False)
        self._step_limit.note_first_token(late_by_s)
        return True

    def _reachable_s(self, draft: StepDraft, bound_s: float) -> float:
        """A bound that can still be kept, with its guard; one that cannot would only keep others from running."""
        bound_s = draft.start_s + (bound_s - draft.start_s) * (1.0 - _GUARD)
        return bound_s if bound_s >= draft.end_s else math.inf

    def _chunk(self, draft: StepDraft, sequence: Sequence, end_s: float) -> int:
        """How many pending tokens of a prompt fit a step that ends by `end_s`."""
        num_pending_tokens = sequence.num_pending_tokens
        if self._options.chunks:
            num_tokens = draft.largest_chunk(sequence, end_s)
            is_held_back = num_tokens < min(num_pending_tokens, draft.num_tokens_left)
            return num_tokens - num_tokens % _CHUNK_UNIT if is_held_back else num_tokens
        # Whole prompts; of one that does not fit the token budget beside the decodes, as much as fits. One that no step
        # can hold in time gets a step without anything else.
        limit = min(num_pending_tokens, draft.num_tokens_left)
        if limit < min(num_pending_tokens, self._limits.max_batch_tokens // 2):
            return 0
        return limit if not draft.chunks or draft.largest_chunk(sequence, end_s) == limit else 0

    def _run_late(self, draft: StepDraft, standing: _Standing, end_s: float) -> None:
        """Real-time sequences that missed a target: before best-effort work, but they bound nobody."""
        if not draft.chunks:
            end_s = math.inf
        for sequence in standing.late:
            if sequence.sequence_id in draft.victims or draft.num_sequences_left <= 0:
                continue
            num_tokens = self._chunk(draft, sequence, end_s)
            if num_tokens and self._give_room(draft, standing, sequence, sequence.num_pending_tokens, end_s):
                draft.add(sequence, num_tokens, sequence.num_pending_tokens)
        while (late := self._late_waiting.peek()) is not None and draft.num_sequences_left > 0:
            if not draft.may_run(late):
                return
            num_tokens = self._chunk(draft, late, end_s)
            if not num_tokens or not self._give_room(draft, standing, late, late.num_pending_tokens, end_s):
                return
            self._late_waiting.remove(late)
            draft.add(late, num_tokens, late.num_pending_tokens)

    # --- best-effort

    def _decode_best_effort(self, draft: StepDraft, standing: _Standing, end_s: float) -> bool:
        """A token for as many best-effort sequences as the step has time for, those that starve first, then the
        oldest. Returns whether that was all of them."""
        ready = [sequence for sequence in standing.be_decoding if sequence.sequence_id not in draft.victims]
        if not ready:
            return True
        num_starving = 0
        if self._options.be_max_wait_s < math.inf:
            ready.sort(key=lambda sequence: not self._starves(draft, sequence))
            num_starving = sum(1 for _ in itertools.takewhile(lambda s: self._starves(draft, s), ready))
        most = max(0, min(len(ready), draft.num_sequences_left, draft.num_tokens_left))
        num_fitting = self._num_fitting_decodes(draft, ready[:most], end_s)
        if num_fitting == 0 and most and (not draft.chunks or (num_starving and self._has_floor(draft))):
            num_fitting = 1
        for sequence in ready[:num_fitting]:
            if sequence.sequence_id in draft.victims:
                continue  # it gave way to one of those before it
            if draft.shortfall(sequence, 1) and not draft.make_room(sequence, 1, self._younger(standing, sequence)):
                continue
            draft.add(sequence, 1)
        return num_fitting == len(ready)

    def _num_fitting_decodes(self, draft: StepDraft, ready: list[Sequence], end_s: float) -> int:
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
            return draft.start_s + self._model.bound_s(with_decodes) <= end_s

        if fits(len(ready)):
            return len(ready)
        low, high = 0, len(ready)  # low fits, or is none at all; high does not
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (middle, high) if fits(middle) else (low, middle)
        return low

    def _younger(self, standing: _Standing, sequence: Sequence) -> list[Sequence]:
        """Best-effort sequences that arrived later: only they give way to this one, so that no two take turns."""
        key = by_arrival(sequence)
        return [victim for victim in self._be_victims(standing) if by_arrival(victim) > key]

    def _prefill_best_effort(self, draft: StepDraft, standing: _Standing, end_s: float) -> None:
        """Prompts, and what was preempted, oldest first; then new ones, if all that were let in could go on."""
        is_trickle = self._is_trickle_due(draft, standing)
        for sequence in standing.be_behind:
            if sequence.sequence_id in draft.victims:
                return
            if not self._continue_best_effort(draft, standing, sequence, end_s, is_trickle):
                return
            is_trickle = False
        while (sequence := self._be_waiting.peek()) is not None:  # type: ignore[assignment]
            if not draft.may_run(sequence) or draft.num_sequences_left <= 0:
                return
            num_pending_tokens = sequence.num_pending_tokens
            if draft.shortfall(sequence, num_pending_tokens) or not self._leaves_reserve(draft, sequence):
                return
            num_tokens = self._chunk_or_force(draft, sequence, end_s, is_trickle)
            if num_tokens == 0:
                return
            self._be_waiting.pop()
            draft.add(sequence, num_tokens, num_pending_tokens)
            is_trickle = False

    def _continue_best_effort(
        self, draft: StepDraft, standing: _Standing, sequence: Sequence, end_s: float, is_trickle: bool
    ) -> bool:
        """Go on with a prompt, or bring back what was taken. Returns whether there may be time and room for more."""
        num_pending_tokens = sequence.num_pending_tokens
        if draft.num_sequences_left <= 0 or draft.num_tokens_left <= 0:
            return False
        if draft.shortfall(sequence, num_pending_tokens) and not draft.make_room(
            sequence, num_pending_tokens, self._younger(standing, sequence)
        ):
            return False
        num_restored_tokens = self._num_worth_restoring(draft, sequence, end_s)
        if num_restored_tokens:
            draft.restore(sequence, num_restored_tokens)
        num_tokens = self._chunk_or_force(draft, sequence, end_s, is_trickle)
        if num_tokens == 0:
            return False
        draft.add(sequence, num_tokens, sequence.num_pending_tokens)
        return True

    def _num_worth_restoring(self, draft: StepDraft, sequence: Sequence, end_s: float) -> int:
        """How many tokens to copy back from the host rather than to compute anew."""
        num_tokens = draft.kv.num_restorable_tokens(sequence.sequence_id, sequence.num_computed_tokens)
        shape = draft.shape
        while num_tokens > 0:
            copied_s = self._model.bound_s(shape.with_copies(num_tokens))
            computed_s = self._model.bound_s(shape.with_sequence(sequence.num_computed_tokens, num_tokens))
            if copied_s > computed_s:
                return 0
            if draft.start_s + copied_s <= end_s or not draft.chunks:
                return num_tokens
            num_tokens = num_tokens // 2 // draft.kv.block_size * draft.kv.block_size
        return 0

    def _chunk_or_force(self, draft: StepDraft, sequence: Sequence, end_s: float, is_trickle: bool) -> int:
        num_tokens = self._chunk(draft, sequence, end_s)
        if num_tokens:
            return num_tokens
        if is_trickle:
            self._last_trickle_step = draft.step_id
            return min(_TRICKLE_TOKENS, sequence.num_pending_tokens, draft.num_tokens_left)
        # Never an empty step while there is work.
        return 0 if draft.chunks else min(_CHUNK_UNIT, sequence.num_pending_tokens, draft.num_tokens_left)

    def _leaves_reserve(self, draft: StepDraft, sequence: Sequence) -> bool:
        """Whether a new best-effort sequence leaves room for a burst, and for those that run to grow into."""
        num_blocks = -(-sequence.num_pending_tokens // draft.kv.block_size)
        if not draft.running:
            return True
        return draft.kv.num_free_blocks - num_blocks >= draft.kv.num_reserved_blocks

    def _starves(self, draft: StepDraft, sequence: Sequence) -> bool:
        since_s = sequence.arrival_s if sequence.last_token_s is None else sequence.last_token_s
        return draft.now_s - since_s > self._options.be_max_wait_s

    def _has_floor(self, draft: StepDraft) -> bool:
        """Whether a best-effort sequence that starves gets something although there is no time for it."""
        return self._options.is_floor_hard or self._attainment.share(draft.now_s) >= _ATTAINMENT_GOAL

    def _is_trickle_due(self, draft: StepDraft, standing: _Standing) -> bool:
        if draft.step_id - self._last_trickle_step < _TRICKLE_PERIOD:
            return False
        oldest = standing.be_behind[0] if standing.be_behind else self._be_waiting.peek()
        return oldest is not None and self._starves(draft, oldest) and self._has_floor(draft)

    def _checkpoint(self, draft: StepDraft, standing: _Standing, end_s: float) -> None:
        """While memory is short, copy the full blocks that would be taken next to the host."""
        kv = draft.kv
        if (
            not draft.chunks
            or not kv.has_unused_host_block
            or kv.num_free_blocks > (1.0 - _CHECKPOINT_SHARE) * kv.num_blocks
        ):
            return
        num_left = _MOST_CHECKPOINTS
        for sequence in self._be_victims(standing):
            while num_left and kv.has_unused_host_block:
                index = kv.newest_unsaved_block(sequence.sequence_id, sequence.num_computed_tokens)
                with_copy = draft.shape.with_copies(kv.block_size)
                if index is None or draft.start_s + self._model.bound_s(with_copy) > end_s:
                    break
                draft.checkpoint(sequence, index)
                num_left -= 1
            if not num_left:
                return
