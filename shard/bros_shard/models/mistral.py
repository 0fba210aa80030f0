"""Mistral: the Llama decoder with a sliding window in every layer."""

from __future__ import annotations

from dataclasses import replace

from bros_shard.model_config import ConfigFields
from bros_shard.models.llama import LlamaConfig, read_dimensions
from bros_shard.models.model import ModelLimits
from bros_shard.models.windows import read_window


def read_mistral(config: ConfigFields, limits: ModelLimits) -> LlamaConfig:
    """`MistralForCausalLM`."""
    dimensions = read_dimensions(config, limits, num_kv_heads=8)
    return replace(dimensions, windows=(read_window(config, 4096),) * dimensions.num_layers)
