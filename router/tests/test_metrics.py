"""The Prometheus text: TGI's names, types and buckets, and nothing that was not used."""

import pytest
from prometheus_client.parser import text_string_to_metric_families

from bros_router.metrics import Metrics
from bros_router.request import Admission, RequestClass


def samples(metrics: Metrics) -> dict[str, float]:
    """Every sample but buckets, by its name and labels as written."""
    lines = metrics.render().decode().splitlines()
    pairs = [line.rsplit(" ", 1) for line in lines if not line.startswith("#") and "_bucket{" not in line]
    return {name: float(value) for name, value in pairs}


def ours(metrics: Metrics) -> dict[str, float]:
    """The samples that TGI has not, but for those that are there from the beginning."""
    unused = samples(Metrics())
    return {
        name: value
        for name, value in samples(metrics).items()
        if name.startswith("bros_") and value != unused.get(name)
    }


def bounds(metrics: Metrics, name: str) -> list[float]:
    """The finite upper bounds of a histogram's buckets."""
    families = {family.name: family for family in text_string_to_metric_families(metrics.render().decode())}
    found = [float(sample.labels["le"]) for sample in families[name].samples if sample.name == f"{name}_bucket"]
    assert found[-1] == float("inf")
    return found[:-1]


def validated(metrics: Metrics) -> None:
    metrics.request_validated(10, 50, max_input_tokens=200, max_total_tokens=400)


def succeeded(metrics: Metrics) -> None:
    metrics.request_succeeded(total_s=2.0, validation_s=0.25, queue_s=0.5, inference_s=1.0, num_generated_tokens=4)


def test_unused_series_are_not_shown():
    assert samples(Metrics()) == {
        "tgi_queue_size": 0,
        "tgi_batch_current_size": 0,
        "tgi_batch_current_max_tokens": 0,
        "tgi_batch_max_total_tokens": 0,
        "bros_batch_cap": 0,
        "bros_step_prediction_margin": 0,
    }


def test_requests_are_counted_under_tgis_names():
    metrics = Metrics()
    for _ in range(3):
        metrics.request_received()
    validated(metrics)
    succeeded(metrics)
    metrics.request_failed("validation")
    metrics.request_failed("overloaded")
    unused = samples(Metrics())
    assert {name: value for name, value in samples(metrics).items() if name not in unused} == {
        "tgi_request_count": 3,
        "tgi_request_success": 1,
        'tgi_request_failure{err="validation"}': 1,
        'tgi_request_failure{err="overloaded"}': 1,
        "tgi_request_duration_count": 1,
        "tgi_request_duration_sum": 2.0,
        "tgi_request_validation_duration_count": 1,
        "tgi_request_validation_duration_sum": 0.25,
        "tgi_request_queue_duration_count": 1,
        "tgi_request_queue_duration_sum": 0.5,
        "tgi_request_inference_duration_count": 1,
        "tgi_request_inference_duration_sum": 1.0,
        "tgi_request_mean_time_per_token_duration_count": 1,
        "tgi_request_mean_time_per_token_duration_sum": 0.25,
        "tgi_request_input_length_count": 1,
        "tgi_request_input_length_sum": 10,
        "tgi_request_max_new_tokens_count": 1,
        "tgi_request_max_new_tokens_sum": 50,
        "tgi_request_generated_tokens_count": 1,
        "tgi_request_generated_tokens_sum": 4,
    }


def test_steps_are_counted_by_method():
    metrics = Metrics()
    metrics.step_sent("prefill", num_sequences=2, num_new_sequences=2, num_running=2, max_tokens=80, planning_s=0.5)
    metrics.step_finished("prefill", total_s=0.5, forward_s=0.25, sampling_s=0.125, taking_in_s=0.0625)
    metrics.step_sent("prefill", num_sequences=1, num_new_sequences=1, num_running=3, max_tokens=100, planning_s=0.25)
    metrics.step_sent("decode", num_sequences=3, num_new_sequences=0, num_running=3, max_tokens=100, planning_s=0.5)
    metrics.step_failed("decode")
    metrics.set_queue_size(7)
    metrics.set_max_batch_total_tokens(64000)
    assert {name: value for name, value in samples(metrics).items() if name.startswith("tgi_")} == {
        "tgi_queue_size": 7,
        "tgi_batch_current_size": 3,
        "tgi_batch_current_max_tokens": 100,
        "tgi_batch_max_total_tokens": 64000,
        "tgi_batch_next_size_count": 2,
        "tgi_batch_next_size_sum": 3,
        'tgi_batch_concat{reason="chunking"}': 1,  # the step in which one joined two
        'tgi_batch_concat_duration_count{method="decode"}': 1,
        'tgi_batch_concat_duration_sum{method="decode"}': 0.25,
        'tgi_batch_filter_duration_count{method="prefill"}': 1,
        'tgi_batch_filter_duration_sum{method="prefill"}': 0.0625,
        'tgi_batch_inference_count{method="prefill"}': 2,
        'tgi_batch_inference_count{method="decode"}': 1,
        'tgi_batch_inference_success{method="prefill"}': 1,
        'tgi_batch_inference_failure{method="decode"}': 1,
        'tgi_batch_inference_duration_count{method="prefill"}': 1,
        'tgi_batch_inference_duration_sum{method="prefill"}': 0.5,
        'tgi_batch_forward_duration_count{method="prefill"}': 1,
        'tgi_batch_forward_duration_sum{method="prefill"}': 0.25,
        'tgi_batch_decode_duration_count{method="prefill"}': 1,
        'tgi_batch_decode_duration_sum{method="prefill"}': 0.125,
    }
    metrics.engine_idle()
    idle = samples(metrics)
    assert (idle["tgi_batch_current_size"], idle["tgi_batch_current_max_tokens"]) == (0, 0)


def test_the_time_of_rank_0_is_told():
    metrics = Metrics()
    metrics.rank_worked(0.5, None)
    metrics.rank_worked(0.25, 0.125)
    assert ours(metrics) == {
        "bros_rank_step_duration_count": 2,
        "bros_rank_step_duration_sum": 0.75,
        "bros_rank_idle_duration_count": 1,
        "bros_rank_idle_duration_sum": 0.125,
    }


def test_what_is_ours_is_told_by_class_and_owner():
    metrics = Metrics()
    metrics.observe_first_token(RequestClass.RT, queue_s=0.125, ttft_s=0.5)
    metrics.observe_inter_token(RequestClass.BE, 0.25)
    metrics.set_kv_blocks(rt=3, be=4, cached=6, free=5)
    metrics.prompt_computed(RequestClass.BE, 20, num_cached=16)
    metrics.frame_dropped("malformed")
    metrics.tokens_guessed(4, num_accepted=3)
    assert ours(metrics) == {
        'bros_queue_wait_seconds_count{class="rt"}': 1,
        'bros_queue_wait_seconds_sum{class="rt"}': 0.125,
        'bros_time_to_first_token_seconds_count{class="rt"}': 1,
        'bros_time_to_first_token_seconds_sum{class="rt"}': 0.5,
        'bros_inter_token_latency_seconds_count{class="be"}': 1,
        'bros_inter_token_latency_seconds_sum{class="be"}': 0.25,
        'bros_kv_blocks{owner="rt"}': 3,
        'bros_kv_blocks{owner="be"}': 4,
        'bros_kv_blocks{owner="cached"}': 6,
        'bros_kv_blocks{owner="free"}': 5,
        'bros_prompt_tokens_total{class="be"}': 20,
        'bros_prompt_tokens_cached_total{class="be"}': 16,
        'bros_frames_dropped_total{reason="malformed"}': 1,
        'bros_speculative_tokens_total{outcome="accepted"}': 3,
        'bros_speculative_tokens_total{outcome="rejected"}': 1,
    }
    assert samples(metrics)["tgi_request_skipped_tokens_sum"] == 3


def test_requests_are_counted_by_class_and_how_they_ended():
    metrics = Metrics()
    metrics.request_admitted(RequestClass.RT, Admission.AS_ASKED)
    metrics.request_admitted(RequestClass.RT, Admission.DEGRADED)
    metrics.request_admitted(RequestClass.BE, Admission.AS_ASKED)
    metrics.request_refused(RequestClass.RT)
    metrics.request_ended(RequestClass.RT, "success")
    metrics.request_ended(RequestClass.RT, "overloaded")
    metrics.request_ended(RequestClass.BE, "deadline")
    assert ours(metrics) == {
        'bros_admissions_total{class="rt",admission="as_asked"}': 1,
        'bros_admissions_total{class="rt",admission="degraded"}': 1,
        'bros_admissions_total{class="be",admission="as_asked"}': 1,
        'bros_admissions_total{class="rt",admission="refused"}': 1,
        'bros_requests_total{class="rt",outcome="success"}': 1,
        'bros_requests_total{class="rt",outcome="overloaded"}': 1,
        'bros_requests_total{class="be",outcome="deadline"}': 1,
    }


def test_targets_are_met_one_by_one_and_together():
    metrics = Metrics()
    for is_ttft_met, is_tpot_met in ((True, True), (True, False), (False, True), (False, False)):
        metrics.targets_judged(is_ttft_met=is_ttft_met, is_tpot_met=is_tpot_met)
    assert ours(metrics) == {
        'bros_targets_total{target="ttft",outcome="met"}': 2,
        'bros_targets_total{target="ttft",outcome="missed"}': 2,
        'bros_targets_total{target="tpot",outcome="met"}': 2,
        'bros_targets_total{target="tpot",outcome="missed"}': 2,
        'bros_targets_total{target="both",outcome="met"}': 1,
        'bros_targets_total{target="both",outcome="missed"}': 3,
    }


def test_scheduling_is_told():
    metrics = Metrics()
    metrics.set_sequences(RequestClass.BE, num_running=3, num_waiting=40)
    metrics.set_sequences(RequestClass.BE, num_running=2, num_waiting=41)
    metrics.sequences_relegated(2)
    metrics.sequences_preempted(RequestClass.BE, 3)
    metrics.blocks_copied("out", 5)
    metrics.blocks_copied("in", 4)
    metrics.set_batch_cap(144)
    metrics.step_predicted(1.5, 1.0, margin=1.25)
    metrics.step_predicted(1.5, 2.0, margin=1.125)
    assert ours(metrics) == {
        'bros_sequences{class="be",state="running"}': 2,
        'bros_sequences{class="be",state="waiting"}': 41,
        "bros_relegations_total": 2,
        'bros_preemptions_total{class="be"}': 3,
        'bros_kv_blocks_copied_total{direction="out"}': 5,
        'bros_kv_blocks_copied_total{direction="in"}': 4,
        "bros_batch_cap": 144,
        "bros_step_prediction_margin": 1.125,
        "bros_step_prediction_error_count": 2,
        "bros_step_prediction_error_sum": 0.75,
    }


def test_buckets_are_tgis():
    metrics = Metrics()
    validated(metrics)
    succeeded(metrics)
    metrics.step_sent("decode", num_sequences=1, num_new_sequences=1, num_running=1, max_tokens=1, planning_s=0.0)
    durations = bounds(metrics, "tgi_request_duration")
    assert len(durations) == 35
    assert durations[0] == pytest.approx(0.00015)
    assert durations[-1] == pytest.approx(145.6, rel=1e-3)
    assert bounds(metrics, "tgi_request_input_length") == [2.0 * k for k in range(1, 101)]
    assert bounds(metrics, "tgi_request_generated_tokens") == [4.0 * k for k in range(1, 101)]
    assert bounds(metrics, "tgi_batch_next_size") == [float(k) for k in range(1, 1025)]


def test_types_are_declared_under_the_names_of_the_samples():
    metrics = Metrics()
    metrics.request_received()
    metrics.frame_dropped("malformed")
    lines = metrics.render().decode().splitlines()
    assert "# TYPE tgi_request_count counter" in lines
    assert "# TYPE bros_frames_dropped_total counter" in lines
    assert "# TYPE tgi_queue_size gauge" in lines
    assert not [line for line in lines if "_created" in line]


async def test_the_page_is_plain_text(serve):
    server = await serve()
    await server.client.post("/generate", json={"inputs": "xx"})
    response = await server.client.get("/metrics")
    assert response.headers["content-type"] == "text/plain; charset=utf-8"
    lines = await server.metric_lines()
    for line in ("tgi_request_count 1.0", "tgi_request_success 1.0", "tgi_request_generated_tokens_sum 2.0"):
        assert line in lines
    assert list(text_string_to_metric_families(await response.text()))
