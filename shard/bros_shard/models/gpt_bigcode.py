"""GPTBigCode (SantaCoder, StarCoder): the GPT-2 decoder whose heads may share one key head."""

from __future__ import annotations

from dataclasses import replace

from bros_shard.model_config import ConfigFields
from bros_shard.models.attention import QKVLayout
from bros_shard.models.gpt2 import GPT2Config, read_gpt2
from bros_shard.models.model import ModelLimits


def read_gpt_bigcode(config: ConfigFields, limits: ModelLimits) -> GPT2Config:
    """`GPTBigCodeForCausalLM`. In which precision scores and their softmax are computed is not the model's to say."""
    shared = read_gpt2(config.with_defaults({"activation_function": "gelu_pytorch_tanh"}), limits)
    return replace(
        shared,
        num_kv_heads=1 if config.boolean("multi_query", True) else shared.num_heads,
        qkv_layout=QKVLayout.BY_KEY_HEAD,
        are_matrices_transposed=False,
    )
