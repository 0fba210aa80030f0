"""The GPT-NeoX decoder (Pythia too): attention and an MLP beside each other, heads of which a part is rotated."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from bros_kernels.linear import Activation
from bros_kernels.paged_attention import Angles, PagedAttention
from bros_shard.model_config import ConfigFields
from bros_shard.models.attention import Attention, QKVLayout, fused_qkv
from bros_shard.models.heads import Heads
from bros_shard.models.layers import MLP, LayerNorm, Vocabulary, check_divisible, read_activation
from bros_shard.models.model import LayerKV, ModelLimits
from bros_shard.models.projections import row_parallel
from bros_shard.models.rotary import RopeFrequencies, Rotary, read_rope
from bros_shard.models.rotary_decoder import RotaryDecoder
from bros_shard.weights import RankWeights


@dataclass(frozen=True, kw_only=True)
class GPTNeoXConfig:
    """What makes one GPT-NeoX model differ from another."""

    vocab_size: int
    hidden_size: int
    inner_size: int
    num_layers: int
    num_heads: int
    max_length: int
    norm_eps: float
    activation: Activation
    rope: RopeFrequencies
    has_attention_bias: bool
    is_parallel: bool  # the MLP sees what attention sees, not what it gives
    is_head_tied: bool


def read_gpt_neox(config: ConfigFields, limits: ModelLimits) -> GPTNeoXConfig:
    """`GPTNeoXForCausalLM`. The rotary embedding's parameters had names of their own once."""
    hidden_size = config.integer("hidden_size")
    num_heads = config.integer("num_attention_heads")
    if hidden_size % num_heads:
        raise config.refusal("num_attention_heads", f"does not divide hidden_size = {hidden_size}")
    max_length = limits.max_length or limits.extended(config.integer("max_position_embeddings"))
    config = config.with_defaults(
        {
            "rope_theta": config.number("rotary_emb_base", 10_000.0),
            "partial_rotary_factor": config.number("rotary_pct", 0.25),
        }
    )
    return GPTNeoXConfig(
        vocab_size=config.integer("vocab_size"),
        hidden_size=hidden_size,
        inner_size=config.integer("intermediate_size"),
        num_layers=config.integer("num_hidden_layers"),
        num_heads=num_heads,
        max_length=max_length,
        norm_eps=config.number("layer_norm_eps", 1e-5),
        activation=read_activation(config, "hidden_act", "gelu"),
        rope=read_rope(config, hidden_size // num_heads, max_length, limits.rope_override, is_partial=True),
        has_attention_bias=config.boolean("attention_bias", True),
        is_parallel=config.boolean("use_parallel_residual", True),
        is_head_tied=config.boolean("tie_word_embeddings", False),
    )


class GPTNeoX(RotaryDecoder):
    """The whole model."""

    def __init__(self, config: GPTNeoXConfig, weights: RankWeights) -> None:
        check_divisible(weights.parallel, config.num_heads, config.num_heads, config.inner_size)
        hidden_size = config.hidden_size
        self.vocab_size = config.vocab_size
        self.max_length = config.max_length
        heads = Heads(weights.parallel, config.num_heads, config.num_heads, hidden_size // config.num_heads)
        self.kv_shape = heads.kv_shape(config.num_layers)
        # Checkpoints call the head `embed_out`, unless transformers 5 was asked not to save in their format.
        head_name = "lm_head" if "lm_head.weight" in weights.checkpoint else "embed_out"
        self._vocabulary = Vocabulary(
            weights, "gpt_neox.embed_in", None if config.is_head_tied else head_name, config.vocab_size, hidden_size
        )
        self._rotary = Rotary(config.rope, weights.device, weights.dtype)
        self._layers = [
            GPTNeoXLayer(config, heads, weights, f"gpt_neox.layers.{index}") for index in range(config.num_layers)
        ]
        self._norm = LayerNorm(weights, "gpt_neox.final_layer_norm", hidden_size, config.norm_eps)


class GPTNeoXLayer:
    """Attention and an MLP, each normalised before and added to what came in."""

    def __init__(self, config: GPTNeoXConfig, heads: Heads, weights: RankWeights, prefix: str) -> None:
        hidden_size, has_bias = config.hidden_size, config.has_attention_bias
        name = f"{prefix}.attention"
        self._is_parallel = config.is_parallel
        self._attention_norm = LayerNorm(weights, f"{prefix}.input_layernorm", hidden_size, config.norm_eps)
        self._attention = Attention(
            heads.attention_layer(),
            fused_qkv(weights, f"{name}.query_key_value", heads, hidden_size, QKVLayout.BY_KEY_HEAD, has_bias),
            row_parallel(weights, f"{name}.dense", hidden_size, hidden_size, has_bias),
        )
        self._mlp_norm = LayerNorm(weights, f"{prefix}.post_attention_layernorm", hidden_size, config.norm_eps)
        names = f"{prefix}.mlp.dense_h_to_4h", f"{prefix}.mlp.dense_4h_to_h"
        self._mlp = MLP(weights, names, hidden_size, config.inner_size, config.activation, has_bias=True)

    def __call__(self, hidden: Tensor, angles: Angles, kv: LayerKV, attention: PagedAttention) -> Tensor:
        attended = self._attention(self._attention_norm(hidden), hidden, angles, kv, attention)
        return self._mlp(self._mlp_norm(hidden if self._is_parallel else attended), attended)
