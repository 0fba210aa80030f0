"""TGI's rule for stop sequences: at the end of a token's text, one newline allowed behind."""

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bros_router.stop_sequences import StopSequences


@pytest.mark.parametrize(
    ("stops", "texts", "reached_at"),
    [
        ((), ["a", "b"], None),
        (("b",), ["a", "b", "c"], 1),
        (("ab",), ["a", "b"], 1),
        (("ab",), ["xabx", "ab"], 1),  # inside a token's text it does not count
        (("ab",), ["ab\n"], 0),
        (("ab",), ["ab\n\n"], None),
        (("ab",), ["ab", "\n"], 0),
        (("",), ["x"], 0),
        (("",), [""], 0),
        (("a.c",), ["abc"], None),  # a text, not an expression
        (("x", "yz"), ["y", "", "z"], 2),
    ],
)
def test_where_a_reply_ends(stops, texts, reached_at):
    watcher = StopSequences(stops)
    reached = [watcher.is_reached(text) for text in texts]
    assert (reached.index(True) if True in reached else None) == reached_at


@given(st.lists(st.text("ab\n", max_size=4), max_size=3), st.lists(st.text("ab\n", max_size=3), max_size=12))
def test_agrees_with_an_anchored_search_over_all_the_text(stops, texts):
    watcher = StopSequences(tuple(stops))
    expressions = [re.compile(re.escape(stop) + "$") for stop in stops]
    so_far = ""
    for text in texts:
        so_far += text
        assert watcher.is_reached(text) == any(expression.search(so_far) for expression in expressions)
