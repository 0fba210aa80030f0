"""`bros_shard.sampling.top_tokens`: which tokens are listed, in which order."""

from __future__ import annotations

import math

import pytest
import torch

from bros_shard.sampling.top_tokens import likeliest_tokens

INF = math.inf


@pytest.mark.parametrize(
    ("row", "count", "most", "expected"),
    [
        ([-3.0, -1.0, -2.0], 1, 9, [1]),
        ([-3.0, -1.0, -2.0], 2, 9, [1, 2]),
        ([-3.0, -1.0, -2.0], 8, 9, [1, 2, 0]),  # the vocabulary has no more
        ([-2.0, -1.0, -2.0, -2.0], 2, 9, [1, 0, 2, 3]),  # all that tie with the second
        ([-2.0, -1.0, -1.0, -2.0], 2, 9, [1, 2]),
        ([-INF, -1.0, -INF], 2, 9, [1]),  # what cannot be chosen is never listed
        ([-INF, math.nan, -1.0], 2, 9, [2]),
        ([-1.0] * 5, 2, 2, [0, 1]),  # a list has an end
    ],
)
def test_who_is_listed(row: list[float], count: int, most: int, expected: list[int]) -> None:
    (listed,) = likeliest_tokens(torch.tensor([row]), [count], most)
    if len(expected) == most:  # which of those that tie is open
        assert len(listed) == most
    else:
        assert [token_id for token_id, _ in listed] == expected
    assert [value for _, value in listed] == sorted((row[token_id] for token_id, _ in listed), reverse=True)


def test_rows_have_counts_and_tokens_of_their_own() -> None:
    logprobs = torch.tensor([[-1.0, -2.0, -3.0], [-3.0, -2.0, -1.0]])
    token_ids = torch.tensor([[10, 20, 30], [40, 50, 60]])
    assert likeliest_tokens(logprobs, [1, 2], 5, token_ids) == [[(10, -1.0)], [(60, -1.0), (50, -2.0)]]
