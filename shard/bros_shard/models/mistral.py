"""Mistral: the Llama decoder with a sliding window in every layer."""

from __future__ import annotations

from dataclasses import replace

from bros_shard.model_config import ConfigFields
from bros_shard.models.llama import LlamaConfig, read_dimensions
from bros_shard.models.model import ModelLimits


def read_mistral(config: ConfigFields, limits: ModelLimits) -> LlamaConfig:
    """`MistralForCausalLM`. An absent `sliding_window` means 4096, a null one none."""
    dimensions = read_dimensions(config, limits, num_kv_heads=8)
    if config.has("sliding_window") and config.is_null("sliding_window"):
        return dimensions
    window = config.integer("sliding_window", 4096)
    return replace(dimensions, windows=(window,) * dimensions.num_layers)
