"""The configuration: TGI's names and defaults, and values that cannot be."""

from dataclasses import FrozenInstanceError

import pytest

from bros_router.admission import AdmissionPolicy
from bros_router.config import (
    SECTIONS,
    ApiConfig,
    BatchConfig,
    ConfigError,
    HubConfig,
    RankConfig,
    SchedulingConfig,
    ServerConfig,
    flags_of,
)
from bros_router.kv.kv_manager import Preemption
from bros_router.request import RequestClass
from bros_router.scheduling.batch_cap import CapControl
from bros_router.scheduling.policies.registry import POLICY_NAMES

FLAGS = {flag.option: flag for _, _, config_class in SECTIONS for flag in flags_of(config_class).values()}


def default_of(option: str) -> object:
    for section, _, config_class in SECTIONS:
        for name, flag in flags_of(config_class).items():
            if flag.option == option:
                return getattr(getattr(ServerConfig(), section), name)
    raise AssertionError(option)


@pytest.mark.parametrize(
    ("option", "variable", "default"),
    [
        ("--revision", "REVISION", None),
        ("--validation-workers", "VALIDATION_WORKERS", 2),
        ("--max-concurrent-requests", "MAX_CONCURRENT_REQUESTS", 128),
        ("--max-best-of", "MAX_BEST_OF", 2),
        ("--max-stop-sequences", "MAX_STOP_SEQUENCES", 4),
        ("--max-top-n-tokens", "MAX_TOP_N_TOKENS", 5),
        ("--max-input-tokens", "MAX_INPUT_TOKENS", None),
        ("--max-total-tokens", "MAX_TOTAL_TOKENS", None),
        ("--max-batch-size", "MAX_BATCH_SIZE", 256),
        ("--hostname", "HOSTNAME", "0.0.0.0"),
        ("--port", "PORT", 3000),
        ("--huggingface-hub-cache", "HUGGINGFACE_HUB_CACHE", None),
        ("--cuda-memory-fraction", "CUDA_MEMORY_FRACTION", 1.0),
        ("--rope-scaling", "ROPE_SCALING", None),
        ("--rope-factor", "ROPE_FACTOR", None),
        ("--json-output", "JSON_OUTPUT", False),
        ("--cors-allow-origin", "CORS_ALLOW_ORIGIN", ()),
        ("--api-key", "API_KEY", None),
        ("--tokenizer-config-path", "TOKENIZER_CONFIG_PATH", None),
        ("--max-client-batch-size", "MAX_CLIENT_BATCH_SIZE", 4),
        ("--payload-limit", "PAYLOAD_LIMIT", 2_000_000),
        ("--graceful-termination-timeout", "GRACEFUL_TERMINATION_TIMEOUT", 90),
    ],
)
def test_names_and_defaults_are_those_of_tgi(option, variable, default):
    assert FLAGS[option].variable == variable
    assert default_of(option) == default


def test_variables_of_our_own_flags_meet_nobody_elses():
    """`BLOCK_SIZE`, for one, belongs to coreutils."""
    ours = {option: flag.variable for option, flag in FLAGS.items() if flag.is_ours}
    assert ours == {
        "--max-concurrent-be-requests": "BROS_MAX_CONCURRENT_BE_REQUESTS",
        "--default-class": "BROS_DEFAULT_CLASS",
        "--slo-ttft-ms": "BROS_SLO_TTFT_MS",
        "--slo-tpot-ms": "BROS_SLO_TPOT_MS",
        "--strict-tgi": "BROS_STRICT_TGI",
        "--scheduler": "BROS_SCHEDULER",
        "--admission-policy": "BROS_ADMISSION_POLICY",
        "--max-queued-rt-tokens": "BROS_MAX_QUEUED_RT_TOKENS",
        "--max-queued-be-tokens": "BROS_MAX_QUEUED_BE_TOKENS",
        "--kv-preemption": "BROS_KV_PREEMPTION",
        "--kv-checkpoints": "BROS_KV_CHECKPOINTS",
        "--batch-size-control": "BROS_BATCH_SIZE_CONTROL",
        "--be-max-wait-s": "BROS_BE_MAX_WAIT_S",
        "--be-floor": "BROS_BE_FLOOR",
        "--static-be-requests": "BROS_STATIC_BE_REQUESTS",
        "--priority-preemption": "BROS_PRIORITY_PREEMPTION",
        "--profile-grid": "BROS_PROFILE_GRID",
        "--kv-host-memory": "BROS_KV_HOST_MEMORY",
        "--device": "BROS_DEVICE",
        "--kernels": "BROS_KERNELS",
        "--kv-cache-memory": "BROS_KV_CACHE_MEMORY",
        "--kv-slots-limit": "BROS_KV_SLOTS_LIMIT",
        "--block-size": "BROS_BLOCK_SIZE",
        "--disable-prefix-caching": "BROS_DISABLE_PREFIX_CACHING",
        "--api-key-scope": "BROS_API_KEY_SCOPE",
        "--kserve": "BROS_KSERVE",
        "--cpu-threads": "BROS_CPU_THREADS",
    }


@pytest.mark.parametrize(
    ("config_class", "name", "values"),
    [
        (ApiConfig, "default_class", tuple(item.value for item in RequestClass)),
        (SchedulingConfig, "scheduler", POLICY_NAMES),
        (SchedulingConfig, "admission_policy", tuple(item.value for item in AdmissionPolicy)),
        (SchedulingConfig, "kv_preemption", tuple(item.value for item in Preemption)),
        (SchedulingConfig, "batch_size_control", tuple(item.value for item in CapControl)),
    ],
)
def test_choices_are_those_that_the_code_knows(config_class, name, values):
    assert flags_of(config_class)[name].choices == values
    assert getattr(config_class(), name) in values


@pytest.mark.parametrize(
    ("max_input_tokens", "max_total_tokens"),
    [(None, None), (None, 10), (10, None), (9, 10), (1, 2)],
)
def test_limits_that_leave_room_for_a_reply(max_input_tokens, max_total_tokens):
    BatchConfig(max_input_tokens=max_input_tokens, max_total_tokens=max_total_tokens)


@pytest.mark.parametrize(("max_input_tokens", "max_total_tokens"), [(10, 10), (11, 10)])
def test_limits_that_leave_no_room_for_a_reply(max_input_tokens, max_total_tokens):
    with pytest.raises(ConfigError, match=r"--max-input-tokens \(1[01]\) must be less than --max-total-tokens \(10\)"):
        BatchConfig(max_input_tokens=max_input_tokens, max_total_tokens=max_total_tokens)


@pytest.mark.parametrize("block_size", [0, 1, 8, 48, 512])
def test_block_size_that_no_kernel_has(block_size):
    with pytest.raises(ConfigError, match="--block-size"):
        RankConfig(block_size=block_size)


def test_prompts_are_told_of_in_frames_that_are_not_too_long():
    batch = BatchConfig(max_batch_prefill_tokens=100_001)
    ServerConfig(batch=batch)
    with pytest.raises(ConfigError, match="--max-batch-prefill-tokens"):
        ServerConfig(batch=batch, api=ApiConfig(enable_prefill_logprobs=True))


@pytest.mark.parametrize("api_key", ["", "  "])
def test_key_that_would_guard_nothing(api_key):
    with pytest.raises(ConfigError, match="--api-key is empty"):
        ApiConfig(api_key=api_key)


def test_secrets_are_not_shown():
    config = ServerConfig(api=ApiConfig(api_key="key-secret"), hub=HubConfig(token="token-secret"))
    assert "secret" not in repr(config)


def test_nothing_edits_the_configuration():
    with pytest.raises(FrozenInstanceError):
        ServerConfig().http.port = 1  # type: ignore[misc]
