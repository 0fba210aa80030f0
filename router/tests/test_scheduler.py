"""The scheduler against simulated ranks that keep every slot's content and trust nothing."""

import os
from collections import deque

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, invariant, precondition, rule

from bros_router.kv.kv_manager import KVManager
from bros_router.request import FinishReason, RequestClass
from bros_router.scheduling.policies import FirstComeFirstServed
from bros_router.scheduling.scheduler import Scheduler, SchedulerLimits, StepMismatchError
from bros_router.scheduling.sequence import Sequence, SequenceState
from bros_shard.block_layout import slots_of
from bros_shard.protocol import SamplingParams, SequenceResult, StepPlan, StepResult

VOCAB_SIZE = 50


def sampled_token(seed: int, position: int) -> int:
    """What the simulated model says: a function of the seed and the position alone, as the real sampler's."""
    return (seed * 7919 + position * 104729) % VOCAB_SIZE


class SimulatedRanks:
    """Executes plans on a KV region whose slots remember which token of which sequence they hold."""

    def __init__(self, block_size: int, generation: int = 0) -> None:
        self.block_size = block_size
        self.generation = generation
        self.next_step_id = 0
        self.tokens: dict[int, list[int]] = {}
        self.seeds: dict[int, int] = {}
        self.capacities: dict[int, int] = {}
        self.tables: dict[int, list[int]] = {}
        self.slots: dict[int, tuple[int, int]] = {}

    def execute(self, plan: StepPlan) -> StepResult:
        assert (plan.generation, plan.step_id) == (self.generation, self.next_step_id)
        self.next_step_id += 1
        for sequence_id in plan.releases:
            for state in (self.tokens, self.seeds, self.capacities, self.tables):
                del state[sequence_id]
        for new in plan.new_sequences:
            assert new.sequence_id not in self.tokens
            self.tokens[new.sequence_id] = list(new.token_ids)
            self.seeds[new.sequence_id] = new.sampling.seed
            self.capacities[new.sequence_id] = new.max_total_tokens
            self.tables[new.sequence_id] = []
        assert len({step.sequence_id for step in plan.sequences}) == len(plan.sequences)
        results = [self._run(step) for step in plan.sequences]
        return StepResult(self.generation, plan.step_id, results, 0.0, 0.0, 0.0, 0.0)

    def _run(self, step) -> SequenceResult:
        sequence_id, table = step.sequence_id, self.tables[step.sequence_id]
        assert step.first_changed_index <= len(table)
        table[step.first_changed_index :] = step.entries
        tokens = self.tokens[sequence_id]
        stop = step.num_computed_tokens + step.num_tokens
        assert stop <= len(tokens), "a token is to be computed that nobody knows"
        slots = slots_of(table, 0, stop, self.block_size)
        for position in range(step.num_computed_tokens, stop):
            self.slots[slots[position]] = (sequence_id, position)
        # Attention reads the whole context: every slot must still hold what this sequence put there.
        assert [self.slots.get(slot) for slot in slots] == [(sequence_id, p) for p in range(stop)]
        if stop < len(tokens):
            return SequenceResult(sequence_id)
        assert len(tokens) < self.capacities[sequence_id]
        tokens.append(sampled_token(self.seeds[sequence_id], len(tokens)))
        return SequenceResult(sequence_id, tokens[-1], -1.0)


def make_scheduler(
    num_blocks: int = 8, block_size: int = 4, max_batch_tokens: int = 8, max_num_sequences: int = 4
) -> tuple[Scheduler, KVManager]:
    kv = KVManager(num_blocks, block_size)
    return Scheduler(FirstComeFirstServed(), kv, SchedulerLimits(max_batch_tokens, max_num_sequences)), kv


def make_sequence(
    sequence_id: int,
    num_prompt_tokens: int,
    max_new_tokens: int,
    *,
    request_class: RequestClass = RequestClass.RT,
    eos_token_ids: frozenset[int] = frozenset(),
    arrival_s: float | None = None,
) -> Sequence:
    return Sequence(
        sequence_id,
        request_class,
        tuple((sequence_id + i) % VOCAB_SIZE for i in range(num_prompt_tokens)),
        SamplingParams(seed=sequence_id),
        max_new_tokens,
        eos_token_ids,
        float(sequence_id) if arrival_s is None else arrival_s,
    )


def expected_output(sequence: Sequence) -> tuple[list[int], FinishReason]:
    tokens: list[int] = []
    while True:
        tokens.append(sampled_token(sequence.sequence_id, sequence.num_prompt_tokens + len(tokens)))
        if len(tokens) == sequence.max_new_tokens:
            return tokens, FinishReason.LENGTH
        if tokens[-1] in sequence.eos_token_ids:
            return tokens, FinishReason.EOS_TOKEN


def shapes(plan: StepPlan) -> list[tuple[int, int, int]]:
    return [(s.sequence_id, s.num_computed_tokens, s.num_tokens) for s in plan.sequences]


# --- tables ------------------------------------------------------------------------------------------------


def test_prompt_is_chunked_and_mixed_with_decodes_within_the_token_budget():
    scheduler, _ = make_scheduler(max_batch_tokens=6)
    ranks = SimulatedRanks(block_size=4)
    scheduler.add(make_sequence(0, num_prompt_tokens=3, max_new_tokens=4))
    scheduler.add(make_sequence(1, num_prompt_tokens=10, max_new_tokens=2))
    planned = []
    while (plan := scheduler.plan(0.0)) is not None:
        planned.append(shapes(plan))
        scheduler.commit(ranks.execute(plan), 0.0)
    assert planned == [
        [(0, 0, 3), (1, 0, 3)],
        [(0, 3, 1), (1, 3, 5)],
        [(0, 4, 1), (1, 8, 2)],
        [(0, 5, 1), (1, 10, 1)],
        [],  # the releases of both
    ]


def test_first_that_does_not_fit_holds_up_those_behind_it():
    scheduler, _ = make_scheduler(num_blocks=4, block_size=4, max_batch_tokens=64)
    scheduler.add(make_sequence(0, num_prompt_tokens=8, max_new_tokens=4))
    scheduler.add(make_sequence(1, num_prompt_tokens=12, max_new_tokens=4))
    scheduler.add(make_sequence(2, num_prompt_tokens=4, max_new_tokens=4))
    assert shapes(scheduler.plan(0.0)) == [(0, 0, 8)]


def test_num_sequences_is_capped():
    scheduler, _ = make_scheduler(max_num_sequences=2)
    for sequence_id in range(3):
        scheduler.add(make_sequence(sequence_id, 1, 2))
    assert shapes(scheduler.plan(0.0)) == [(0, 0, 1), (1, 0, 1)]


def test_last_arrival_is_preempted_and_recomputed_with_its_output():
    scheduler, _ = make_scheduler(num_blocks=2, block_size=4, max_batch_tokens=16)
    ranks = SimulatedRanks(block_size=4)
    first, last = make_sequence(0, 3, 5), make_sequence(1, 4, 3)
    scheduler.add(first)
    scheduler.add(last)
    planned = []
    while (plan := scheduler.plan(0.0)) is not None:
        planned.append(shapes(plan))
        scheduler.commit(ranks.execute(plan), 0.0)
    assert planned == [
        [(0, 0, 3), (1, 0, 4)],
        [(0, 3, 1)],  # sequence 1 needed a block, was the last to arrive, and gave way itself
        [(0, 4, 1)],
        [(0, 5, 1)],
        [(0, 6, 1)],
        [(1, 0, 5)],  # its prompt and the token it had made
        [(1, 5, 1)],
        [],
    ]
    assert first.output_token_ids == expected_output(first)[0]
    assert last.output_token_ids == expected_output(last)[0]


def test_blocks_of_the_whole_prompt_are_reserved_when_its_first_chunk_runs():
    scheduler, kv = make_scheduler(num_blocks=8, block_size=4, max_batch_tokens=8)
    scheduler.add(make_sequence(0, num_prompt_tokens=20, max_new_tokens=4))
    scheduler.add(make_sequence(1, num_prompt_tokens=16, max_new_tokens=4))
    assert shapes(scheduler.plan(0.0)) == [(0, 0, 8)]
    assert kv.num_free_blocks == 3


def test_preempted_sequence_waits_for_its_token_in_flight():
    """That token may be its last: computing the sequence anew before it is known could be for nothing."""
    scheduler, _ = make_scheduler(num_blocks=3, block_size=4, max_batch_tokens=16)
    ranks = SimulatedRanks(block_size=4)
    first, last = make_sequence(0, 7, 4), make_sequence(1, 4, 2)
    scheduler.add(first)
    scheduler.add(last)
    plans = [scheduler.plan(0.0), scheduler.plan(0.0)]
    assert shapes(plans[0]) == [(0, 0, 7), (1, 0, 4)]
    assert shapes(plans[1]) == [(0, 7, 1)]  # sequence 1 gave way with a token in flight
    results = [ranks.execute(plan) for plan in plans]
    scheduler.finish(first)
    assert scheduler.plan(0.0).sequences == []  # its blocks are free, but only the release is sent
    scheduler.commit(results[0], 0.0)
    assert shapes(scheduler.plan(0.0)) == [(1, 0, 5)]


def test_real_time_fills_forward_from_the_low_end_and_best_effort_reversed_from_the_high_end():
    scheduler, kv = make_scheduler(num_blocks=8, block_size=4, max_batch_tokens=64)
    scheduler.add(make_sequence(0, 6, 2, request_class=RequestClass.RT))
    scheduler.add(make_sequence(1, 9, 2, request_class=RequestClass.BE))
    plan = scheduler.plan(0.0)
    assert [step.entries for step in plan.sequences] == [[0, 1], [~7, ~6, ~5]]
    assert kv.num_used_blocks(RequestClass.RT) == 2
    assert kv.num_used_blocks(RequestClass.BE) == 3


def test_token_of_a_finished_sequence_is_dropped():
    scheduler, kv = make_scheduler()
    ranks = SimulatedRanks(block_size=4)
    sequence = make_sequence(0, 3, 4)
    scheduler.add(sequence)
    result = ranks.execute(scheduler.plan(0.0))
    scheduler.finish(sequence)
    assert kv.num_free_blocks == kv.num_blocks
    assert scheduler.commit(result, 0.0) == []
    assert scheduler.plan(0.0).releases == [0]
    assert scheduler.plan(0.0) is None


def test_finish_by_length_is_never_overrun_with_two_steps_in_flight():
    scheduler, _ = make_scheduler()
    ranks = SimulatedRanks(block_size=4)
    scheduler.add(make_sequence(0, 2, 2))
    first, second = scheduler.plan(0.0), scheduler.plan(0.0)
    assert shapes(first) + shapes(second) == [(0, 0, 2), (0, 2, 1)]
    assert scheduler.plan(0.0) is None
    assert [o.finish_reason for o in scheduler.commit(ranks.execute(first), 0.0)] == [None]
    assert [o.finish_reason for o in scheduler.commit(ranks.execute(second), 0.0)] == [FinishReason.LENGTH]


def test_end_of_sequence_at_the_limit_counts_as_length():
    scheduler, _ = make_scheduler()
    ranks = SimulatedRanks(block_size=4)
    sequence = make_sequence(0, 3, 1, eos_token_ids=frozenset(range(VOCAB_SIZE)))
    scheduler.add(sequence)
    (outcome,) = scheduler.commit(ranks.execute(scheduler.plan(0.0)), 0.0)
    assert outcome.finish_reason is FinishReason.LENGTH


def test_fault_ends_one_sequence_and_leaves_the_others():
    scheduler, kv = make_scheduler()
    ranks = SimulatedRanks(block_size=4)
    poisoned, healthy = make_sequence(0, 2, 3), make_sequence(1, 2, 3)
    scheduler.add(poisoned)
    scheduler.add(healthy)
    result = ranks.execute(scheduler.plan(0.0))
    parts = [SequenceResult(0, fault="logits are not finite"), result.sequences[1]]
    outcomes = scheduler.commit(StepResult(0, 0, parts, 0.0, 0.0, 0.0, 0.0), 0.0)
    assert [(o.sequence, o.fault) for o in outcomes] == [(poisoned, "logits are not finite"), (healthy, None)]
    assert poisoned.state is SequenceState.FINISHED
    kv.check_integrity()


def test_sequence_missing_from_the_result_is_a_fault_not_a_hang():
    scheduler, _ = make_scheduler()
    scheduler.add(make_sequence(0, 2, 3))
    scheduler.plan(0.0)
    (outcome,) = scheduler.commit(StepResult(0, 0, [], 0.0, 0.0, 0.0, 0.0), 0.0)
    assert outcome.fault == "the step gave no token"


def test_result_of_another_step_is_refused():
    scheduler, _ = make_scheduler()
    scheduler.add(make_sequence(0, 2, 3))
    scheduler.plan(0.0)
    with pytest.raises(StepMismatchError):
        scheduler.commit(StepResult(0, 5, [], 0.0, 0.0, 0.0, 0.0), 0.0)


# --- properties --------------------------------------------------------------------------------------------


class SchedulerMachine(RuleBasedStateMachine):
    """Arrivals, steps, aborts and restarts in any order, with up to two steps in flight."""

    sequences = Bundle("sequences")

    def __init__(self) -> None:
        super().__init__()
        self.scheduler, self.kv = make_scheduler(num_blocks=7, block_size=4, max_batch_tokens=9, max_num_sequences=5)
        self.ranks = SimulatedRanks(block_size=4)
        self.results: deque[StepResult] = deque()
        self.alive: dict[int, Sequence] = {}
        self.num_sequences = 0

    @rule(
        target=sequences,
        num_prompt_tokens=st.integers(1, 16),
        max_new_tokens=st.integers(1, 12),
        request_class=st.sampled_from(RequestClass),
        eos=st.frozensets(st.integers(0, VOCAB_SIZE - 1), max_size=6),
    )
    def add(self, num_prompt_tokens, max_new_tokens, request_class, eos):
        sequence = make_sequence(
            self.num_sequences, num_prompt_tokens, max_new_tokens, request_class=request_class, eos_token_ids=eos
        )
        self.num_sequences += 1
        self.alive[sequence.sequence_id] = sequence
        self.scheduler.add(sequence)
        return sequence

    @precondition(lambda self: len(self.results) < 2)
    @rule()
    def plan(self):
        plan = self.scheduler.plan(0.0)
        if plan is not None:
            assert sum(step.num_tokens for step in plan.sequences) <= 9
            assert self.scheduler.num_running <= 5
            self.results.append(self.ranks.execute(plan))

    @precondition(lambda self: self.results)
    @rule()
    def commit(self):
        for outcome in self.scheduler.commit(self.results.popleft(), 0.0):
            sequence = outcome.sequence
            tokens, reason = expected_output(sequence)
            assert outcome.fault is None
            assert sequence.output_token_ids == tokens[: len(sequence.output_token_ids)]
            assert outcome.finish_reason == (reason if len(sequence.output_token_ids) == len(tokens) else None)
            if outcome.finish_reason is not None:
                del self.alive[sequence.sequence_id]  # fails if a sequence ends twice

    @rule(sequence=consumes(sequences))
    def abort(self, sequence):
        self.scheduler.finish(sequence)
        self.alive.pop(sequence.sequence_id, None)

    @rule()
    def restart(self):
        self.ranks = SimulatedRanks(block_size=4, generation=self.ranks.generation + 1)
        self.results.clear()
        self.scheduler.restart(self.ranks.generation)

    @invariant()
    def books_balance(self):
        self.kv.check_integrity()
        assert self.scheduler.num_waiting + self.scheduler.num_running == len(self.alive)

    def teardown(self):
        num_steps = 0
        while self.alive or self.results:
            self.plan()
            assert self.results, "sequences wait and nothing runs"
            self.commit()
            num_steps += 1
            assert num_steps < 2000, "a sequence starves"
        self.plan()
        assert self.kv.num_free_blocks == self.kv.num_blocks
        assert self.ranks.tokens == {}, "a sequence was never released"


SchedulerMachine.TestCase.settings = settings(
    max_examples=int(os.environ.get("BROS_SCHEDULER_EXAMPLES", "150")),
    stateful_step_count=40,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow],
)
TestSchedulerMachine = SchedulerMachine.TestCase
