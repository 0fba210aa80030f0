"""Qwen2 and Qwen3: the Llama decoder with biases or normalised heads, and windows in some layers."""

from __future__ import annotations

from dataclasses import replace

from bros_shard.model_config import ConfigFields
from bros_shard.models.llama import LlamaConfig, read_dimensions
from bros_shard.models.model import ModelLimits
from bros_shard.models.windows import FULL, SLIDING, read_layer_types, windows_of


def read_qwen2(config: ConfigFields, limits: ModelLimits) -> LlamaConfig:
    """`Qwen2ForCausalLM`."""
    dimensions = read_dimensions(config, limits, num_kv_heads=32)
    return replace(dimensions, has_qkv_bias=True, windows=_windows(config, dimensions.num_layers))


def read_qwen3(config: ConfigFields, limits: ModelLimits) -> LlamaConfig:
    """`Qwen3ForCausalLM`. An absent `head_dim` means 128."""
    if config.is_null("head_dim"):
        config = config.updated({"head_dim": 128})
    dimensions = read_dimensions(config, limits, num_kv_heads=32)
    has_bias = config.boolean("attention_bias", False)
    return replace(
        dimensions,
        has_qk_norm=True,
        has_qkv_bias=has_bias,
        has_output_bias=has_bias,
        windows=_windows(config, dimensions.num_layers),
    )


def _windows(config: ConfigFields, num_layers: int) -> tuple[int | None, ...]:
    """The window of each layer, from `layer_types` where the config has them, else from `max_window_layers`."""
    window = config.integer("sliding_window", 4096) if config.boolean("use_sliding_window", False) else None
    first_sliding = config.integer("max_window_layers", 28, minimum=0)
    layer_types = [SLIDING if index >= first_sliding else FULL for index in range(num_layers)]
    return windows_of(read_layer_types(config, layer_types), window)
