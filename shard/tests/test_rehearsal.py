"""Made-up steps say truly what they are made of, and fit the model and the step's limit."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bros_shard.protocol import HostCopy, StepPlan, StepShape, shape_of
from bros_shard.rehearsal import Rehearsal, Scene, chunk, copies, decodes, largest_scenes, profiled_scenes

sequences = st.lists(st.tuples(st.integers(0, 3000), st.integers(1, 600)), min_size=1, max_size=80)


def test_shapes() -> None:
    assert decodes(1, 100).shape() == StepShape(num_decode_sequences=1, decode_context_tokens=100)
    assert decodes(3, 100).shape() == StepShape(num_decode_sequences=3, decode_context_tokens=25 + 100 + 175)
    assert chunk(10, 4, 2).shape() == StepShape(8, 2, 0, 8 * 12.0)
    mixed = decodes(2, 8) + chunk(0, 16) + copies(5)
    assert mixed.shape() == StepShape(16, 1, 3, 128.0, 16 + 64, 5)


@given(st.integers(2, 300), st.integers(4, 2000))
def test_decodes_are_ragged_around_their_mean(num_sequences: int, mean_context_tokens: int) -> None:
    shape = decodes(num_sequences, mean_context_tokens).shape()
    assert shape.decode_context_tokens == pytest.approx(num_sequences * mean_context_tokens, abs=num_sequences)


@given(sequences, st.integers(0, 5000), st.integers(2, 5000), st.integers(1, 5000), st.integers(0, 5000))
def test_clipped_scenes_fit(
    pairs: list[tuple[int, int]], num_copied: int, max_length: int, max_batch_tokens: int, num_host_slots: int
) -> None:
    clipped = Scene(tuple(pairs), num_copied).clipped(max_length, max_batch_tokens, num_host_slots)
    assert clipped.sequences
    assert sum(num_tokens for _, num_tokens in clipped.sequences) <= max_batch_tokens
    assert clipped.num_copied_tokens <= num_host_slots
    for num_past_tokens, num_tokens in clipped.sequences:
        assert num_tokens >= 1
        assert num_past_tokens >= 0
        assert num_past_tokens + num_tokens + 1 <= max_length


def test_what_fits_is_not_clipped() -> None:
    scene = decodes(16, 128) + chunk(512, 64) + copies(64)
    assert scene.clipped(577, 80 + 1, 64) == scene


def test_the_full_grid_begins_with_the_quick_one() -> None:
    quick = profiled_scenes("quick", 8192, 512, 10_000)
    full = profiled_scenes("full", 8192, 512, 10_000)
    assert full[: len(quick)] == quick
    assert len(full) > 50
    assert largest_scenes(512, 8192)[0] in quick


def test_a_grid_that_is_cut_off_still_has_every_kind_of_step() -> None:
    shapes = [scene.shape() for scene in profiled_scenes("quick", 8192, 512, 10_000)]
    assert shapes[0].num_decode_sequences == 1
    assert any(shape.num_prefill_tokens > 0 for shape in shapes[:2])
    assert any(shape.num_prefill_tokens > 0 and shape.num_decode_sequences > 1 for shape in shapes)
    assert any(shape.num_copied_tokens > 0 for shape in shapes)


def test_a_small_model_measures_no_scene_twice() -> None:
    scenes = profiled_scenes("full", max_length=16, max_batch_tokens=8, num_host_slots=0)
    assert len(scenes) == len(set(scenes)) < 40
    assert all(scene.num_copied_tokens == 0 for scene in scenes)


@given(st.integers(2, 5000), st.integers(1, 5000))
def test_largest_scenes_fill_the_step(max_length: int, max_batch_tokens: int) -> None:
    chunks, samples = (scene.sequences for scene in largest_scenes(max_batch_tokens, max_length))
    assert max_batch_tokens / 2 < sum(num_tokens for _, num_tokens in chunks) <= max_batch_tokens
    assert all(num_tokens + 1 <= max_length or num_tokens == 1 for _, num_tokens in chunks)
    assert samples == ((0, 1),) * max_batch_tokens


def test_rehearsal_adds_steps_and_releases_each_time() -> None:
    plans: list[StepPlan] = []
    seconds = Rehearsal(plans.append, num_blocks=3, block_size=16).measure(chunk(20, 1, 2))
    assert seconds >= 0
    assert len(plans) == 9  # one run that does not count, two that do
    added, stepped, released = plans[6:]
    assert [(new.sequence_id, len(new.token_ids)) for new in added.new_sequences] == [(0, 21), (1, 21)]
    assert [(step.num_computed_tokens, step.num_tokens) for step in stepped.sequences] == [(20, 1), (20, 1)]
    assert [step.entries for step in stepped.sequences] == [[0, 1], [2, 0]]
    assert released.releases == [0, 1]


def test_a_mixed_scene_is_played_as_it_says() -> None:
    plans: list[StepPlan] = []
    scene = decodes(4, 40) + chunk(16, 32) + copies(40)
    Rehearsal(plans.append, num_blocks=2, block_size=16).play(scene)
    assert shape_of(plans[1]) == scene.shape()
    assert plans[1].copies_out == [HostCopy(~0, 0, 16), HostCopy(~1, 1, 16), HostCopy(~0, 2, 8)]
