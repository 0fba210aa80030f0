"""`bros_shard.sampling.logits_processors`: penalties and temperature against `transformers` and plain arithmetic."""

from __future__ import annotations

import math
from collections import Counter

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from transformers import RepetitionPenaltyLogitsProcessor

from bros_shard.sampling.logits_processors import (
    apply_frequency_penalty,
    apply_logit_bias,
    apply_presence_penalty,
    apply_repetition_penalty,
    apply_temperature,
)

VOCAB_SIZE = 11

token_ids = st.lists(st.integers(0, VOCAB_SIZE - 1), min_size=1, max_size=20)
logit = st.floats(-50.0, 50.0, width=32) | st.sampled_from([0.0, -math.inf])
sequences = st.lists(
    st.tuples(st.lists(logit, min_size=VOCAB_SIZE, max_size=VOCAB_SIZE), token_ids, st.floats(-2.0, 2.0, width=32)),
    min_size=1,
    max_size=4,
)


def padded(histories: list[list[int]], padding: int) -> tuple[Tensor, Tensor]:
    width = max(len(history) for history in histories) + 2
    rows = [history + [padding] * (width - len(history)) for history in histories]
    return torch.tensor(rows), torch.tensor([len(history) for history in histories])


@given(sequences, st.sampled_from([-1, 0, 3, 10**9]))
def test_repetition_penalty_is_that_of_transformers(
    rows: list[tuple[list[float], list[int], float]], padding: int
) -> None:
    logits = torch.tensor([row_logits for row_logits, _, _ in rows])
    penalties = torch.tensor([2.0**strength for _, _, strength in rows])
    history, lengths = padded([history for _, history, _ in rows], padding)
    penalised = apply_repetition_penalty(logits, history, lengths, penalties)
    for row, (_, own_history, strength) in enumerate(rows):
        processor = RepetitionPenaltyLogitsProcessor(2.0**strength)
        expected = processor(torch.tensor([own_history]), logits[row : row + 1])
        assert torch.equal(penalised[row], expected[0])


def test_repetition_penalty_hits_a_repeated_token_once() -> None:
    logits = torch.tensor([[4.0, -4.0, 4.0, -4.0, 0.0]])
    penalised = apply_repetition_penalty(
        logits, torch.tensor([[0, 1, 0, 0, 1, 4]]), torch.tensor([6]), torch.tensor([2.0])
    )
    assert penalised.tolist() == [[2.0, -8.0, 4.0, -4.0, 0.0]]
    assert logits.tolist() == [[4.0, -4.0, 4.0, -4.0, 0.0]]


def test_frequency_penalty_is_the_share_of_the_sequence() -> None:
    logits = torch.tensor([[1.0, 1.0, 1.0], [1.0, 1.0, 1.0]])
    history = torch.tensor([[0, 0, 1, 0], [2, 2, -7, 0]])
    penalised = apply_frequency_penalty(logits, history, torch.tensor([4, 2]), torch.tensor([1.0, -2.0]))
    assert penalised.tolist() == [[0.25, 0.75, 1.0], [1.0, 1.0, 3.0]]


@given(sequences, st.sampled_from([-1, 0, 3, 10**9]))
def test_frequency_penalty_counts_valid_tokens_alone(
    rows: list[tuple[list[float], list[int], float]], padding: int
) -> None:
    logits = torch.tensor([row_logits for row_logits, _, _ in rows])
    history, lengths = padded([history for _, history, _ in rows], padding)
    penalties = torch.tensor([penalty for _, _, penalty in rows])
    penalised = apply_frequency_penalty(logits, history, lengths, penalties)
    for row, (row_logits, own_history, penalty) in enumerate(rows):
        counts = Counter(own_history)
        for token_id, value in enumerate(row_logits):
            expected = value - penalty * counts[token_id] / len(own_history)
            assert penalised[row, token_id].item() == pytest.approx(expected, rel=1e-6, abs=1e-6)


def test_temperature_moves_the_best_to_zero_and_scales_the_rest() -> None:
    logits = torch.tensor([[1.0, 3.0, -math.inf], [2.0, 1.0, 0.0]])
    scaled = apply_temperature(logits, torch.tensor([0.5, 4.0]))
    assert scaled.tolist() == [[-4.0, 0.0, -math.inf], [0.0, -0.25, -0.5]]


@pytest.mark.parametrize("temperature", [1e-300, 1e-40, 1e-38, 1e-3, 1e6])
def test_no_temperature_makes_a_finite_row_unusable(temperature: float) -> None:
    scaled = apply_temperature(torch.tensor([[1e30, -1e30, 1e30, 0.0]]), torch.tensor([temperature]))
    assert scaled[0, 0] == scaled[0, 2] == 0.0
    assert scaled[0, 1] < 0.0
    assert not scaled.isnan().any()


def test_presence_penalty_counts_what_was_generated_once() -> None:
    logits = torch.tensor([[0.0, 0.0, 0.0, 0.0], [0.0, 0.0, 0.0, 0.0]])
    history = torch.tensor([[0, 1, 2, 2, -1], [3, 3, 3, 0, 1]])
    penalised = apply_presence_penalty(
        logits, history, torch.tensor([1, 2]), torch.tensor([4, 5]), torch.tensor([1.5, -0.5])
    )
    assert penalised.tolist() == [[0.0, -1.5, -1.5, 0.0], [0.5, 0.5, 0.0, 0.5]]
    assert not logits.any()


def test_logit_bias_is_added_to_the_rows_that_have_one() -> None:
    logits = torch.tensor([[1.0, 2.0, -math.inf], [1.0, 2.0, 3.0]])
    biased = apply_logit_bias(logits, [[(0, 100.0), (2, 100.0)], []])
    assert biased.tolist() == [[101.0, 2.0, -math.inf], [1.0, 2.0, 3.0]]
    assert logits[0, 0] == 1.0
