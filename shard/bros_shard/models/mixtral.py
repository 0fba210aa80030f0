"""Mixtral: the Mistral decoder with experts in every layer."""

from __future__ import annotations

from dataclasses import replace

from bros_shard.model_config import ConfigFields
from bros_shard.models.experts import ExpertsConfig, read_num_chosen
from bros_shard.models.llama import LlamaConfig, read_dimensions
from bros_shard.models.model import ModelLimits
from bros_shard.models.windows import read_window


def read_mixtral(config: ConfigFields, limits: ModelLimits) -> LlamaConfig:
    """`MixtralForCausalLM`."""
    config = config.with_defaults({"rms_norm_eps": 1e-5, "rope_theta": 1e6})
    dimensions = read_dimensions(config, limits, num_kv_heads=8)
    num_experts = config.integer("num_local_experts", 8)
    experts = ExpertsConfig(
        num_experts=num_experts,
        num_chosen=read_num_chosen(config, num_experts, 2),
        inner_size=dimensions.inner_size,
        is_renormalised=True,
        block_name="block_sparse_moe",
        projection_names=("w1", "w3", "w2"),
    )
    return replace(
        dimensions,
        windows=(read_window(config),) * dimensions.num_layers,
        experts=(experts,) * dimensions.num_layers,
    )
