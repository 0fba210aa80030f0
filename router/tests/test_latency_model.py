"""The latency model finds the law behind the steps it sees, keeps what it learned, and never falls as work grows."""

from __future__ import annotations

import random
from collections.abc import Callable

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bros_router.scheduling.latency_model import LatencyModel
from bros_shard.protocol import StepShape

Law = Callable[[StepShape], float]


def cpu_law(shape: StepShape) -> float:
    """In the manner of a 135M model on two cores; the linear layers bend at 8 rows."""
    rows = shape.num_prefill_tokens + shape.num_decode_sequences
    return (
        0.015
        + 0.0003 * min(rows, 8)
        + 0.0007 * max(0, rows - 8)
        + 0.0002 * shape.num_decode_sequences
        + 0.001 * shape.num_prefill_sequences
        + 4e-7 * shape.prefill_attention
        + 6e-6 * shape.decode_context_tokens
        + 4e-7 * shape.num_copied_tokens
    )


def gpu_law(shape: StepShape) -> float:
    """In the manner of a GPU: weights are read however few the rows, and copies run beside."""
    rows = shape.num_prefill_tokens + shape.num_decode_sequences
    forward_s = max(0.004, 0.002 + 8e-6 * rows) + 2e-10 * shape.prefill_attention + 4e-8 * shape.decode_context_tokens
    return max(forward_s, 5e-6 * shape.num_copied_tokens)


def decodes(num_sequences: int, context_tokens: int) -> StepShape:
    return StepShape(num_decode_sequences=num_sequences, decode_context_tokens=num_sequences * context_tokens)


def chunk(num_past_tokens: int, num_tokens: int, beside: StepShape | None = None) -> StepShape:
    return (beside or StepShape()).with_sequence(num_past_tokens, num_tokens)


GRID = (
    *(decodes(count, context) for count, context in ((1, 64), (4, 128), (8, 128), (16, 512), (32, 512), (64, 128))),
    *(chunk(past, tokens) for past, tokens in ((0, 16), (0, 64), (448, 64), (0, 256), (0, 512))),
    chunk(0, 64, decodes(16, 256)),
    decodes(1, 64).with_copies(1024),
)
UNSEEN = (
    decodes(12, 300),
    decodes(48, 500),
    chunk(256, 128),
    chunk(100, 400),
    chunk(64, 32, decodes(24, 400)),
    chunk(0, 200, decodes(40, 200)),
)


def random_shape(rng: random.Random) -> StepShape:
    shape = decodes(rng.randint(1, 48), rng.randint(20, 1000))
    return chunk(rng.choice((0, 128, 512)), rng.randint(2, 400), shape) if rng.random() < 0.35 else shape


def show_steps(model: LatencyModel, law: Law, num_steps: int, rng: random.Random, noise: float = 0.05) -> None:
    for _ in range(num_steps):
        shape = random_shape(rng)
        model.observe(shape, law(shape) * rng.lognormvariate(0.0, noise))


def largest_error(model: LatencyModel, law: Law, shapes: tuple[StepShape, ...] = UNSEEN) -> float:
    return max(abs(model.predict_s(shape) / law(shape) - 1.0) for shape in shapes)


@pytest.mark.parametrize(("law", "copies_overlap"), [(cpu_law, False), (gpu_law, True)])
def test_a_measured_grid_predicts_other_steps(law: Law, copies_overlap: bool) -> None:
    model = LatencyModel([(shape, law(shape)) for shape in GRID], copies_overlap)
    assert largest_error(model, law) < 0.1


@pytest.mark.parametrize("law", [cpu_law, gpu_law])
def test_without_a_grid_it_learns_from_steps(law: Law) -> None:
    model = LatencyModel(copies_overlap=law is gpu_law)
    show_steps(model, law, 300, random.Random(0))
    assert largest_error(model, law) < 0.15
    assert model.error < 0.1
    assert 1.0 < model.margin < 1.25


def test_one_step_tells_the_scale() -> None:
    model = LatencyModel()
    shape = decodes(8, 200)
    model.observe(shape, 3.0)
    assert model.predict_s(shape) == pytest.approx(3.0)
    assert model.predict_s(decodes(1, 1)) > 0.5


@pytest.mark.parametrize("slowdown", [0.3, 1.0, 2.0, 20.0])
def test_a_stream_of_like_decodes_does_not_wreck_what_is_known_of_prefill(slowdown: float) -> None:
    model = LatencyModel([(shape, cpu_law(shape)) for shape in GRID])
    rng = random.Random(1)
    for step in range(2000):
        shape = decodes(16, 100 + step % 300)
        model.observe(shape, slowdown * cpu_law(shape) * rng.lognormvariate(0.0, 0.05))
    # A machine that became slower did so for all steps alike: nothing else was seen.
    assert largest_error(model, lambda shape: slowdown * cpu_law(shape)) < 0.15


def test_what_was_seen_of_prefill_outlives_many_decodes() -> None:
    def law(shape: StepShape) -> float:  # the grid was measured with other kernels: prefill became slower, decode not
        return cpu_law(shape) + 0.002 * shape.num_prefill_tokens

    rng = random.Random(2)
    model = LatencyModel([(shape, cpu_law(shape)) for shape in GRID])
    show_steps(model, law, 400, rng)
    for _ in range(1000):
        shape = decodes(rng.randint(8, 24), 300)
        model.observe(shape, law(shape) * rng.lognormvariate(0.0, 0.05))
    assert largest_error(model, law) < 0.2


def test_a_machine_that_slows_down_is_followed_within_steps() -> None:
    rng = random.Random(3)
    model = LatencyModel([(shape, cpu_law(shape)) for shape in GRID])
    show_steps(model, cpu_law, 200, rng)
    show_steps(model, lambda shape: 1.6 * cpu_law(shape), 12, rng)
    assert largest_error(model, lambda shape: 1.6 * cpu_law(shape)) < 0.25
    show_steps(model, cpu_law, 12, rng)
    assert largest_error(model, cpu_law) < 0.25


def test_a_hiccup_is_counted_and_teaches_nothing() -> None:
    rng = random.Random(4)
    model = LatencyModel([(shape, cpu_law(shape)) for shape in GRID])
    show_steps(model, cpu_law, 100, rng)
    before_s, margin, error = [model.predict_s(shape) for shape in UNSEEN], model.margin, model.error
    for _ in range(3):
        model.observe(GRID[0], 8.0 * cpu_law(GRID[0]))
    assert model.num_outliers == 3
    assert [model.predict_s(shape) for shape in UNSEEN] == before_s
    assert model.margin == pytest.approx(margin, rel=0.02)
    assert model.error > error


def test_a_model_that_is_wrong_by_far_is_not_deaf() -> None:
    model = LatencyModel([(shape, cpu_law(shape)) for shape in GRID])
    show_steps(model, lambda shape: 30.0 * cpu_law(shape), 300, random.Random(5))
    assert largest_error(model, lambda shape: 30.0 * cpu_law(shape)) < 0.2


def test_margin_is_the_95th_percentile_of_the_latest_steps() -> None:
    rng = random.Random(6)
    model = LatencyModel([(shape, cpu_law(shape)) for shape in GRID])
    assert (model.margin, model.error) == (1.0, 0.0)
    ratios = []
    for _ in range(900):
        shape = random_shape(rng)
        actual_s = cpu_law(shape) * rng.lognormvariate(0.0, 0.3)
        ratios.append(actual_s / model.predict_s(shape))
        model.observe(shape, actual_s)
    latest = ratios[-512:]
    assert sum(ratio > model.margin for ratio in latest) / 512 == pytest.approx(0.05, abs=0.003)
    assert model.error == pytest.approx(sum(abs(1 / ratio - 1) for ratio in latest) / 512)
    assert model.bound_s(UNSEEN[0]) == model.margin * model.predict_s(UNSEEN[0])


def test_margin_stays_usable_where_one_step_in_ten_is_a_hiccup() -> None:
    rng = random.Random(7)
    model = LatencyModel([(shape, cpu_law(shape)) for shape in GRID])
    for step in range(600):
        shape = random_shape(rng)
        model.observe(shape, cpu_law(shape) * (10.0 if step % 10 == 0 else rng.lognormvariate(0.0, 0.05)))
    assert model.num_outliers == 60
    assert model.margin < 1.2


def test_margin_is_never_below_one() -> None:
    model = LatencyModel([(shape, cpu_law(shape)) for shape in GRID])
    for _ in range(5):
        model.observe(GRID[0], 0.9 * cpu_law(GRID[0]))
    assert model.margin == 1.0


def test_nothing_taken_means_nothing_said() -> None:
    """A clock that stood still, in a cached profile or in a step."""
    model = LatencyModel([(shape, 0.0) for shape in GRID])
    model.observe(GRID[0], 0.0)
    assert model.predict_s(GRID[0]) > 0.0
    model.observe(GRID[0], 0.5)
    assert model.predict_s(GRID[0]) == pytest.approx(0.5)


def test_a_step_of_nothing_is_predicted_too() -> None:
    """Where all seen steps are explained by their tokens, nothing is left for the step itself."""
    model = LatencyModel()
    for num_tokens in (100, 200, 300, 400) * 50:
        model.observe(StepShape(num_prefill_tokens=num_tokens), 0.001 * num_tokens)
    model.observe(StepShape(), 1e-9)
    assert model.predict_s(StepShape()) > 0.0


shapes = st.builds(
    StepShape,
    num_prefill_tokens=st.integers(0, 5000),
    num_prefill_sequences=st.integers(0, 100),
    num_decode_sequences=st.integers(0, 300),
    prefill_attention=st.floats(0.0, 1e8),
    decode_context_tokens=st.integers(0, 10**6),
    num_copied_tokens=st.integers(0, 10**5),
)
histories = st.lists(st.tuples(shapes, st.floats(1e-5, 10.0)), max_size=40)


@settings(deadline=None)
@given(histories, histories, st.booleans(), shapes, shapes)
def test_more_work_never_takes_less_time(points, steps, copies_overlap, shape, more) -> None:  # type: ignore[no-untyped-def]
    """Whatever nonsense was measured and observed."""
    model = LatencyModel(points, copies_overlap)
    for observed, seconds in steps:
        model.observe(observed, seconds)
    fields = shape.__struct_fields__
    larger = StepShape(*(getattr(shape, field) + getattr(more, field) for field in fields))
    assert 0.0 <= model.predict_s(shape) <= model.predict_s(larger) * (1 + 1e-12)
    assert model.predict_s(shape) <= model.bound_s(shape)


@settings(deadline=None)
@given(
    points=histories,
    num_decodes=st.integers(0, 64),
    num_computed_tokens=st.integers(0, 2000),
    limit=st.integers(0, 300),
    budget_s=st.floats(0.0, 1.0),
)
def test_largest_chunk_is_the_largest(points, num_decodes, num_computed_tokens, limit, budget_s) -> None:  # type: ignore[no-untyped-def]
    model = LatencyModel(points)
    shape = decodes(num_decodes, 100)
    fitting = [
        tokens
        for tokens in range(1, limit + 1)
        if model.bound_s(shape.with_sequence(num_computed_tokens, tokens)) <= budget_s
    ]
    assert model.largest_chunk(shape, num_computed_tokens, limit, budget_s) == max(fitting, default=0)


@settings(deadline=None)
@given(
    points=histories,
    num_tokens=st.integers(0, 5000),
    num_computed_tokens=st.integers(0, 5000),
    max_batch_tokens=st.integers(1, 600),
)
def test_prefill_is_the_sum_of_its_chunks(points, num_tokens, num_computed_tokens, max_batch_tokens) -> None:  # type: ignore[no-untyped-def]
    model = LatencyModel(points)
    stop = num_computed_tokens + num_tokens
    chunks = [
        StepShape().with_sequence(start, min(max_batch_tokens, stop - start))
        for start in range(num_computed_tokens, stop, max_batch_tokens)
    ]
    predicted = model.prefill_s(num_tokens, num_computed_tokens, max_batch_tokens)
    assert predicted == pytest.approx(sum(map(model.predict_s, chunks)))


def test_one_token_may_cost_more_than_a_chunk_of_two() -> None:
    """It decodes: where decoding is dear, two fit and one does not, or one alone fits."""

    def law(shape: StepShape) -> float:
        return 0.01 + 0.001 * shape.num_prefill_tokens + 0.05 * shape.num_decode_sequences

    model = LatencyModel([(shape, law(shape)) for shape in GRID])
    one_s = model.bound_s(StepShape().with_sequence(0, 1))
    two_s = model.bound_s(StepShape().with_sequence(0, 2))
    assert two_s < one_s
    assert model.largest_chunk(StepShape(), 0, 1, two_s) == 0
    assert model.largest_chunk(StepShape(), 0, 2, two_s) == 2
    assert model.largest_chunk(StepShape(), 0, 1, one_s) == 1
