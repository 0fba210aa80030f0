"""Guesses what comes next in a text that repeats itself: what came after the same words before.

Prompt lookup (Saxena, 2023), also known as n-gram speculation. A step computes the guesses together with the token
before them, a token is chosen behind each, as always, and guesses count as long as they are what was chosen. So the
text is the one without guesses, whether it is drawn or greedy, but for the rounding of products of other shapes.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import takewhile
from operator import eq
from typing import Final

import numpy as np
import numpy.typing as npt
from torch import Tensor

from bros_shard.sequences import Run, TokenPool

#: A text is taken to repeat itself where this many tokens are what they were before: after a single one, too much can
#: follow. Beyond the larger number, more tokens alike say little more.
_LEAST_ALIKE: Final = 2
_MOST_ALIKE: Final = 8


def guess(runs: Iterable[Run], pool: TokenPool) -> None:
    """Guess for the runs that may be guessed for. The same on all ranks, for they know the same tokens."""
    for run in runs:
        if run.max_guesses:
            sequence = run.sequence
            run.guesses = guess_next(pool.history(sequence.row, sequence.num_known_tokens), run.max_guesses)
            if run.guesses:
                pool.write_guesses(sequence.row, run.stop, run.guesses)


def guess_next(token_ids: npt.NDArray[np.int32], num_tokens: int) -> list[int]:
    """The tokens that may come next; empty where the last ones did not occur before.

    Of the places where most of the last tokens occurred, the latest tells. A text that ends there is taken to go on
    with what was guessed, so one that repeats a short cycle is guessed as far as is asked for.

    Args:
        token_ids: (length,), the text so far.
    """
    ends = np.flatnonzero(token_ids[:-1] == token_ids[-1])
    num_alike = 1
    while ends.size and num_alike < _MOST_ALIKE:
        longer = ends[ends >= num_alike]
        longer = longer[token_ids[longer - num_alike] == token_ids[-1 - num_alike]]
        if not longer.size:
            break
        ends = longer
        num_alike += 1
    if not ends.size or num_alike < _LEAST_ALIKE:
        return []
    following = token_ids[ends[-1] + 1 :].tolist()
    return [following[index % len(following)] for index in range(num_tokens)]


def count_new_tokens(runs: Sequence[Run], token_ids: Tensor) -> list[int]:
    """How many tokens each sequence gets: one, and one more for each guess that was right, up to the first wrong one.

    Args:
        runs: those that were sampled.
        token_ids: int64 (N,), chosen behind the last known token of each run and behind each of its guesses.
    """
    if not any(run.guesses for run in runs):
        return [1] * len(runs)
    chosen = iter(token_ids.tolist())
    counts = []
    for run in runs:
        of_run = [next(chosen) for _ in range(run.num_rows)]
        counts.append(1 + sum(takewhile(bool, map(eq, run.guesses, of_run))))
    return counts
