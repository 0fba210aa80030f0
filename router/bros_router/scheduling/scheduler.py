"""Decides every step: which sequences run, how many tokens of each, and who gives way.

Pure: no sockets, torch, asyncio, logging or clock; time is an argument. The server, the tests and the simulator
run this same class.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass
from typing import TypeAlias

from bros_router.kv.kv_manager import KVManager
from bros_router.request import FinishReason
from bros_router.scheduling.policies import Policy
from bros_router.scheduling.queues import WaitingQueue
from bros_router.scheduling.sequence import Sequence, SequenceState
from bros_shard.protocol import NewSequence, SequenceResult, SequenceStep, StepPlan, StepResult


@dataclass(frozen=True, slots=True)
class SchedulerLimits:
    """What a step may hold."""

    #: The token budget: most tokens computed in one step. TGI's `--max-batch-prefill-tokens`.
    max_batch_tokens: int
    #: Most sequences that own KV at once. TGI's `--max-batch-size`.
    max_num_sequences: int


@dataclass(frozen=True, slots=True)
class Outcome:
    """What a committed step gave one sequence that still wanted it: a token, or a fault that ended it."""

    sequence: Sequence
    token_id: int | None = None
    logprob: float | None = None
    #: Set where this token was the last one.
    finish_reason: FinishReason | None = None
    fault: str | None = None


class StepMismatchError(Exception):
    """The ranks answered another step than the one that is due."""


#: A sequence and how many of its pending tokens the step computes.
Chunk: TypeAlias = tuple[Sequence, int]


@dataclass(slots=True)
class _StepInFlight:
    step_id: int
    #: The sequences for which the step samples a token.
    sampled: list[Sequence]


class Scheduler:
    """Sequences in, step plans out; step results in, outcomes out.

    `plan` may be called again before the previous step was committed: counts run ahead of the ranks, and what a
    plan assumed is checked at its commit.
    """

    def __init__(self, policy: Policy, kv: KVManager, limits: SchedulerLimits, generation: int = 0) -> None:
        self._policy = policy
        self._kv = kv
        self._limits = limits
        self._generation = generation
        self._next_step_id = 0
        self._waiting = WaitingQueue(policy.waiting_key)
        #: In order of admission. A dict, so that leaving it is O(1).
        self._running: dict[int, Sequence] = {}
        self._in_flight: deque[_StepInFlight] = deque()
        self._releases: list[int] = []

    @property
    def num_waiting(self) -> int:
        """Sequences that own no KV."""
        return len(self._waiting)

    @property
    def num_running(self) -> int:
        """Sequences that own KV."""
        return len(self._running)

    @property
    def max_running_tokens(self) -> int:
        """Tokens that the running sequences may grow to, all together."""
        return sum(sequence.max_total_tokens for sequence in self._running.values())

    def add(self, sequence: Sequence) -> None:
        """Queue a new sequence. It must fit the KV region on its own."""
        assert sequence.state is SequenceState.WAITING and sequence.num_computed_tokens == 0
        assert sequence.max_total_tokens <= self._kv.num_blocks * self._kv.block_size
        self._waiting.push(sequence)

    def finish(self, sequence: Sequence) -> None:
        """The one exit of a sequence, whatever the reason. Its blocks are free for the next plan.

        A step in flight may still write to those blocks: the ranks run plans in order, so whoever gets them in
        a later plan writes after it. A second call does nothing.
        """
        if sequence.state is SequenceState.FINISHED:
            return
        if sequence.state is SequenceState.RUNNING:
            del self._running[sequence.sequence_id]
            self._kv.release(sequence.sequence_id)
        else:
            self._waiting.remove(sequence)
        sequence.state = SequenceState.FINISHED
        if sequence.is_on_ranks:
            self._releases.append(sequence.sequence_id)

    def plan(self, now_s: float) -> StepPlan | None:
        """The next step, or `None` where there is nothing to send now.

        A plan may hold releases alone: the ranks then compute nothing.
        """
        chunks, victims = self._choose_running()
        for victim in victims:
            self._preempt(victim)
        for sequence, num_tokens in chunks:
            self._grow(sequence, sequence.num_computed_tokens + num_tokens)
        if not victims:
            chunks += self._admit(self._limits.max_batch_tokens - sum(num_tokens for _, num_tokens in chunks))
        if not chunks and not self._releases:
            return None
        return self._emit(chunks, now_s)

    def commit(self, result: StepResult, now_s: float) -> list[Outcome]:
        """Take in the result of the oldest step in flight.

        A token of a sequence that has finished since is dropped.

        Raises:
            StepMismatchError: the result is of another step. Nothing has changed.
        """
        if not self._in_flight or self._in_flight[0].step_id != result.step_id:
            raise StepMismatchError(f"step {result.step_id} is not the one due")
        results = {part.sequence_id: part for part in result.sequences}
        outcomes = []
        for sequence in self._in_flight.popleft().sampled:
            sequence.num_in_flight_tokens -= 1
            if sequence.state is not SequenceState.FINISHED:
                outcomes.append(self._commit_token(sequence, results.get(sequence.sequence_id)))
        return outcomes

    def restart(self, generation: int) -> None:
        """The ranks were replaced: every sequence starts over from the tokens that were committed.

        Tokens in flight are lost and sampled again; sampling depends on the seed and the position alone, so they
        come out the same.
        """
        self._generation = generation
        self._next_step_id = 0
        self._in_flight.clear()
        self._releases.clear()
        for sequence in [*self._running.values()]:
            self._preempt(sequence)
        for sequence in self._waiting:
            sequence.num_in_flight_tokens = 0
            sequence.is_on_ranks = False

    def _choose_running(self) -> tuple[list[Chunk], list[Sequence]]:
        """The chunks of the running sequences, and the victims that must make room for them.

        Decided on counts alone; nothing changes, so there is nothing to undo.
        """
        chunks: list[Chunk] = []
        victims: list[Sequence] = []
        num_tokens_left = self._limits.max_batch_tokens
        num_free_blocks = self._kv.num_free_blocks
        candidates = dict(self._running)  # those that may still be preempted
        for sequence in self._running.values():
            num_tokens = min(sequence.num_pending_tokens, num_tokens_left)
            if num_tokens == 0 or sequence.sequence_id not in candidates:
                continue
            num_missing = self._kv.num_missing_blocks(sequence.sequence_id, sequence.num_computed_tokens + num_tokens)
            while num_missing > num_free_blocks and sequence.sequence_id in candidates:
                victim = max(candidates.values(), key=self._policy.victim_key)
                del candidates[victim.sequence_id]
                victims.append(victim)
                num_free_blocks += self._kv.num_owned_blocks(victim.sequence_id)
            if sequence.sequence_id not in candidates:
                continue  # it gave way itself
            del candidates[sequence.sequence_id]
            chunks.append((sequence, num_tokens))
            num_free_blocks -= num_missing
            num_tokens_left -= num_tokens
        return chunks, victims

    def _admit(self, num_tokens_left: int) -> list[Chunk]:
        """Let waiting sequences in, in order, as long as the whole of what each one knows fits the free blocks.

        Strictly in order: the first that does not fit holds up those behind it, or it might never fit.
        """
        chunks: list[Chunk] = []
        while num_tokens_left > 0 and len(self._running) < self._limits.max_num_sequences:
            sequence = self._waiting.peek()
            if sequence is None or sequence.num_in_flight_tokens > 0:
                break
            num_missing = self._kv.num_missing_blocks(sequence.sequence_id, sequence.num_pending_tokens)
            if num_missing > self._kv.num_free_blocks:
                break
            self._waiting.pop()
            sequence.state = SequenceState.RUNNING
            self._running[sequence.sequence_id] = sequence
            self._grow(sequence, sequence.num_pending_tokens)
            num_tokens = min(sequence.num_pending_tokens, num_tokens_left)
            chunks.append((sequence, num_tokens))
            num_tokens_left -= num_tokens
        return chunks

    def _grow(self, sequence: Sequence, num_tokens: int) -> None:
        self._kv.grow(sequence.sequence_id, sequence.request_class, num_tokens)

    def _preempt(self, sequence: Sequence) -> None:
        """Take all KV of a running sequence; it waits again, to be computed anew from its first token."""
        del self._running[sequence.sequence_id]
        self._kv.release(sequence.sequence_id)
        sequence.num_computed_tokens = 0
        sequence.state = SequenceState.WAITING
        self._waiting.push(sequence)

    def _emit(self, chunks: list[Chunk], now_s: float) -> StepPlan:
        """Write the decision down as the message that the ranks get, and count it as done."""
        steps, new_sequences, sampled = [], [], []
        for sequence, num_tokens in chunks:
            if not sequence.is_on_ranks:
                new_sequences.append(
                    NewSequence(
                        sequence.sequence_id,
                        sequence.known_token_ids(),
                        sequence.max_total_tokens,
                        sequence.sampling,
                    )
                )
                sequence.is_on_ranks = True
            if sequence.first_scheduled_s is None:
                sequence.first_scheduled_s = now_s
            first_changed_index, entries = self._kv.take_changes(sequence.sequence_id)
            steps.append(
                SequenceStep(
                    sequence.sequence_id,
                    sequence.num_computed_tokens,
                    num_tokens,
                    first_changed_index,
                    entries,
                )
            )
            sequence.num_computed_tokens += num_tokens
            if sequence.num_computed_tokens == sequence.num_known_tokens:
                sequence.num_in_flight_tokens += 1
                sampled.append(sequence)
        plan = StepPlan(self._generation, self._next_step_id, steps, new_sequences, self._releases)
        self._in_flight.append(_StepInFlight(plan.step_id, sampled))
        self._next_step_id += 1
        self._releases = []
        return plan

    def _commit_token(self, sequence: Sequence, result: SequenceResult | None) -> Outcome:
        if result is None or result.token_id is None:
            self.finish(sequence)
            fault = result.fault if result else None
            return Outcome(sequence, fault=fault or "the step gave no token")
        sequence.output_token_ids.append(result.token_id)
        finish_reason = None
        if len(sequence.output_token_ids) == sequence.max_new_tokens:
            finish_reason = FinishReason.LENGTH  # before EOS: TGI's precedence
        elif result.token_id in sequence.eos_token_ids:
            finish_reason = FinishReason.EOS_TOKEN
        if finish_reason is not None:
            self.finish(sequence)
        return Outcome(sequence, result.token_id, result.logprob, finish_reason)
