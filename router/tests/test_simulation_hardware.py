"""Hardware models, against figures that are published or were worked out elsewhere."""

import itertools
import statistics
from dataclasses import replace

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from bros_router.simulation.hardware import (
    A100_40G,
    A100_80G,
    H200,
    HARDWARE,
    LLAMA_3_8B,
    LLAMA_3_70B,
    OPT_13B,
    OPT_30B,
    Fitted,
    Measurement,
    Noisy,
    Resampled,
    Roofline,
    profile,
    scaled_targets,
)
from bros_shard.protocol import StepShape


def prefill(num_tokens, past=0):
    return StepShape().with_sequence(past, num_tokens)


def decode(num_sequences, context):
    return StepShape(num_decode_sequences=num_sequences, decode_context_tokens=num_sequences * context)


@pytest.mark.parametrize(
    ("model", "num_billions", "kv_kib"),
    [(OPT_13B, 12.85, 800), (OPT_30B, 29.97, 1344), (LLAMA_3_8B, 8.03, 128), (LLAMA_3_70B, 70.55, 320)],
)
def test_sizes_are_those_of_the_published_models(model, num_billions, kv_kib):
    assert model.weight_bytes / 2e9 == pytest.approx(num_billions, rel=0.002)
    assert model.kv_bytes_per_token == kv_kib * 1024


def test_thousand_tokens_cost_what_the_design_reckons():
    """KV over PCIe: 5 ms for Llama-3-8B, 33 ms for OPT-13B on one device; computed anew on an H200: some 30 ms."""
    copies = StepShape(num_copied_tokens=1000)
    assert HARDWARE["llama-3-8b"].seconds(copies) == pytest.approx(0.005, rel=0.1)
    assert Roofline(OPT_13B, A100_40G, 1).seconds(copies) == pytest.approx(0.033, rel=0.05)
    assert HARDWARE["llama-3-8b"].seconds(prefill(1000)) == pytest.approx(0.030, rel=0.1)


def test_a_lone_decode_takes_as_long_as_reading_the_weights():
    """16.06 GB less the embedding's 1.05, at 80 % of 4.8 TB/s, is 3.9 ms; 1.5 ms is what every step costs."""
    assert HARDWARE["llama-3-8b"].seconds(decode(1, 1)) == pytest.approx(0.0039 + 0.0015, rel=0.01)


def test_a_long_prefill_takes_its_arithmetic():
    """2 FLOP for each of 12.6e9 weights and token, at 60 % of 2 x 312 TFLOP/s, is 67 us a token and device pair."""
    hardware = Roofline(OPT_13B, replace(A100_40G, memory_bytes_per_s=1e20), 2)
    longer, shorter = (hardware.seconds(StepShape(num, 1)) for num in (2000, 1000))
    exchange_s = 80 * 2 * 0.5 * 2 * 5120 / 230e9
    assert (longer - shorter) / 1000 == pytest.approx(2 * 12.58e9 / (0.6 * 624e12) + exchange_s, rel=0.01)


def test_the_paper_s_hardware_holds_some_50_000_tokens():
    """40 GB x 0.9 - 2 GB a device, less 25.7 GB of weights, by 0.82 MB a token."""
    assert HARDWARE["opt-13b"].num_kv_tokens == pytest.approx((2 * 34e9 - 25.7e9) / 819_200, rel=0.01)
    assert 50_000 < HARDWARE["opt-30b"].num_kv_tokens < 60_000


def test_one_device_needs_no_exchange():
    alone, pair = Roofline(LLAMA_3_8B, H200, 1), Roofline(LLAMA_3_8B, H200, 2)
    assert pair.seconds(decode(1, 1)) > alone.seconds(decode(1, 1)) / 2 + 64 * 20e-6
    assert pair.seconds(prefill(4000)) < alone.seconds(prefill(4000))


counts = st.integers(0, 2000)
shapes = st.builds(
    StepShape, counts, st.integers(0, 16), st.integers(0, 256), st.floats(0, 4e6), st.integers(0, 500_000), counts
)


@given(shapes, shapes, st.sampled_from(sorted(HARDWARE)))
def test_more_work_never_takes_less_time(shape, more, name):
    both = StepShape(
        *(a + b for a, b in zip(msgspec.structs.astuple(shape), msgspec.structs.astuple(more), strict=True))
    )
    assert HARDWARE[name].seconds(both) >= HARDWARE[name].seconds(shape) >= 0


def test_a_step_without_work_takes_no_time():
    assert HARDWARE["opt-13b"].seconds(StepShape()) == 0


def test_transfers_hide_behind_computing():
    hardware = HARDWARE["opt-13b"]
    assert hardware.seconds(prefill(1000).with_copies(100)) == hardware.seconds(prefill(1000))
    assert hardware.seconds(decode(1, 1).with_copies(5000)) == hardware.seconds(StepShape(num_copied_tokens=5000))


def test_noise_is_seeded_and_has_mean_1():
    shape = decode(8, 100)
    true_s = HARDWARE["opt-13b"].seconds(shape)
    noisy, again, other = (Noisy(HARDWARE["opt-13b"], 0.2, 3, index) for index in (0, 0, 1))
    ratios = [noisy.seconds(shape) / true_s for _ in range(5000)]
    assert statistics.mean(ratios) == pytest.approx(1, abs=0.02)
    assert statistics.stdev(ratios) == pytest.approx(0.2, abs=0.02)
    assert again.seconds(shape) / true_s == ratios[0] != other.seconds(shape) / true_s


@pytest.mark.parametrize("name", HARDWARE)
def test_the_profile_fits_the_hardware(name):
    hardware = HARDWARE[name]
    points = profile(hardware)
    assert 40 <= len(points) <= 70
    for shape, seconds in points:
        assert seconds == hardware.seconds(shape)
        assert shape.decode_context_tokens <= hardware.num_kv_tokens
    assert any(shape.num_prefill_tokens and shape.num_decode_sequences for shape, _ in points)


def test_scaled_targets_are_multiples_of_the_unloaded_latency():
    hardware = HARDWARE["llama-3-8b"]
    targets = scaled_targets(hardware, 5.0, max_batch_tokens=2048)
    ttft_s, tpot_s = targets(1000)
    assert ttft_s == pytest.approx(5 * hardware.seconds(prefill(1000)))
    assert tpot_s == pytest.approx(5 * hardware.seconds(decode(32, 512)))
    assert targets(3000)[0] == pytest.approx(
        5 * (hardware.seconds(prefill(2048)) + hardware.seconds(prefill(952, 2048)))
    )


def measurement(points):
    return Measurement(
        "bench", num_kv_tokens=1000, num_host_tokens=500, max_length=256, copies_overlap=False, points=points
    )


def test_fitted_hardware_is_read_from_its_file(tmp_path):
    points = [(decode(num, 100), 0.010 + 0.001 * num) for num in range(1, 33)] * 3
    path = tmp_path / "steps.json"
    path.write_bytes(msgspec.json.encode(measurement(points)))
    hardware = Fitted.read(path)
    assert (hardware.name, hardware.num_kv_tokens, hardware.num_host_tokens, hardware.max_length) == (
        "bench",
        1000,
        500,
        256,
    )
    assert hardware.seconds(decode(16, 100)) == pytest.approx(0.026, rel=0.1)
    assert hardware.ratios == pytest.approx([1.0] * 96, rel=0.1)


def test_resampled_hardware_is_as_noisy_as_its_points_and_slow_in_spells():
    # Every eighth stretch of 100 steps takes three times as long.
    points = [(decode(8, 100), 0.03 if index // 100 % 8 == 0 else 0.01) for index in range(1600)]
    hardware = Fitted(measurement(points))
    resampled, again = (Resampled(hardware, 1) for _ in range(2))
    seconds = [resampled.seconds(decode(8, 100)) for _ in range(50_000)]
    assert [again.seconds(decode(8, 100)) for _ in range(100)] == seconds[:100]
    assert statistics.mean(seconds) == pytest.approx(statistics.mean(s for _, s in points), rel=0.1)
    is_slow = [value > 0.02 for value in seconds]
    assert 0.1 < statistics.mean(is_slow) < 0.15
    num_changes = sum(before != after for before, after in itertools.pairwise(is_slow))
    assert num_changes < 50_000 / 30


def test_a_file_without_steps_is_refused(tmp_path):
    path = tmp_path / "steps.json"
    path.write_bytes(msgspec.json.encode(measurement([])))
    with pytest.raises(ValueError, match="no step"):
        Fitted.read(path)


def test_a_file_of_something_else_is_refused(tmp_path):
    path = tmp_path / "steps.json"
    path.write_text('{"name": "x"}')
    with pytest.raises(msgspec.MsgspecError):
        Fitted.read(path)


def test_a100_80g_is_the_faster_reader():
    assert Roofline(OPT_13B, A100_80G, 2).seconds(decode(1, 1)) < Roofline(OPT_13B, A100_40G, 2).seconds(decode(1, 1))
