"""The bound on best-effort throughput, by hand on hardware whose cost is linear."""

from array import array

import pytest

from bros_router.request import RequestClass
from bros_router.simulation.be_bound import be_bound
from bros_router.simulation.record import RequestRecord
from bros_router.simulation.workload import TraceRequest


class Linear:
    """1 ms a prompt token, 10 ms a decode, 1 us a token of decode context, 1 us a pair of prefill attention."""

    name = "linear"
    num_kv_tokens = num_host_tokens = max_length = 10_000
    copies_overlap = True

    def seconds(self, shape):
        tokens_s = 1e-3 * shape.num_prefill_tokens + 1e-2 * shape.num_decode_sequences
        return tokens_s + 1e-6 * (shape.decode_context_tokens + shape.prefill_attention)


def rt(offered_s, num_prompt_tokens, num_output_tokens, tokens):
    request = TraceRequest(offered_s, RequestClass.RT, num_prompt_tokens, num_output_tokens, 1.0, 1.0)
    return RequestRecord(request, offered_s, token_s=array("d", tokens))


#: 100 prompt tokens: 0.1 s and 5,000 pairs; then decodes from contexts of 101, 102, 103.
PROMPT_S = 0.1 + 5000e-6
DECODES_S = [0.01 + 1e-6 * context for context in (101, 102, 103)]


def test_work_that_was_done_leaves_the_rest():
    bound = be_bound([rt(10.0, 100, 4, [11.0, 12.0, 13.0, 14.0])], Linear(), 500.0, 10.0, 20.0)
    share = (PROMPT_S + sum(DECODES_S)) / 10
    assert bound.rt_offered_share == bound.rt_done_share == pytest.approx(share)
    assert bound.tokens_per_s == pytest.approx(500 * (1 - share))
    assert bound.charged(300.0) == 300.0


def test_work_that_was_left_is_charged():
    bound = be_bound([rt(10.0, 100, 4, [11.0, 12.0])], Linear(), 500.0, 10.0, 20.0)
    assert bound.rt_done_share == pytest.approx((PROMPT_S + DECODES_S[0]) / 10)
    assert bound.charged(300.0) == pytest.approx(300 - 500 * sum(DECODES_S[1:]) / 10)


def test_work_counts_when_it_is_done():
    """Offered before the window, its last two tokens in it; and one that is offered after it."""
    records = [rt(5.0, 100, 4, [6.0, 7.0, 12.0, 13.0]), rt(20.0, 100, 4, [21.0])]
    bound = be_bound(records, Linear(), 500.0, 10.0, 20.0)
    assert bound.rt_offered_share == 0
    assert bound.rt_done_share == pytest.approx(sum(DECODES_S[1:]) / 10)


def test_best_effort_work_takes_no_room_from_itself():
    request = TraceRequest(10.0, RequestClass.BE, 100, 4)
    bound = be_bound([RequestRecord(request, 10.0, token_s=array("d", [11.0]))], Linear(), 500.0, 10.0, 20.0)
    assert bound.tokens_per_s == 500.0


def test_more_real_time_work_than_there_is_time_leaves_nothing():
    records = [rt(10.0 + number / 100, 1000, 1, []) for number in range(100)]
    bound = be_bound(records, Linear(), 500.0, 10.0, 20.0)
    assert bound.tokens_per_s == 0.0
    assert bound.charged(100.0) == 0.0
