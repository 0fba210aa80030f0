"""Guesses are allowed where they are predicted to pay, and cost nobody else anything."""

import math

import pytest

from bros_router.kv.kv_manager import KVManager
from bros_router.scheduling.policies.ordered import FirstComeFirstServed
from bros_router.scheduling.scheduler import Scheduler
from bros_router.scheduling.speculation import GuessRecord, Speculation
from bros_router.scheduling.step_draft import SchedulerLimits
from bros_shard.protocol import SequenceResult
from simulated_ranks import ExactModel, SimulatedRanks, make_sequence


class Bench:
    """Sequences that decode, and what the next step allows to guess for each."""

    def __init__(
        self,
        num_sequences: int,
        *,
        most: int = 4,
        max_batch_tokens: int = 64,
        max_new_tokens: int = 30,
        **model: float,
    ) -> None:
        self.kv = KVManager(64, 4)
        self.model = ExactModel(**model)
        self.policy = FirstComeFirstServed()
        limits = SchedulerLimits(max_batch_tokens, 64)
        self.scheduler = Scheduler(self.policy, self.kv, self.model, limits, speculation=Speculation(most))
        self.ranks = SimulatedRanks(4)
        self.sequences = [make_sequence(number, 5, max_new_tokens) for number in range(num_sequences)]
        for sequence in self.sequences:
            self.scheduler.add(sequence)
        plan = self.scheduler.plan(0.0)
        assert [step.max_speculative_tokens for step in plan.sequences] == [0] * num_sequences, (
            "a prompt is not guessed"
        )
        self.scheduler.commit(self.ranks.execute(plan), 0.0)

    def allowed(self) -> list[int]:
        return [step.max_speculative_tokens for step in self.scheduler.plan(0.0).sequences]


def test_a_step_that_waits_for_memory_guesses_as_much_as_it_may():
    assert Bench(3, floor_s=1.0, token_s=0.001).allowed() == [4, 4, 4]


def test_a_step_whose_time_is_its_tokens_guesses_nothing():
    assert Bench(3, floor_s=0.0, token_s=0.001).allowed() == [0, 0, 0]


def test_each_guess_must_bring_more_than_the_step_does_without_it():
    # A token takes a third of what the step takes without it. With a chance of 0.7 the first is worth it (1.7 tokens in
    # 4 rather than 1 in 3) and the second too (2.19 in 5), but not the third (2.53 in 6).
    assert Bench(1, floor_s=2.0, token_s=1.0).allowed() == [2]


def test_whose_guesses_were_right_comes_first_and_whose_were_wrong_gets_none():
    bench = Bench(3, floor_s=2.0, token_s=1.0)
    for sequence, share in zip(bench.sequences, (0.3, 1.0, 0.9), strict=True):
        sequence.guesses.share = share
    # Three tokens in 5, then seven in 9, then 8.71 in 11; one more that is right seven times in ten is not worth it.
    assert bench.allowed() == [0, 4, 2]


def test_guesses_stay_within_the_token_budget():
    bench = Bench(2, most=12, max_batch_tokens=16, floor_s=1.0, token_s=0.001)
    assert bench.allowed() == [12, 2]


def test_guesses_take_memory_from_nobody():
    bench = Bench(1, floor_s=1.0, token_s=0.001)
    assert bench.kv.num_owned_blocks(0) == 2  # five of eight slots hold the prompt, the sixth is for the first token
    bench.kv.grow(99, bench.sequences[0].request_class, 62 * 4)
    assert bench.allowed() == [2]


def test_no_more_is_guessed_than_the_reply_may_have():
    bench = Bench(1, most=16, max_new_tokens=9, floor_s=1.0, token_s=0.001)
    # Of 14 tokens the last is never computed; five are, the next one will be, and seven are left.
    assert bench.allowed() == [7]


@pytest.mark.parametrize(("latest_end_s", "expected"), [(math.inf, [4]), (1.0035, [2]), (0.5, [0])])
def test_a_step_with_guesses_ends_when_its_decodes_need_it(latest_end_s, expected):
    bench = Bench(1, floor_s=1.0, token_s=0.001)
    compose = bench.policy.compose

    def compose_with_deadline(draft):
        compose(draft)
        draft.latest_end_s = latest_end_s

    bench.policy.compose = compose_with_deadline
    assert bench.allowed() == expected


def test_chance_of_a_guess_follows_those_before_it_and_is_forgotten():
    record = GuessRecord()
    first = record.share
    record.note(4, 4)
    assert record.share > first
    assert record.num_expected(8) == 4
    record.note(4, 0)
    record.note(0, 0)
    after_a_miss = record.share
    assert after_a_miss < first
    assert record.num_expected(8) == 0
    for _ in range(2000):
        record.pass_by()
    assert record.share == pytest.approx(first, abs=1e-3)
    # Guesses behind the first wrong one say nothing.
    one, four = GuessRecord(), GuessRecord()
    one.note(1, 0)
    four.note(4, 0)
    assert one.share == four.share


def test_predicted_time_counts_the_guesses_that_are_expected():
    bench = Bench(1, floor_s=1.0, token_s=0.25)
    bench.sequences[0].guesses.num_last = 1
    bench.scheduler.plan(0.0)
    step = bench.scheduler.last_step
    assert step.predicted_s == 1.5
    assert step.shape_with({0: SequenceResult(0, num_speculative_tokens=3)}).num_prefill_tokens == 4
    assert step.shape_with({0: SequenceResult(0)}).num_decode_sequences == 1
