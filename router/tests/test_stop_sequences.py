"""Where replies end because of their text: TGI's rule, and OpenAI's, which cuts."""

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bros_router.request import FinishReason
from bros_router.stop_sequences import CuttingStopRule, TgiStopRule

STOP = FinishReason.STOP_SEQUENCE
token_texts = st.lists(st.text("ab\n", max_size=3), max_size=12)

# --- TGI's


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
def test_where_tgi_ends_a_reply(stops, texts, reached_at):
    rule = TgiStopRule(stops)
    reached = []
    for text in texts:
        assert rule.take(text, is_special=False) == text
        reached.append(rule.judge(None) is STOP)
    assert (reached.index(True) if True in reached else None) == reached_at
    assert rule.rest() == ""


@given(st.lists(st.text("ab\n", max_size=4), max_size=3), token_texts)
def test_tgis_rule_agrees_with_an_anchored_search_over_all_the_text(stops, texts):
    rule = TgiStopRule(stops)
    expressions = [re.compile(re.escape(stop) + "$") for stop in stops]
    so_far = ""
    for text in texts:
        so_far += text
        rule.take(text, is_special=False)
        assert (rule.judge(None) is STOP) == any(expression.search(so_far) for expression in expressions)


def test_tgis_rule_matches_special_tokens_and_shows_none():
    rule = TgiStopRule(["</s>"])
    assert rule.take("</s>", is_special=True) == ""
    assert rule.judge(None) is STOP
    assert rule.judge(FinishReason.EOS_TOKEN) is FinishReason.EOS_TOKEN
    assert rule.judge(FinishReason.LENGTH) is FinishReason.LENGTH


# --- OpenAI's


@pytest.mark.parametrize(
    ("stops", "texts", "shown", "reached_at"),
    [
        ([], ["a", "b"], ["a", "b"], None),
        (["b"], ["a", "b", "c"], ["a", ""], 1),
        (["b"], ["abc"], ["a"], 0),  # inside a token's text it counts, and what is behind it is dropped
        (["bcd"], ["ab", "c", "de"], ["a", "", ""], 2),
        (["bcd"], ["ab", "c", "e"], ["a", "", "bce"], None),
        (["aab"], ["aaa", "ab"], ["a", "a"], 1),
        (["abab"], ["aba", "c"], ["", "abac"], None),
        (["abac"], ["abab", "ac"], ["ab", ""], 1),
        (["bc", "abc"], ["abc"], [""], 0),  # they end together: the longer one began first
        (["b", "abc"], ["ab", "c"], ["a"], 0),  # the one that ends first counts
        (["\n\n"], ["x\n", "\n"], ["x", ""], 1),
        (["a" * 1_000_000], ["aa", "b"], ["", "aab"], None),
    ],
)
def test_where_openai_cuts_a_reply(stops, texts, shown, reached_at):
    rule = CuttingStopRule(stops)
    seen = []
    for text in texts:
        seen.append(rule.take(text, is_special=False))
        if rule.judge(None):
            break
    assert seen == shown
    assert (len(seen) - 1 if rule.judge(None) is STOP else None) == reached_at
    assert rule.rest() == ""


def test_what_is_held_back_is_shown_when_the_reply_ends_otherwise():
    rule = CuttingStopRule(["abc"])
    assert rule.take("xab", is_special=False) == "x"
    assert rule.judge(FinishReason.LENGTH) is FinishReason.LENGTH
    assert rule.rest() == "ab"


def test_a_text_that_was_cut_is_told_whatever_else_ends_the_reply():
    rule = CuttingStopRule(["b"])
    assert rule.take("ab", is_special=False) == "a"
    assert rule.judge(FinishReason.LENGTH) is STOP


def test_special_tokens_end_a_reply_and_are_never_shown():
    rule = CuttingStopRule(["<|end|>", "x<|tool|>y"])
    assert rule.take("a", is_special=False) == "a"
    assert rule.take("x", is_special=False) == ""
    assert rule.take("<|tool|>", is_special=True) == ""
    assert rule.take("z", is_special=False) == "xz"  # the special token between them is not shown
    assert rule.take("<|end|>", is_special=True) == ""
    assert rule.judge(None) is STOP


@given(st.lists(st.text("ab", min_size=1, max_size=4), max_size=3), token_texts)
def test_openais_rule_agrees_with_a_search_over_all_the_text(stops, texts):
    rule = CuttingStopRule(stops)
    so_far = shown = ""
    for text in texts:
        so_far += text
        shown += rule.take(text, is_special=False)
        ends = [so_far.find(stop) + len(stop) for stop in stops if stop in so_far]
        if ends:
            first_end = min(ends)
            assert rule.judge(None) is STOP
            assert shown == so_far[: min(first_end - len(stop) for stop in stops if so_far[:first_end].endswith(stop))]
            return
        assert rule.judge(None) is None
        beginnings = [stop[:n] for stop in stops for n in range(1, len(stop)) if so_far.endswith(stop[:n])]
        assert shown == so_far[: len(so_far) - max(map(len, beginnings), default=0)]
    assert shown + rule.rest() == so_far
