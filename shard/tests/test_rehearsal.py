"""Made-up steps say truly what they are made of, and fit the model and the step's limit."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from bros_shard.protocol import StepPlan, StepShape
from bros_shard.rehearsal import PROFILED_SCENES, Rehearsal, Scene, largest_scenes


def test_shapes() -> None:
    assert Scene(3, 99, 1).shape() == StepShape(0, 3, 0.0, 300)
    assert Scene(2, 10, 4).shape() == StepShape(8, 0, 8 * 12.0, 0)


@given(st.sampled_from(PROFILED_SCENES), st.integers(2, 5000), st.integers(1, 5000))
def test_clipped_scenes_fit(scene: Scene, max_length: int, max_batch_tokens: int) -> None:
    clipped = scene.clipped(max_length, max_batch_tokens)
    assert clipped.num_tokens >= 1
    assert clipped.num_past_tokens >= 0
    assert clipped.num_sequences * clipped.num_tokens <= max_batch_tokens
    assert clipped.num_past_tokens + clipped.num_tokens + 1 <= max_length


@given(st.integers(2, 5000), st.integers(1, 5000))
def test_largest_scenes_fill_the_step(max_length: int, max_batch_tokens: int) -> None:
    chunks, samples = largest_scenes(max_batch_tokens, max_length)
    assert max_batch_tokens / 2 < chunks.num_sequences * chunks.num_tokens <= max_batch_tokens
    assert chunks.num_tokens + 1 <= max_length or chunks.num_tokens == 1
    assert samples == Scene(max_batch_tokens, 0, 1)


def test_rehearsal_adds_steps_and_releases_each_time() -> None:
    plans: list[StepPlan] = []
    seconds = Rehearsal(plans.append, num_blocks=3, block_size=16).run(Scene(2, 20, 1))
    assert seconds >= 0
    assert len(plans) == 9  # one run that does not count, two that do
    added, stepped, released = plans[6:]
    assert [(new.sequence_id, len(new.token_ids)) for new in added.new_sequences] == [(0, 21), (1, 21)]
    assert [(step.num_computed_tokens, step.num_tokens) for step in stepped.sequences] == [(20, 1), (20, 1)]
    assert [step.entries for step in stepped.sequences] == [[0, 1], [2, 0]]
    assert released.releases == [0, 1]
