"""What is guessed of a text that repeats itself, and that guesses change nothing but the number of steps."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from bros_shard.speculation import guess_next


@pytest.mark.parametrize(
    ("token_ids", "expected"),
    [
        ([1, 2, 3, 4, 1, 2], [3, 4, 1]),
        ([1, 2, 3, 1, 2, 4, 1, 2], [4, 1, 2]),  # the latest of those that are equally alike
        ([7, 1, 2, 3, 8, 1, 2, 4, 7, 1, 2], [3, 8, 1]),  # but more alike counts more
        ([5, 6, 5, 6, 5], [6, 5, 6]),
        ([9, 9], []),  # one token alike says nothing
        ([9, 9, 9], [9, 9, 9]),
        ([1, 2, 3], []),
        ([1], []),
    ],
)
def test_what_came_after_the_same_tokens_may_come_again(token_ids: list[int], expected: list[int]) -> None:
    assert guess_next(np.array(token_ids, dtype=np.int32), 3) == expected


@given(st.lists(st.integers(0, 3), min_size=1, max_size=60), st.integers(1, 16))
def test_guesses_are_as_a_search_of_all_places_finds_them(token_ids: list[int], num_tokens: int) -> None:
    """By definition: of all earlier places, the one with most tokens alike, up to eight; then the latest."""

    def num_alike(end: int) -> int:
        count = 0
        while count < min(8, end) and token_ids[end - 1 - count] == token_ids[-1 - count]:
            count += 1
        return count

    best = max(range(1, len(token_ids)), key=lambda end: (num_alike(end), end), default=0)
    expected: list[int] = []
    if best and num_alike(best) >= 2:
        following = token_ids[best:]
        while len(expected) < num_tokens:
            expected.append(following[len(expected)] if len(expected) < len(following) else expected[-len(following)])
    assert guess_next(np.array(token_ids, dtype=np.int32), num_tokens) == expected
