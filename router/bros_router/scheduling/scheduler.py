"""Plans every step and takes in its result: the mechanism, with the decisions left to a policy.

Pure: no sockets, torch, asyncio, logging or clock; time is an argument. The server, the tests and the simulator
run this same class.
"""

from __future__ import annotations

import math
from collections import Counter, deque
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Final

from bros_router.kv.block_hasher import BlockHasher, ModelVariant
from bros_router.kv.kv_manager import Copies, KVManager
from bros_router.request import FinishReason, RequestClass
from bros_router.scheduling.deadlines import first_token_deadline_s
from bros_router.scheduling.latency_model import LatencyModel
from bros_router.scheduling.policies.policy import Policy
from bros_router.scheduling.sequence import Sequence, SequenceState
from bros_router.scheduling.speculation import Speculation
from bros_router.scheduling.step_draft import NO_GUESSES, Guesses, SchedulerLimits, StepDraft
from bros_shard.protocol import (
    NewSequence,
    RankedToken,
    SampledToken,
    SequenceResult,
    SequenceStep,
    StepPlan,
    StepResult,
    StepShape,
)

#: Interruptions at a time, each in the middle of the one before: a short prompt cannot wait for a long one. Few, since
#: the ranks keep the activations of all of them.
_MOST_NESTED: Final = 4


@dataclass(frozen=True, slots=True)
class Outcome:
    """What a committed step gave one sequence that still wanted it: a token, or a fault that ended it."""

    sequence: Sequence
    token_id: int | None = None
    logprob: float | None = None
    #: Set where this token was the last one.
    finish_reason: FinishReason | None = None
    fault: str | None = None
    #: The likeliest tokens, where asked for.
    top_tokens: list[RankedToken] = field(default_factory=list)


class StepMismatchError(Exception):
    """The ranks answered another step than the one that is due."""


@dataclass(slots=True)
class StepInFlight:
    """A step that was planned and not committed yet."""

    step_id: int
    #: With the guesses that are expected.
    shape: StepShape
    #: When it started, or will.
    start_s: float
    predicted_s: float
    #: What the real-time sequences that decode would take without the rest.
    rt_decode_s: float
    #: The share of the time that these take if none comes later than its TPOT says. At most 1.
    rt_decode_share: float
    #: Most sequences it might have held.
    max_num_sequences: int
    #: Who gave up memory for it, and its class.
    victims: dict[int, RequestClass]
    #: The sequences for which the step samples a token.
    sampled: list[Sequence]
    #: When those of them that get their first token want it.
    first_due_s: list[float]
    #: As in `StepDraft`.
    shape_without_guesses: StepShape
    guesses: dict[int, Guesses]

    def shape_with(self, results: dict[int, SequenceResult]) -> StepShape:
        """What it turned out to be, given what it gave each sequence: that tells how many tokens were guessed."""
        shape = self.shape_without_guesses
        for sequence_id, guesses in self.guesses.items():
            result = results.get(sequence_id)
            shape = shape.with_sequence(
                guesses.num_computed_tokens, 1 + (result.num_speculative_tokens if result else 0)
            )
        return shape

    def spare_s(self, end_s: float, bound_s: float) -> float:
        """How much later than `bound_s` it may end, but for first tokens that are late if it ends at `end_s`."""
        return min((due_s for due_s in self.first_due_s if due_s >= end_s), default=math.inf) - bound_s


class Scheduler:
    """Sequences in, step plans out; step results in, outcomes out.

    `plan` may be called again before the previous step was committed: counts run ahead of the ranks, and what a
    plan assumed is checked at its commit.
    """

    def __init__(
        self,
        policy: Policy,
        kv: KVManager,
        latency_model: LatencyModel,
        limits: SchedulerLimits,
        generation: int = 0,
        hasher: BlockHasher | None = None,
        speculation: Speculation | None = None,
    ) -> None:
        """`hasher`: full blocks are found again by what they hold; without it, nothing is shared. `speculation`: lets
        the ranks guess; without it, every token is computed from the one before."""
        self._hasher = hasher
        self._speculation = speculation
        self._policy = policy
        self._kv = kv
        self._latency_model = latency_model
        self._limits = limits
        self._generation = generation
        self._next_step_id = 0
        #: In order of admission. A dict, so that leaving it is O(1).
        self._running: dict[int, Sequence] = {}
        self._num_alive = dict.fromkeys(RequestClass, 0)
        self._in_flight: deque[StepInFlight] = deque()
        #: By step id: what is run in the middle of those in flight, or of an interruption before it.
        self._interruptions: dict[int, StepInFlight] = {}
        #: The latest step that was planned: `plan` and `interrupt` return it as the ranks get it.
        self.last_step: StepInFlight | None = None
        self._releases: list[int] = []
        self._relegated: list[Sequence] = []

    @property
    def num_waiting(self) -> int:
        """Sequences that wait to be let in."""
        return self._policy.num_waiting

    @property
    def num_running(self) -> int:
        """Sequences that were let in."""
        return len(self._running)

    def num_sequences(self) -> dict[RequestClass, tuple[int, int]]:
        """How many sequences of each class were let in, and how many wait."""
        num_running = Counter(sequence.request_class for sequence in self._running.values())
        return {
            request_class: (num_running[request_class], num_alive - num_running[request_class])
            for request_class, num_alive in self._num_alive.items()
        }

    @property
    def max_running_tokens(self) -> int:
        """Tokens that the running sequences may grow to, all together."""
        return sum(sequence.max_total_tokens for sequence in self._running.values())

    def free_at_s(self, now_s: float) -> float:
        """When the ranks are predicted to have run all that was planned; `now_s` where they are idle or overdue."""
        free_s = now_s
        if self._in_flight:
            first = self._in_flight[0]
            free_s = max(now_s, first.start_s + first.predicted_s)
            free_s += sum(step.predicted_s for step in self._in_flight if step is not first)
        return free_s

    def block_hashes(self, prompt_token_ids: tuple[int, ...], adapter: int | None = None) -> list[bytes] | None:
        """What a sequence with this prompt and this adapter is to be given as its block hashes."""
        if self._hasher is None:
            return None
        hashes: list[bytes] = []
        self._hasher.extend(hashes, prompt_token_ids, (), _variant(adapter))
        return hashes

    def add(self, sequence: Sequence) -> None:
        """Queue a new sequence. It must fit the KV region on its own."""
        assert sequence.state is SequenceState.WAITING and sequence.num_computed_tokens == 0
        assert sequence.max_total_tokens <= self._kv.num_blocks * self._kv.block_size
        self._num_alive[sequence.request_class] += 1
        self._policy.add(sequence)

    def finish(
        self,
        sequence: Sequence,
        *,
        num_output_tokens: int | None = None,
        is_complete: bool = False,
        is_sound: bool = True,
    ) -> None:
        """The one exit of a sequence, whatever the reason. Its blocks are free for the next plan.

        A step in flight may still write to those blocks: the ranks run plans in order, so whoever gets them in
        a later plan writes after it. A second call does nothing.

        Args:
            num_output_tokens: only so many of its tokens were wanted; a step that guesses may bring more.
            is_complete: it has got its last token, so what the policy learns from it is true.
            is_sound: what was computed for it may be read by others.
        """
        if num_output_tokens is not None:
            del sequence.output_token_ids[num_output_tokens:]
        if sequence.state is SequenceState.FINISHED:
            return
        if is_complete:
            self._policy.finished(sequence)
        if sequence.state is SequenceState.RUNNING:
            del self._running[sequence.sequence_id]
            self._kv.release(sequence.sequence_id, is_sound=is_sound)
        else:
            self._policy.remove(sequence)
        sequence.state = SequenceState.FINISHED
        self._num_alive[sequence.request_class] -= 1
        if sequence.is_on_ranks:
            self._releases.append(sequence.sequence_id)

    def plan(self, now_s: float) -> StepPlan | None:
        """The next step, or `None` where there is nothing to send now.

        A plan may hold releases or copies alone, or nothing at all where those that were to run gave way to each
        other: the ranks then compute nothing, and the next plan goes on.
        """
        draft = self._draft(now_s, self.free_at_s(now_s))
        self._policy.compose(draft)
        draft.detach_unused()
        self._relegated += draft.relegated
        if self._speculation is not None:
            self._speculation.extend(draft)
        copies = self._kv.take_copies()
        has_copies = copies.out or copies.tail_moves or copies.in_
        if not (draft.chunks or draft.victims or self._releases or has_copies):
            return None
        self._kv.step_planned()
        plan, step = self._emit(draft, copies, self._releases)
        self._releases = []
        self._in_flight.append(step)
        return plan

    def interrupt(self, now_s: float) -> StepPlan | None:
        """A step for the ranks to run in the middle of the one they are in, or `None` where nothing is that urgent.

        It has new sequences alone, in blocks that those sent before it know nothing of. What has ended since stays on
        the ranks until the next plan, for they may still hold it. An interruption may be interrupted in turn. Nothing
        is at the cost of a first token that would be in time.
        """
        if not self._policy.can_interrupt or not self._in_flight or len(self._interruptions) >= _MOST_NESTED:
            return None
        margin = self._latency_model.margin
        interrupted = [self._in_flight[0], *self._interruptions.values()]
        running = interrupted[-1]
        if self._interruptions:  # after it there may be the next
            next_s = running.start_s + margin * running.predicted_s
        else:  # after what was sent comes a step with about the same real-time decodes
            waiting_s = sum(step.predicted_s for step in self._in_flight) + self._in_flight[-1].rt_decode_s
            next_s = running.start_s + margin * waiting_s
        latest_end_s = now_s + self._spare_s(now_s, margin)
        # What was sent to interrupt the step that ended last may have come too late, and still run.
        first_id = self._in_flight[0].step_id
        is_one_left = any(step_id < first_id for step_id in self._interruptions)
        draft = self._draft(now_s, now_s)
        with self._kv.beside_planned_steps(len(self._in_flight) + is_one_left):
            self._policy.interrupt(draft, max(now_s, next_s), latest_end_s)
            draft.detach_unused()
        self._relegated += draft.relegated
        if not draft.chunks:
            return None
        plan, interruption = self._emit(draft, Copies([], [], []), [], is_interruption=True)
        for step in interrupted:
            step.start_s += interruption.predicted_s
        self._interruptions[interruption.step_id] = interruption
        return plan

    def _spare_s(self, now_s: float, margin: float) -> float:
        """How much later all that was sent may end, with the first tokens in time that would be."""
        spare_s = math.inf
        for step in self._interruptions.values():
            end_s, bound_s = step.start_s + step.predicted_s, step.start_s + margin * step.predicted_s
            spare_s = min(spare_s, step.spare_s(max(now_s, end_s), max(now_s, bound_s)))
        end_s = bound_s = self._in_flight[0].start_s
        for step in self._in_flight:
            end_s, bound_s = max(now_s, end_s + step.predicted_s), max(now_s, bound_s + margin * step.predicted_s)
            spare_s = min(spare_s, step.spare_s(end_s, bound_s))
        return spare_s

    def _draft(self, now_s: float, start_s: float) -> StepDraft:
        return StepDraft(
            now_s,
            start_s,
            self._next_step_id,
            self._kv,
            self._latency_model,
            self._limits,
            self._running,
            self._policy.add,
        )

    def num_held_tokens(self) -> int:
        """Room in the KV region that real-time sequences have which are in time: they keep it."""
        num_blocks = self._kv.num_used_blocks(RequestClass.RT)
        for sequence in self._running.values():
            if sequence.is_late:
                num_blocks -= self._kv.num_own_blocks(sequence.sequence_id)
        return num_blocks * self._kv.block_size

    def take_relegated(self) -> list[Sequence]:
        """The sequences that were relegated since the last call."""
        relegated, self._relegated = self._relegated, []
        return relegated

    def commit(self, result: StepResult, now_s: float) -> list[Outcome]:
        """Take in the result of the oldest step in flight, or of the one that interrupts it.

        A token of a sequence that has finished since is dropped.

        Raises:
            StepMismatchError: the result is of another step. Nothing has changed.
        """
        step = self._take_step(result, now_s)
        results = {part.sequence_id: part for part in result.sequences}
        if step.sampled or step.shape.num_prefill_tokens:
            self._latency_model.observe(step.shape_with(results), result.step_s)
        outcomes: list[Outcome] = []
        for sequence in step.sampled:
            outcomes += self._commit(sequence, results.get(sequence.sequence_id), step, now_s)
        return outcomes

    def _commit(
        self, sequence: Sequence, result: SequenceResult | None, step: StepInFlight, now_s: float
    ) -> Iterator[Outcome]:
        """What a step gave one of its sequences; nothing where that has ended."""
        sequence.num_in_flight_tokens -= 1
        num_allowed = step.guesses.get(sequence.sequence_id, NO_GUESSES).num_allowed
        sequence.num_uncertain_tokens -= num_allowed
        is_stalled = sequence.is_stalled
        if sequence.num_in_flight_tokens == 0:
            sequence.is_stalled = False
        if sequence.state is SequenceState.FINISHED:
            return
        if result is None or not 1 <= len(result.tokens) <= 1 + num_allowed:
            self.finish(sequence, is_sound=False)
            fault = result.fault if result else None
            yield Outcome(sequence, fault=fault or "the step gave no token, or too many")
            return
        num_confirmed = len(result.tokens) - 1
        if num_allowed:
            sequence.guesses.note(result.num_speculative_tokens, num_confirmed)
        elif self._speculation is not None:
            sequence.guesses.pass_by()
        if not is_stalled:
            sequence.num_computed_tokens += num_confirmed
        for token in result.tokens:
            yield (outcome := self._commit_token(sequence, token, now_s))
            if outcome.finish_reason is not None:
                return

    def _take_step(self, result: StepResult, now_s: float) -> StepInFlight:
        """The step that the result is of. What the ranks run from now on has its start corrected."""
        interruption = self._interruptions.pop(result.step_id, None)
        if interruption is not None:
            for step in [*self._in_flight, *self._interruptions.values()]:
                if step.step_id < interruption.step_id:  # what it interrupts, unless it came too late
                    step.start_s += result.step_s - interruption.predicted_s
            if self._in_flight and self._in_flight[0].step_id > interruption.step_id:
                self._in_flight[0].start_s = now_s
            return interruption
        # What was sent after an interruption runs after it.
        is_early = any(step_id < result.step_id for step_id in self._interruptions)
        if is_early or not self._in_flight or self._in_flight[0].step_id != result.step_id:
            raise StepMismatchError(f"step {result.step_id} is not the one due")
        step = self._in_flight.popleft()
        if self._in_flight:  # what interrupts came too late for the step that ended
            self._in_flight[0].start_s = now_s + sum(late.predicted_s for late in self._interruptions.values())
        return step

    def restart(self, generation: int) -> None:
        """The ranks were replaced: every sequence starts over from the tokens that were committed.

        Tokens in flight are lost and sampled again; sampling depends on the seed and the position alone, so they
        come out the same.
        """
        self._generation = generation
        self._next_step_id = 0
        self._in_flight.clear()
        self._interruptions.clear()
        self._releases.clear()
        for sequence in [*self._running.values()]:
            self._kv.release(sequence.sequence_id)
            sequence.start_over()
            self._policy.add(sequence)
        self._running.clear()
        self._kv.forget_cached()
        for sequence in self._policy.waiting():
            sequence.num_cached_tokens = 0
            sequence.num_in_flight_tokens = sequence.num_uncertain_tokens = 0
            sequence.is_stalled = False
            sequence.is_on_ranks = False

    def _emit(
        self, draft: StepDraft, copies: Copies, releases: list[int], *, is_interruption: bool = False
    ) -> tuple[StepPlan, StepInFlight]:
        """Write the decision down: the message that the ranks get, and what is remembered of it. Counts it as done."""
        steps, new_sequences, sampled, first_due_s = [], [], [], []
        num_rt_decodes = num_rt_context_tokens = 0
        least_tpot_s = math.inf
        block_size = self._kv.block_size
        for sequence, num_tokens in draft.chunks:
            if not sequence.is_on_ranks:
                new_sequences.append(self._introduce(sequence, draft.now_s))
            num_computed_tokens = sequence.num_computed_tokens
            first_changed_index, entries = self._kv.take_changes(sequence.sequence_id)
            num_guesses = draft.guesses.get(sequence.sequence_id, NO_GUESSES).num_allowed
            steps.append(
                SequenceStep(
                    sequence.sequence_id,
                    num_computed_tokens,
                    num_tokens,
                    first_changed_index,
                    entries,
                    num_guesses,
                    sequence.num_uncertain_tokens,
                )
            )
            sequence.num_uncertain_tokens += num_guesses
            if num_tokens == 1 and sequence.request_class is RequestClass.RT:
                num_rt_decodes += 1
                num_rt_context_tokens += num_computed_tokens + 1
                if sequence.targets is not None and not sequence.is_late:
                    least_tpot_s = min(least_tpot_s, sequence.targets.tpot_s)
            sequence.num_computed_tokens = num_computed_tokens + num_tokens
            if (num_computed_tokens + num_tokens) // block_size > num_computed_tokens // block_size:
                self._publish(sequence, is_interruption=is_interruption)
            if num_computed_tokens + num_tokens == sequence.num_known_tokens:
                sequence.num_in_flight_tokens += 1
                sampled.append(sequence)
                is_first = sequence.first_token_s is None and sequence.num_in_flight_tokens == 1
                if is_first and sequence.targets is not None and not sequence.is_late:
                    first_due_s.append(first_token_deadline_s(sequence))
        plan = StepPlan(
            self._generation,
            self._next_step_id,
            steps,
            new_sequences,
            releases,
            copies.out,
            copies.tail_moves,
            copies.in_,
            is_interruption,
        )
        shape = draft.shape
        predicted_s = self._latency_model.predict_s(shape)
        rt_decode_s = 0.0
        if num_rt_decodes:
            rt_decodes = StepShape(num_decode_sequences=num_rt_decodes, decode_context_tokens=num_rt_context_tokens)
            rt_decode_s = self._latency_model.predict_s(rt_decodes)
        step = self.last_step = StepInFlight(
            plan.step_id,
            shape,
            draft.start_s,
            predicted_s,
            rt_decode_s,
            min(1.0, rt_decode_s / least_tpot_s),
            draft.max_num_sequences,
            draft.victims,
            sampled,
            first_due_s,
            draft.shape_without_guesses,
            draft.guesses,
        )
        self._next_step_id += 1
        return plan, step

    def _publish(self, sequence: Sequence, *, is_interruption: bool = False) -> None:
        """Let others read the blocks that are full once all that was planned has run."""
        if sequence.block_hashes is not None:
            self._kv.publish(
                sequence.sequence_id,
                sequence.block_hashes,
                sequence.num_computed_tokens,
                is_interruption=is_interruption,
            )

    def _introduce(self, sequence: Sequence, now_s: float) -> NewSequence:
        """What a rank that never saw the sequence must be told."""
        sequence.is_on_ranks = True
        if sequence.first_scheduled_s is None:
            sequence.first_scheduled_s = now_s
        return NewSequence(
            sequence.sequence_id,
            sequence.known_token_ids(),
            sequence.max_total_tokens,
            sequence.sampling,
            len(sequence.output_token_ids),
            sequence.num_prompt_top_tokens,
            sequence.grammar,
            sequence.adapter,
        )

    def _commit_token(self, sequence: Sequence, token: SampledToken, now_s: float) -> Outcome:
        sequence.output_token_ids.append(token.token_id)
        sequence.last_token_s = now_s
        if sequence.first_token_s is None:
            sequence.first_token_s = now_s
        if self._hasher is not None and sequence.block_hashes is not None:
            num_known_tokens = sequence.num_prompt_tokens + len(sequence.output_token_ids)
            if num_known_tokens // self._kv.block_size > len(sequence.block_hashes):
                self._hasher.extend(
                    sequence.block_hashes,
                    sequence.prompt_token_ids,
                    sequence.output_token_ids,
                    _variant(sequence.adapter),
                )
                if sequence.state is SequenceState.RUNNING:
                    self._publish(sequence)
        finish_reason = None
        if len(sequence.output_token_ids) == sequence.max_new_tokens:
            finish_reason = FinishReason.LENGTH  # before EOS: TGI's precedence
        elif token.token_id in sequence.eos_token_ids:
            finish_reason = FinishReason.EOS_TOKEN
        if finish_reason is not None:
            self.finish(sequence, is_complete=True)
        return Outcome(sequence, token.token_id, token.logprob, finish_reason, top_tokens=token.top_tokens)


def _variant(adapter: int | None) -> ModelVariant:
    """With whom a sequence may share blocks: who goes through the same adapter."""
    return "" if adapter is None else str(adapter)
