"""Targets scaled to what an idle server needs."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bros_benchmarks.evaluation.targets import ScaledTargets, UnloadedLatency, decode_step_s, fit_line
from bros_benchmarks.load import Load, Timeline


@given(fixed=st.floats(0.001, 1), slope=st.floats(1e-5, 0.01))
def test_a_line_is_found_again(fixed: float, slope: float) -> None:
    lengths = (8, 64, 256, 512)
    assert fit_line(lengths, [fixed + slope * length for length in lengths]) == pytest.approx((fixed, slope), rel=1e-3)


@given(seconds=st.lists(st.floats(0.001, 10), min_size=4, max_size=4))
def test_no_target_is_ever_negative(seconds: list[float]) -> None:
    fixed_s, token_s = fit_line((8, 64, 256, 512), seconds)
    assert fixed_s >= 0 and token_s >= 0 and fixed_s + token_s > 0


def test_the_decode_step_is_judged_only_while_everybody_decodes() -> None:
    """The second request joins late and stalls the first; the first leaves early and the second speeds up."""
    first = Timeline(0.0, [1.0, 5.0, 5.1, 5.2, 5.3])
    second = Timeline(0.0, [5.0, 5.1, 5.2, 5.3, 5.31, 5.32, 5.33, 5.34, 5.35, 5.36])
    assert decode_step_s(Load([first, second], 6.0)) == pytest.approx(0.1)


def test_requests_that_never_decode_together_are_no_measurement() -> None:
    apart = [Timeline(0.0, [1.0, 1.1]), Timeline(0.0, [2.0, 2.1])]
    with pytest.raises(RuntimeError, match="all together"):
        decode_step_s(Load(apart, 3.0))


def test_targets_are_whole_milliseconds_so_that_header_and_judge_agree() -> None:
    targets = ScaledTargets(UnloadedLatency(0.03, 0.0011, 0.0701), 5.0)
    assert targets(101) == (0.706, 0.351)
