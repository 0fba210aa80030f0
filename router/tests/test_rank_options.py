"""What the ranks are told of the server's configuration."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from bros_router.config import RankConfig, SchedulingConfig, ServerConfig
from bros_router.model_source import ModelFiles
from bros_router.rank_options import rank_options
from bros_router.tokenizer import Tokenizer
from bros_shard.options import ShardOptions


@pytest.fixture
def files(byte_level_tokenizer: Tokenizer) -> ModelFiles:
    return ModelFiles(
        Path("/models/m"), "org/m", "abc", None, byte_level_tokenizer, None, frozenset(), None, None, 300, "bfloat16"
    )


def test_memory_is_divided_among_the_ranks(files: ModelFiles) -> None:
    ranks = RankConfig(num_shard=2, kv_cache_memory_bytes=1000, kv_host_memory_bytes=501)
    options = rank_options(ServerConfig(ranks=ranks), files, "ipc:///e")
    assert (options.kv_memory_bytes, options.host_memory_bytes) == (500, 251)
    options = rank_options(ServerConfig(ranks=replace(ranks, kv_host_memory_bytes=0)), files, "ipc:///e")
    assert options.host_memory_bytes == 0  # each rank sees for itself


def test_who_recomputes_needs_no_host_pool(files: ModelFiles) -> None:
    config = ServerConfig(
        ranks=RankConfig(kv_host_memory_bytes=500), scheduling=SchedulingConfig(kv_preemption="recompute")
    )
    assert rank_options(config, files, "ipc:///e").host_memory_bytes == -1


def test_options_survive_the_command_line(files: ModelFiles) -> None:
    config = ServerConfig(scheduling=SchedulingConfig(kv_preemption="recompute", profile_grid="full"))
    adapters = {"org/one": Path("/adapters/1"), 'a "b" é': Path("/adapters/2 3")}
    options = rank_options(config, files, "ipc:///e", adapters=adapters)
    assert options.profile_grid == "full"
    assert list(options.adapter_folders.items()) == list(adapters.items())
    assert ShardOptions.from_argv(options.to_argv()) == options
