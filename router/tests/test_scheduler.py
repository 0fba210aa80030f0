"""The scheduler against simulated ranks that keep every slot's content and trust nothing."""

import os
from collections import deque

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    Bundle,
    RuleBasedStateMachine,
    consumes,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from bros_router.kv.block_hasher import BlockHasher
from bros_router.kv.kv_manager import KVManager, Preemption
from bros_router.request import FinishReason, RequestClass
from bros_router.scheduling.batch_cap import CapControl
from bros_router.scheduling.policies.bros import BrosOptions
from bros_router.scheduling.policies.ordered import FirstComeFirstServed
from bros_router.scheduling.policies.registry import POLICY_NAMES, PolicyOptions, make_policy, preemption_of
from bros_router.scheduling.scheduler import Scheduler, StepMismatchError
from bros_router.scheduling.sequence import Sequence, SequenceState
from bros_router.scheduling.speculation import Speculation
from bros_router.scheduling.step_draft import SchedulerLimits
from bros_shard.protocol import SampledToken, SequenceResult, StepPlan, StepResult
from simulated_ranks import VOCAB_SIZE, ExactModel, SimulatedRanks, expected_output, make_sequence, shapes


def make_scheduler(
    num_blocks: int = 8, block_size: int = 4, max_batch_tokens: int = 8, max_num_sequences: int = 4
) -> tuple[Scheduler, KVManager]:
    kv = KVManager(num_blocks, block_size)
    limits = SchedulerLimits(max_batch_tokens, max_num_sequences)
    return Scheduler(FirstComeFirstServed(), kv, ExactModel(), limits), kv


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
    assert outcome.fault == "the step gave no token, or too many"


def test_more_tokens_than_were_allowed_are_a_fault():
    scheduler, kv = make_scheduler()
    scheduler.add(make_sequence(0, 2, 3))
    scheduler.plan(0.0)
    part = SequenceResult(0, [SampledToken(1), SampledToken(2)])
    (outcome,) = scheduler.commit(StepResult(0, 0, [part], 0.0, 0.0, 0.0, 0.0), 0.0)
    assert outcome.fault == "the step gave no token, or too many"
    assert kv.num_free_blocks == kv.num_blocks


def test_result_of_another_step_is_refused():
    scheduler, _ = make_scheduler()
    scheduler.add(make_sequence(0, 2, 3))
    scheduler.plan(0.0)
    with pytest.raises(StepMismatchError):
        scheduler.commit(StepResult(0, 5, [], 0.0, 0.0, 0.0, 0.0), 0.0)


# --- properties --------------------------------------------------------------------------------------------


class SchedulerMachine(RuleBasedStateMachine):
    """Arrivals, steps, delays, aborts and restarts in any order, with up to two steps in flight."""

    policy_name = "bros"
    options = PolicyOptions()
    num_host_blocks = 5
    max_batch_tokens = 9
    has_cache = False
    most_guesses = 0
    sequences = Bundle("sequences")

    def __init__(self) -> None:
        super().__init__()
        preemption = preemption_of(self.policy_name, self.options)
        self.kv = KVManager(7, 4, self.num_host_blocks, preemption)
        limits = SchedulerLimits(self.max_batch_tokens, max_num_sequences=5, can_interrupt=True)
        model = ExactModel()
        policy = make_policy(self.policy_name, model, limits, self.options)
        hasher = BlockHasher(4, b"salt") if self.has_cache else None
        speculation = Speculation(self.most_guesses) if self.most_guesses else None
        self.scheduler = Scheduler(policy, self.kv, model, limits, hasher=hasher, speculation=speculation)
        self.ranks = self.make_ranks(0)
        #: Plans that have not begun; results that are to come, of steps and of what interrupts them.
        self.sent: deque[StepPlan] = deque()
        self.results: deque[StepResult] = deque()
        self.interruptions: list[StepResult] = []
        #: The step that may run still, and what interrupted it.
        self.running: list[StepPlan] = []
        self.alive: dict[int, Sequence] = {}
        self.received: dict[int, list[int]] = {}
        self.num_sequences = 0
        self.now_s = 0.0

    def make_ranks(self, generation):
        return SimulatedRanks(4, generation, self.num_host_blocks, is_shared=self.has_cache)

    @rule(
        target=sequences,
        num_prompt_tokens=st.integers(1, 16),
        max_new_tokens=st.integers(1, 12),
        request_class=st.sampled_from(RequestClass),
        eos=st.frozensets(st.integers(0, VOCAB_SIZE - 1), max_size=6),
        ttft_s=st.sampled_from([0.03, 0.1, 1.0]),
        are_given=st.booleans(),
        family=st.sampled_from([0, 1, None]),
        adapter=st.sampled_from([None, 0, 1]),
    )
    def add(self, num_prompt_tokens, max_new_tokens, request_class, eos, ttft_s, are_given, family=0, adapter=None):
        sequence = make_sequence(
            self.num_sequences,
            num_prompt_tokens,
            max_new_tokens,
            request_class=request_class,
            eos_token_ids=eos,
            arrival_s=self.now_s,
            ttft_s=ttft_s,
            tpot_s=0.03,
            are_given=are_given,
            family=family,
            adapter=adapter,
        )
        sequence.block_hashes = self.scheduler.block_hashes(sequence.prompt_token_ids, adapter)
        sequence.num_cached_tokens = self.kv.num_cached_tokens(sequence.block_hashes or ())
        self.num_sequences += 1
        self.alive[sequence.sequence_id] = sequence
        self.scheduler.add(sequence)
        self.interrupt()  # as the engine does, whatever comes
        return sequence

    @rule(seconds=st.sampled_from([0.001, 0.01, 0.05, 40.0]))
    def wait(self, seconds):
        self.now_s += seconds

    @precondition(lambda self: len(self.sent) + len(self.results) < 2)
    @rule()
    def plan(self):
        plan = self.scheduler.plan(self.now_s)
        if plan is not None:
            num_tokens = sum(step.num_tokens + step.max_speculative_tokens for step in plan.sequences)
            assert num_tokens <= self.max_batch_tokens
            assert len(plan.sequences) <= 5
            self.sent.append(plan)

    @precondition(lambda self: self.sent)
    @rule()
    def begin(self):
        """The ranks have done all that came before, though its result may still be on its way."""
        plan = self.sent.popleft()
        self.results.append(self.ranks.execute(plan))
        self.running = [plan]

    @precondition(lambda self: len(self.sent) + len(self.results) < 2)
    @rule(num_prompt_tokens=st.integers(1, 9), max_new_tokens=st.integers(1, 3), num_gone=st.integers(0, 2))
    def urgent_arrival(self, num_prompt_tokens, max_new_tokens, num_gone):
        """A step was sent, some of its clients go, and a request comes that cannot wait for its end."""
        self.plan()
        for sequence in [*self.alive.values()][:num_gone]:
            self.abort(sequence)
        self.add(num_prompt_tokens, max_new_tokens, RequestClass.RT, frozenset(), ttft_s=0.03, are_given=False)

    def interrupt(self):
        plan = self.scheduler.interrupt(self.now_s)
        if plan is not None:
            assert self.sent or self.results, "there is nothing to interrupt"
            assert len(self.interruptions) < 4
            assert sum(step.num_tokens for step in plan.sequences) <= self.max_batch_tokens
            self.interruptions.append(self.ranks.execute_within(plan, *self.running))
            self.running.append(plan)

    @rule(num_steps=st.integers(1, 4))
    def run_ahead(self, num_steps):
        """As the engine does while nothing comes: the next step is planned before the result of the one that runs."""
        for _ in range(num_steps):
            self.plan_if_due()
            if self.sent and not self.results and not self.interruptions:
                self.begin()
                self.plan_if_due()
                self.commit()

    def plan_if_due(self):
        if len(self.sent) + len(self.results) < 2:
            self.plan()

    # What was sent before the interruption may end before it, if that came late; what was sent after it cannot.
    @precondition(
        lambda self: self.results and all(self.results[0].step_id < result.step_id for result in self.interruptions)
    )
    @rule(late_s=st.sampled_from([0.0, 0.02]))
    def commit(self, late_s=0.0):
        self.now_s += 0.012 + late_s
        self.take(self.results.popleft())

    # One that is in the middle of another ends first, unless it came too late.
    @precondition(lambda self: self.interruptions)
    @rule(is_last=st.booleans())
    def commit_interruption(self, is_last=True):
        self.now_s += 0.005
        self.take(self.interruptions.pop(-1 if is_last else 0))

    def take(self, result):
        self.running = [plan for plan in self.running if plan.step_id != result.step_id]
        for outcome in self.scheduler.commit(result, self.now_s):
            sequence = outcome.sequence
            tokens, reason = expected_output(sequence)
            assert outcome.fault is None
            received = self.received.setdefault(sequence.sequence_id, [])
            received.append(outcome.token_id)
            assert received == tokens[: len(received)]
            assert outcome.finish_reason == (reason if len(received) == len(tokens) else None)
            if outcome.finish_reason is not None:
                assert sequence.output_token_ids == tokens
                del self.alive[sequence.sequence_id]  # fails if a sequence ends twice
        self.interrupt()

    @rule(sequence=consumes(sequences))
    def abort(self, sequence):
        self.scheduler.finish(sequence)
        self.alive.pop(sequence.sequence_id, None)

    @rule()
    def restart(self):
        generation = self.ranks.generation + 1
        self.ranks = self.make_ranks(generation)
        self.sent.clear()
        self.results.clear()
        self.running.clear()
        self.interruptions.clear()
        self.scheduler.restart(generation)

    @invariant()
    def books_balance(self):
        self.kv.check_integrity()
        assert self.scheduler.num_waiting + self.scheduler.num_running == len(self.alive)
        for request_class, counts in self.scheduler.num_sequences().items():
            states = [sequence.state for sequence in self.alive.values() if sequence.request_class is request_class]
            assert counts == (states.count(SequenceState.RUNNING), states.count(SequenceState.WAITING))

    def teardown(self):
        num_steps = 0
        while self.alive or self.sent or self.results or self.interruptions:
            while self.interruptions:
                self.commit_interruption()
            self.plan_if_due()
            assert self.sent or self.results or self.interruptions, "sequences wait and nothing runs"
            if self.sent and not self.results:
                self.begin()
                self.plan_if_due()
            if self.results and not self.interruptions:
                self.commit()
            num_steps += 1
            assert num_steps < 2000, "a sequence starves"
        self.plan()
        if self.sent:
            self.begin()
        assert self.kv.num_free_blocks == self.kv.num_blocks
        assert self.ranks.tokens == {}, "a sequence was never released"


_machine_settings = settings(
    max_examples=int(os.environ.get("BROS_HYPOTHESIS_EXAMPLES", "30")),
    stateful_step_count=60,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow],
)
_MACHINES = [
    *((name, Preemption.BIDIR, 5, 9, BrosOptions()) for name in POLICY_NAMES),
    ("bros", Preemption.BIDIR, 1, 9, BrosOptions()),
    ("bros", Preemption.BIDIR, 0, 9, BrosOptions()),
    ("bros", Preemption.BLOCK, 5, 9, BrosOptions()),
    ("bros", Preemption.RECOMPUTE, 5, 9, BrosOptions()),
    ("bros", Preemption.BIDIR, 5, 3, BrosOptions()),  # fewer tokens than sequences
    ("bros", Preemption.BIDIR, 2, 9, BrosOptions(checkpoints=True, cap_control=CapControl.AIMD)),
    ("fcfs", Preemption.BIDIR, 5, 3, BrosOptions()),
]


@pytest.mark.parametrize(("has_cache", "most_guesses"), [(False, 0), (True, 0), (True, 5)])
@pytest.mark.parametrize(("name", "preemption", "num_host_blocks", "max_batch_tokens", "bros"), _MACHINES)
def test_nothing_is_lost_whatever_comes(
    name, preemption, num_host_blocks, max_batch_tokens, bros, has_cache, most_guesses
):
    """Every sequence ends once with its own tokens, every slot read is what its owner wrote, and memory comes back."""
    attributes = {
        "policy_name": name,
        "options": PolicyOptions(preemption=preemption, bros=bros),
        "num_host_blocks": num_host_blocks,
        "max_batch_tokens": max_batch_tokens,
        "has_cache": has_cache,
        "most_guesses": most_guesses,
    }
    run_state_machine_as_test(type("Machine", (SchedulerMachine,), attributes), settings=_machine_settings)
