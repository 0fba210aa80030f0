"""Phi-3: the Llama decoder with fused projections, maybe a window, and heads of which a part may be rotated."""

from __future__ import annotations

from dataclasses import replace

from bros_shard.model_config import ConfigFields
from bros_shard.models.llama import LlamaConfig, read_dimensions
from bros_shard.models.model import ModelLimits
from bros_shard.models.rotary import rope_fields
from bros_shard.models.windows import read_window


def read_phi3(config: ConfigFields, limits: ModelLimits) -> LlamaConfig:
    """`Phi3ForCausalLM`, which is Phi-4 too.

    `yarn` is refused: the first configs of this family meant LongRoPE by it.
    """
    rope = rope_fields(config)
    if rope.text("rope_type") not in ("default", "longrope", "su"):
        raise rope.refusal("rope_type", "this family has default and longrope")
    if config.boolean("attention_bias", False):
        raise config.refusal("attention_bias", "this family has none")
    config = config.with_defaults({"rms_norm_eps": 1e-5, "original_max_position_embeddings": 4096})
    dimensions = read_dimensions(config, limits, is_rotation_partial=True)
    return replace(dimensions, is_fused=True, windows=(read_window(config),) * dimensions.num_layers)
