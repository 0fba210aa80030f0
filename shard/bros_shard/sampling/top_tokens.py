"""Which tokens were the likeliest ones, for whoever asks."""

from __future__ import annotations

import math
from collections.abc import Sequence

from torch import Tensor

from bros_shard.protocol import RankedToken


def likeliest_tokens(
    logprobs: Tensor, counts: Sequence[int], most: int, token_ids: Tensor | None = None
) -> list[list[RankedToken]]:
    """The likeliest tokens of each row in descending order, equal ones by ascending id.

    As in TGI, a list holds all that are at least as likely as the n-th, so maybe more than n, and none that cannot be
    chosen, so maybe fewer.

    Args:
        logprobs: (num_rows, num_tokens), any float type.
        counts: n of each row, from 1 to `most`.
        most: the longest that a list may be; of more tokens that tie, some are left out.
        token_ids: int64 (num_rows, num_tokens): which tokens these are; `None`: those of the vocabulary, in order.
    """
    largest = logprobs.topk(min(most, logprobs.shape[1]))
    ids = largest.indices if token_ids is None else token_ids.gather(1, largest.indices)
    return [
        _ranked(row_ids, values, count)
        for row_ids, values, count in zip(ids.tolist(), largest.values.tolist(), counts, strict=True)
    ]


def _ranked(token_ids: list[int], descending: list[float], count: int) -> list[RankedToken]:
    nth = descending[min(count, len(descending)) - 1]
    listed = [
        (token_id, value)
        for token_id, value in zip(token_ids, descending, strict=True)
        if value >= nth and math.isfinite(value)
    ]
    return sorted(listed, key=lambda token: (-token[1], token[0]))
