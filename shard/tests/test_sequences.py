"""A plan that contradicts what the rank knows is refused; tokens stay where they were put."""

from __future__ import annotations

import re

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from bros_shard.protocol import HostCopy, NewSequence, SamplingParams, SequenceStep, StepPlan, TailMove
from bros_shard.sequences import PlanError, SequenceTable, TokenPool

CPU = torch.device("cpu")


def new(sequence_id: int, num_tokens: int = 20, max_total_tokens: int = 40, token: int = 1) -> NewSequence:
    return NewSequence(sequence_id, [token] * num_tokens, max_total_tokens, SamplingParams())


def make_table() -> SequenceTable:
    """A table that knows sequence 0: 20 tokens of at most 40, in blocks 3 and (reversed) 5."""
    table = SequenceTable(TokenPool(CPU), vocab_size=100, max_length=64, num_blocks=8, block_size=16, num_adapters=2)
    steps = [SequenceStep(0, 0, 20, 0, [3, ~5])]
    (run,) = table.apply(StepPlan(0, 0, new_sequences=[new(0)], sequences=steps))
    assert run.sequence.block_table.tolist() == [3, ~5]
    return table


@pytest.mark.parametrize(
    ("plan", "message"),
    [
        ({"releases": [1]}, "sequence 1 is released but not known"),
        ({"releases": [0, 0]}, "sequence 0 is released but not known"),
        ({"new_sequences": [new(0)]}, "sequence 0 is new but known"),
        ({"new_sequences": [new(1, 41, 40)]}, "sequence 1: 41 tokens of at most 40, the model takes 64"),
        ({"new_sequences": [new(1, 20, 65)]}, "sequence 1: 20 tokens of at most 65, the model takes 64"),
        ({"new_sequences": [new(1, token=100)]}, "sequence 1 has a token outside the vocabulary"),
        (
            {"new_sequences": [NewSequence(1, [1], 9, SamplingParams(logit_bias=[(3, 1.0), (100, 1.0)]))]},
            "sequence 1 has a token outside the vocabulary",
        ),
        ({"new_sequences": [NewSequence(1, [1], 9, SamplingParams(), 1)]}, "sequence 1 has no prompt"),
        (
            {"new_sequences": [NewSequence(1, [1], 9, SamplingParams(), adapter=2)]},
            "sequence 1: adapter 2 of 2",
        ),
        ({"sequences": [SequenceStep(1, 0, 1, 0, [1])]}, "sequence 1 is not known"),
        ({"releases": [0], "sequences": [SequenceStep(0, 0, 20, 2, [])]}, "sequence 0 is not known"),
        ({"sequences": [SequenceStep(0, 0, 1, 2, [])] * 2}, "a sequence stands twice in a step"),
        ({"sequences": [SequenceStep(0, 0, 1, 3, [1])]}, "its block table would have a hole"),
        ({"sequences": [SequenceStep(0, 0, 1, 2, [8])]}, "block 8 of 8"),
        ({"sequences": [SequenceStep(0, 0, 1, 2, [~8])]}, "block 8 of 8"),
        ({"sequences": [SequenceStep(0, 19, 2, 2, [])]}, "sequence 0: 21 tokens planned, 20 known"),
        ({"sequences": [SequenceStep(0, 0, 20, 1, [])]}, "20 tokens planned beyond its block table"),
        ({"sequences": [SequenceStep(0, 19, 1, 2, [], 13)]}, "33 tokens planned beyond its block table"),
        ({"sequences": [SequenceStep(0, 17, 1, 2, [], 0, 1)]}, "sequence 0: 2 tokens confirmed of 1"),
        (
            {
                "new_sequences": [NewSequence(1, [1], 9, SamplingParams(), grammar="{}")],
                "sequences": [SequenceStep(1, 0, 1, 0, [1], 2)],
            },
            "sequence 1 has a grammar: its tokens are not guessed",
        ),
        (
            {
                "new_sequences": [new(1, 20, 20)],
                "sequences": [SequenceStep(1, 0, 20, 0, [1, 2])],
            },
            "sequence 1 has all its 20 tokens already",
        ),
    ],
)
def test_contradictions_are_refused(plan: dict, message: str) -> None:  # type: ignore[type-arg]
    with pytest.raises(PlanError, match=re.escape(message)):
        make_table().apply(StepPlan(0, 1, **plan))


def test_a_run_begins_behind_the_guesses_that_were_right() -> None:
    table = make_table()  # 20 tokens are known, of at most 40

    def start(step: SequenceStep) -> tuple[int, int]:
        (run,) = table.apply(StepPlan(0, 1, sequences=[step]))
        assert run.num_tokens == 1
        return run.start, run.max_guesses

    assert start(SequenceStep(0, 19, 1, 2, [], 4, 0)) == (19, 4)
    assert start(SequenceStep(0, 17, 1, 2, [], 4, 2)) == (19, 4)
    assert start(SequenceStep(0, 19, 1, 2, [], 4, 2)) == (19, 4)
    run = table.apply(StepPlan(0, 1, sequences=[SequenceStep(0, 19, 1, 2, [6])]))[0]
    run.sequence.num_known_tokens = 38
    assert start(SequenceStep(0, 36, 1, 3, [], 4, 3)) == (37, 1)  # the last token of all is never computed
    run.sequence.num_known_tokens = 40
    assert start(SequenceStep(0, 36, 1, 3, [], 4, 3)) == (38, 0)  # all are known: for nobody


@pytest.mark.parametrize(
    ("moves", "copies", "message"),
    [
        ([TailMove(8, 1, 1)], [], "block 8 of 8"),
        ([TailMove(1, ~8, 1)], [], "block 8 of 8"),
        ([TailMove(1, 2, 17)], [], "17 tokens copied of a block of 16"),
        ([], [HostCopy(8, 0, 1)], "block 8 of 8"),
        ([], [HostCopy(0, 4, 1)], "host block 4 of 4"),
        ([], [HostCopy(0, 3, 17)], "17 tokens copied of a block of 16"),
    ],
)
def test_impossible_copies_are_refused(moves: list[TailMove], copies: list[HostCopy], message: str) -> None:
    table = make_table()
    table.check_copies([TailMove(7, ~0, 16)], [HostCopy(~7, 3, 16)], num_host_blocks=4)
    with pytest.raises(PlanError, match=message):
        table.check_copies(moves, copies, num_host_blocks=4)


def test_block_tables_travel_as_differences() -> None:
    table = make_table()

    def apply(first_changed: int, entries: list[int]) -> list[int]:
        step = SequenceStep(0, 0, 1, first_changed, entries)
        return table.apply(StepPlan(0, 1, sequences=[step]))[0].sequence.block_table.tolist()

    assert apply(2, []) == [3, ~5]
    assert apply(1, [6]) == [3, 6]
    assert apply(2, [~1, 2]) == [3, 6, ~1, 2]
    assert apply(1, []) == [3]
    assert apply(0, [~0]) == [~0]


def test_a_released_id_may_come_back() -> None:
    table = make_table()
    table.apply(StepPlan(0, 1, releases=[0], new_sequences=[new(0)]))
    assert len(table) == 1
    table.apply(StepPlan(0, 2, releases=[0]))
    assert len(table) == 0


@settings(deadline=None, max_examples=30)
@given(st.lists(st.tuples(st.integers(1, 60), st.integers(0, 3000)), min_size=1, max_size=40), st.data())
def test_token_pool_keeps_every_sequence_apart(sizes: list[tuple[int, int]], data: st.DataObject) -> None:
    pool = TokenPool(CPU)
    live: dict[int, list[int]] = {}
    for index, (num_tokens, num_more) in enumerate(sizes):
        token_ids = list(range(index, index + num_tokens))
        live[pool.add(token_ids, num_tokens + num_more + 1)] = token_ids
        if data.draw(st.booleans()):
            row = data.draw(st.sampled_from(sorted(live)))
            pool.write(torch.tensor([row]), torch.tensor([len(live[row])]), torch.tensor([7]))
            live[row].append(7)
        if len(live) > 1 and data.draw(st.booleans()):
            row = data.draw(st.sampled_from(sorted(live)))
            pool.release(row)
            del live[row]
        for row, expected in live.items():
            columns = torch.arange(len(expected))
            assert pool.read(torch.full_like(columns, row), columns).tolist() == expected
            assert pool.read_rows(torch.tensor([row]), len(expected)).tolist() == [expected]
