"""A step's tensors, written out."""

from __future__ import annotations

import torch

from bros_shard.batch import StepBatch, build_batch, build_sampling_batch
from bros_shard.protocol import NewSequence, SamplingParams, SequenceStep, StepPlan
from bros_shard.sequences import Run, SequenceTable, TokenPool
from bros_shard.speculation import count_new_tokens, guess

CPU = torch.device("cpu")
PENALTY = SamplingParams(repetition_penalty=1.2)


def build(new: list[NewSequence], steps: list[SequenceStep]) -> tuple[StepBatch, TokenPool]:
    pool = TokenPool(CPU)
    table = SequenceTable(pool, vocab_size=1000, max_length=100, num_blocks=20, block_size=16, num_adapters=3)
    runs = table.apply(StepPlan(0, 0, sequences=steps, new_sequences=new))
    guess(runs, pool)
    return build_batch(runs, pool, 16, CPU), pool


def test_decodes_come_first_by_length_then_chunks() -> None:
    new = [
        NewSequence(0, list(range(100, 140)), 90, SamplingParams()),  # a chunk that does not end the prompt
        NewSequence(1, list(range(200, 218)), 90, SamplingParams()),  # decodes token 17
        NewSequence(2, list(range(300, 303)), 90, SamplingParams()),  # a whole prompt
        NewSequence(3, list(range(400, 405)), 90, SamplingParams()),  # decodes token 4
    ]
    steps = [
        SequenceStep(0, 14, 4, 0, [2, ~3]),
        SequenceStep(1, 17, 1, 0, [4, ~5]),
        SequenceStep(2, 0, 3, 0, [~6]),
        SequenceStep(3, 4, 1, 0, [7]),
    ]
    batch, _ = build(new, steps)
    assert batch.input_ids.tolist() == [404, 217, 114, 115, 116, 117, 300, 301, 302]
    assert batch.positions.tolist() == [4, 17, 14, 15, 16, 17, 0, 1, 2]
    meta = batch.attention
    assert meta.slot_mapping.tolist() == [116, 94, 46, 47, 63, 62, 111, 110, 109]
    assert meta.block_table.tolist() == [[7, 0], [4, ~5], [2, ~3], [~6, 0]]
    assert meta.seq_lens.tolist() == [5, 18, 18, 3]
    assert meta.cu_q.tolist() == [0, 1, 2, 6, 9]
    assert (meta.max_q, meta.max_k, meta.n_decode, meta.block_size) == (4, 18, 2, 16)
    assert [run.sequence.sequence_id for run in batch.sampled] == [3, 1, 2]
    assert batch.sampled_tokens.tolist() == [0, 1, 8]
    assert batch.sampled_columns.tolist() == [5, 18, 3]


def test_tokens_go_through_the_adapters_of_their_sequences() -> None:
    def adapted(*adapters: int | None) -> list[tuple[int, list[int] | None]]:
        """Of sequences that bring 2, 1, 1, … tokens: those with one come first."""
        new = [NewSequence(i, [5, 6], 90, SamplingParams(), adapter=adapter) for i, adapter in enumerate(adapters)]
        steps = [SequenceStep(i, min(i, 1), 2 - min(i, 1), 0, [i]) for i in range(len(adapters))]
        batch, _ = build(new, steps)
        return [(part.adapter, None if part.rows is None else part.rows.tolist()) for part in batch.adapted_rows]

    assert adapted(None, None) == []
    assert adapted(1, 1) == [(1, None)]
    assert adapted(0, None) == [(0, [1, 2])]
    assert adapted(2, 0, None, 2) == [(0, [0]), (2, [2, 3, 4])]


def test_sampled_token_is_the_next_input() -> None:
    new = [NewSequence(0, [5, 6], 90, SamplingParams())]
    batch, pool = build(new, [SequenceStep(0, 0, 2, 0, [1])])
    pool.write(batch.sampled_rows, batch.sampled_columns, torch.tensor([77]))
    (run,) = batch.sampled
    run.sequence.num_known_tokens += 1
    following = build_batch([Run(run.sequence, 2, 1)], pool, 16, CPU)
    assert following.input_ids.tolist() == [77]
    assert following.positions.tolist() == [2]


def test_guesses_follow_the_last_known_token_and_each_has_a_row_to_choose_from() -> None:
    new = [
        NewSequence(0, [5, 6, 7, 5, 6], 90, PENALTY),  # 7 and 5 came after 5, 6
        NewSequence(1, [1, 2, 3], 90, SamplingParams()),  # nothing to guess from
    ]
    steps = [SequenceStep(0, 4, 1, 0, [1], 2), SequenceStep(1, 2, 1, 0, [2], 2)]
    batch, pool = build(new, steps)
    assert batch.input_ids.tolist() == [3, 6, 7, 5]
    assert batch.positions.tolist() == [2, 4, 5, 6]
    assert batch.attention.cu_q.tolist() == [0, 1, 4]
    assert batch.attention.seq_lens.tolist() == [3, 7]
    assert batch.attention.n_decode == 1
    assert batch.sampled_tokens.tolist() == [0, 1, 2, 3]
    assert batch.sampled_columns.tolist() == [3, 5, 6, 7]
    sampling = build_sampling_batch(batch, pool)
    assert sampling.params == [SamplingParams(), PENALTY, PENALTY, PENALTY]
    assert sampling.token_ids[3].tolist() == [5, 6, 7, 5, 6, 7, 5]
    assert count_new_tokens(batch.sampled, torch.tensor([9, 7, 8, 5])) == [1, 2]


def test_history_is_read_only_where_a_penalty_needs_it() -> None:
    new = [
        NewSequence(0, [1, 2, 3, 4, 5, 6], 90, SamplingParams()),
        NewSequence(1, [7, 8, 9], 90, PENALTY),
        NewSequence(2, [10], 90, PENALTY),
    ]
    steps = [SequenceStep(n.sequence_id, 0, len(n.token_ids), 0, [n.sequence_id]) for n in new]
    batch, pool = build(new, steps)
    sampling = build_sampling_batch(batch, pool)
    assert [run.sequence.sequence_id for run in batch.sampled] == [2, 0, 1]
    assert sampling.params == [PENALTY, SamplingParams(), PENALTY]
    assert sampling.lengths.tolist() == [1, 6, 3]
    assert sampling.token_ids.shape == (3, 3)
    assert sampling.token_ids[2].tolist() == [7, 8, 9]
    assert sampling.token_ids[0, :1].tolist() == [10]

    batch, pool = build(new[:1], steps[:1])
    assert build_sampling_batch(batch, pool).token_ids.shape == (1, 0)
