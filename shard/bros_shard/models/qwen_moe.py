"""The Qwen2 and Qwen3 decoders with experts in some layers or all."""

from __future__ import annotations

from dataclasses import replace

from bros_shard.model_config import ConfigFields
from bros_shard.models.experts import ExpertsConfig, read_num_chosen
from bros_shard.models.llama import LlamaConfig, read_dimensions
from bros_shard.models.model import ModelLimits
from bros_shard.models.windows import FULL, SLIDING, read_layer_types, windows_of


def read_qwen2_moe(config: ConfigFields, limits: ModelLimits) -> LlamaConfig:
    """`Qwen2MoeForCausalLM`: one expert is shared. Of the first layers, unlike in Qwen2, every other has the window."""
    dimensions = read_dimensions(config, limits, num_kv_heads=16)
    stop = config.integer("max_window_layers", 28, minimum=0)
    layer_types = [FULL if index % 2 or index >= stop else SLIDING for index in range(dimensions.num_layers)]
    num_experts = config.integer("num_experts", 60)
    experts = ExpertsConfig(
        num_experts=num_experts,
        num_chosen=read_num_chosen(config, num_experts, 4),
        inner_size=config.integer("moe_intermediate_size", 1408),
        is_renormalised=config.boolean("norm_topk_prob", False),
        shared_inner_size=config.integer("shared_expert_intermediate_size", 5632),
    )
    return replace(
        dimensions,
        has_qkv_bias=config.boolean("qkv_bias", True),
        windows=windows_of(read_layer_types(config, layer_types), _read_window(config)),
        experts=_of_layers(config, dimensions.num_layers, experts),
    )


def read_qwen3_moe(config: ConfigFields, limits: ModelLimits) -> LlamaConfig:
    """`Qwen3MoeForCausalLM`: a window is every layer's."""
    dimensions = read_dimensions(config, limits, num_kv_heads=4)
    has_bias = config.boolean("attention_bias", False)
    # transformers 5 writes the other name than the models on the hub have.
    num_experts = config.integer("num_experts", config.integer("num_local_experts", 128))
    experts = ExpertsConfig(
        num_experts=num_experts,
        num_chosen=read_num_chosen(config, num_experts, 8),
        inner_size=config.integer("moe_intermediate_size", 768),
        is_renormalised=config.boolean("norm_topk_prob", False),
    )
    return replace(
        dimensions,
        has_qk_norm=True,
        has_qkv_bias=has_bias,
        has_output_bias=has_bias,
        windows=(_read_window(config),) * dimensions.num_layers,
        experts=_of_layers(config, dimensions.num_layers, experts),
    )


def _read_window(config: ConfigFields) -> int | None:
    return config.integer("sliding_window", 4096) if config.boolean("use_sliding_window", False) else None


def _of_layers(config: ConfigFields, num_layers: int, experts: ExpertsConfig) -> tuple[ExpertsConfig | None, ...]:
    """Every `decoder_sparse_step`-th layer has experts, unless `mlp_only_layers` names it."""
    step = config.integer("decoder_sparse_step", 1)
    dense = [] if config.is_null("mlp_only_layers") else config.items("mlp_only_layers")
    return tuple(None if (index + 1) % step or index in dense else experts for index in range(num_layers))
