"""The limits that the server derives from the model and the KV region, and where it says it is."""

import socket

import pytest

from bros_router.config import BatchConfig, ServerConfig
from bros_router.model_source import DEMO_MODEL_ID, demo_model_path, read
from bros_router.server import served_model, url_of
from bros_router.startup_error import UsageError
from bros_shard.protocol import PROTOCOL_VERSION, Hello

FILES = read(demo_model_path(), DEMO_MODEL_ID, None)


def hello(max_length: int = 2048, num_blocks: int = 1000) -> Hello:
    return Hello(
        0,
        PROTOCOL_VERSION,
        0,
        2,
        "m",
        None,
        "bfloat16",
        "nvidia-h200",
        max_length,
        max_length,
        num_blocks,
        64,
        0,
        1,
        False,
    )


@pytest.mark.parametrize(
    ("given", "max_length", "num_blocks", "expected"),
    [
        ({}, 2048, 1000, (2047, 2048)),  # what the model was made for
        ({}, 2048, 10, (639, 640)),  # what the KV region holds
        ({"max_total_tokens": 512}, 2048, 1000, (511, 512)),
        ({"max_input_tokens": 100}, 2048, 1000, (100, 2048)),
        ({"max_input_tokens": 100, "max_total_tokens": 200}, 2048, 1000, (100, 200)),
    ],
)
def test_limits(given, max_length, num_blocks, expected):
    config = ServerConfig(batch=BatchConfig(**given))
    model = served_model(config, FILES, hello(max_length, num_blocks))
    assert (model.max_input_tokens, model.max_total_tokens) == expected
    assert model.compute_type == "2-nvidia-h200"


@pytest.mark.parametrize("given", [{"max_total_tokens": 641}, {"max_input_tokens": 640}])
def test_limits_beyond_the_kv_region_are_refused_with_a_hint(given):
    with pytest.raises(UsageError, match=r"must be less than|--kv-cache-memory"):
        served_model(ServerConfig(batch=BatchConfig(**given)), FILES, hello(num_blocks=10))


@pytest.mark.parametrize(
    ("family", "host", "shown"),
    [
        (socket.AF_INET, "127.0.0.1", "127.0.0.1"),
        (socket.AF_INET, "0.0.0.0", "127.0.0.1"),
        (socket.AF_INET6, "::1", "[::1]"),
    ],
)
def test_url_can_be_asked_on_this_machine(family, host, shown):
    with socket.socket(family) as listener:
        listener.bind((host, 0))
        assert url_of(listener) == f"http://{shown}:{listener.getsockname()[1]}"
