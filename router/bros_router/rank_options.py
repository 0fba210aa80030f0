"""From the server's configuration and the resolved model to the command line of its ranks."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType

from bros_router.config import ServerConfig
from bros_router.model_source import ModelFiles
from bros_shard.options import ShardOptions


def rank_options(
    config: ServerConfig,
    files: ModelFiles,
    endpoint: str,
    guided_tokenizer: Path | None = None,
    adapters: Mapping[str, Path] = MappingProxyType({}),
) -> ShardOptions:
    """The options of rank 0 in generation 0, without a rendezvous: each generation of ranks has its own.

    Args:
        endpoint: where the ranks connect.
        guided_tokenizer: what grammars are compiled for; `None`: nothing is guided.
        adapters: folders by id.
    """
    ranks, model = config.ranks, config.model
    return ShardOptions(
        endpoint=endpoint,
        rendezvous="",
        model_path=str(files.path),
        model_id=files.model_id,
        model_sha=files.sha or "",
        tokenizer_path=str(guided_tokenizer or ""),
        eos_token_ids=",".join(map(str, sorted(files.eos_token_ids))),
        world_size=ranks.num_shard,
        device=ranks.device,
        dtype=model.dtype,
        kernels=ranks.kernels,
        quantize=model.quantize or "",
        block_size=ranks.block_size,
        kv_memory_bytes=ranks.kv_cache_memory_bytes // ranks.num_shard,
        kv_slots_limit=ranks.kv_slots_limit,
        host_memory_bytes=_host_memory_bytes(config),
        gpu_memory_fraction=ranks.cuda_memory_fraction,
        max_length=config.batch.max_total_tokens or 0,
        max_batch_tokens=config.batch.max_batch_prefill_tokens,
        profile_grid=config.scheduling.profile_grid,
        rope_scaling=model.rope_scaling or "",
        rope_factor=model.rope_factor or 1.0,
        adapters=json.dumps({adapter_id: str(folder) for adapter_id, folder in adapters.items()}),
        num_threads=ranks.cpu_threads,
    )


def _host_memory_bytes(config: ServerConfig) -> int:
    """What each rank's host pool may take; 0: it sees for itself, -1: there is none, since nothing would be copied."""
    if config.scheduling.kv_preemption == "recompute":
        return -1
    # Rounded up, since 0 would say something else.
    return -(-config.ranks.kv_host_memory_bytes // config.ranks.num_shard)
