"""The Falcon decoders: of 7B (one key head, one norm a layer), of 40B and 11B (groups of heads, two norms or one)."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

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


class FalconOrder(Enum):
    """How attention and the MLP of a layer stand to each other."""

    ONE_NORM = "beside each other, of the same normalised input"
    TWO_NORMS = "beside each other, each with a norm of its own"
    SEQUENTIAL = "the MLP after attention, each with a norm of its own"


#: What the norms before attention and before the MLP are called.
_NORM_NAMES = {
    FalconOrder.ONE_NORM: ("input_layernorm", None),
    FalconOrder.TWO_NORMS: ("ln_attn", "ln_mlp"),
    FalconOrder.SEQUENTIAL: ("input_layernorm", "post_attention_layernorm"),
}


@dataclass(frozen=True, kw_only=True)
class FalconConfig:
    """What makes one Falcon model differ from another."""

    vocab_size: int
    hidden_size: int
    inner_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    max_length: int
    norm_eps: float
    activation: Activation
    rope: RopeFrequencies
    order: FalconOrder
    has_bias: bool
    is_head_tied: bool


def read_falcon(config: ConfigFields, limits: ModelLimits) -> FalconConfig:
    """`FalconForCausalLM`, except those that see distances by a bias of the scores (ALiBi)."""
    if config.boolean("alibi", False):
        raise config.refusal("alibi", "biases of the scores are not supported")
    hidden_size = config.integer("hidden_size")
    num_heads = config.integer("num_attention_heads")
    head_dim = hidden_size // num_heads
    if hidden_size % num_heads or head_dim % 2:
        raise config.refusal("num_attention_heads", f"does not divide hidden_size = {hidden_size} into even heads")
    max_length = limits.max_length or limits.extended(config.integer("max_position_embeddings", 2048))
    return FalconConfig(
        vocab_size=config.integer("vocab_size"),
        hidden_size=hidden_size,
        inner_size=config.integer("ffn_hidden_size", 4 * hidden_size),
        num_layers=config.integer("num_hidden_layers"),
        num_heads=num_heads,
        num_kv_heads=_read_num_kv_heads(config, num_heads),
        max_length=max_length,
        norm_eps=config.number("layer_norm_epsilon", 1e-5),
        activation=read_activation(config, "activation", "gelu"),
        rope=read_rope(config, head_dim, max_length, limits.rope_override),
        order=_read_order(config),
        has_bias=config.boolean("bias", False),
        is_head_tied=config.boolean("tie_word_embeddings", True),
    )


def _read_num_kv_heads(config: ConfigFields, num_heads: int) -> int:
    if config.boolean("new_decoder_architecture", False):
        return config.integer("num_kv_heads", num_heads)
    if config.boolean("multi_query", True):
        return 1
    if config.integer("num_kv_heads", num_heads) != num_heads:
        raise config.refusal("num_kv_heads", "groups of heads need new_decoder_architecture")
    return num_heads


def _read_order(config: ConfigFields) -> FalconOrder:
    is_new = config.boolean("new_decoder_architecture", False)
    most_norms = 2 if is_new else 1
    num_norms = config.integer("num_ln_in_parallel_attn", most_norms)
    if num_norms > most_norms:
        raise config.refusal("num_ln_in_parallel_attn", "the layer has no use for so many norms")
    if config.boolean("parallel_attn", True):
        return FalconOrder.TWO_NORMS if num_norms == 2 else FalconOrder.ONE_NORM
    if is_new:
        raise config.refusal("parallel_attn", "new_decoder_architecture is always parallel")
    return FalconOrder.SEQUENTIAL


class Falcon(RotaryDecoder):
    """The whole model."""

    def __init__(self, config: FalconConfig, weights: RankWeights) -> None:
        check_divisible(weights.parallel, config.num_heads, config.num_kv_heads, config.inner_size)
        hidden_size = config.hidden_size
        self.vocab_size = config.vocab_size
        self.max_length = config.max_length
        heads = Heads(weights.parallel, config.num_heads, config.num_kv_heads, hidden_size // config.num_heads)
        self.kv_shape = heads.kv_shape(config.num_layers)
        head_name = None if config.is_head_tied else "lm_head"
        embedding_name = "transformer.word_embeddings"
        self._vocabulary = Vocabulary(weights, embedding_name, head_name, config.vocab_size, hidden_size)
        self._rotary = Rotary(config.rope, weights.device, weights.dtype)
        self._layers = [
            FalconLayer(config, heads, weights, f"transformer.h.{index}") for index in range(config.num_layers)
        ]
        self._norm = LayerNorm(weights, "transformer.ln_f", hidden_size, config.norm_eps)


class FalconLayer:
    """Attention and an MLP, normalised before and added to what came in."""

    def __init__(self, config: FalconConfig, heads: Heads, weights: RankWeights, prefix: str) -> None:
        hidden_size, has_bias, name = config.hidden_size, config.has_bias, f"{prefix}.self_attention"
        attention_norm_name, mlp_norm_name = _NORM_NAMES[config.order]
        self._order = config.order
        self._attention_norm = LayerNorm(weights, f"{prefix}.{attention_norm_name}", hidden_size, config.norm_eps)
        self._mlp_norm: LayerNorm | None = None
        if mlp_norm_name is not None:
            self._mlp_norm = LayerNorm(weights, f"{prefix}.{mlp_norm_name}", hidden_size, config.norm_eps)
        self._attention = Attention(
            heads.attention_layer(),
            fused_qkv(weights, f"{name}.query_key_value", heads, hidden_size, QKVLayout.BY_KEY_HEAD, has_bias),
            row_parallel(weights, f"{name}.dense", hidden_size, hidden_size, has_bias),
        )
        names = f"{prefix}.mlp.dense_h_to_4h", f"{prefix}.mlp.dense_4h_to_h"
        self._mlp = MLP(weights, names, hidden_size, config.inner_size, config.activation, has_bias)

    def __call__(self, hidden: Tensor, angles: Angles, kv: LayerKV, attention: PagedAttention) -> Tensor:
        normed = self._attention_norm(hidden)
        attended = self._attention(normed, hidden, angles, kv, attention)
        if self._mlp_norm is not None:
            normed = self._mlp_norm(attended if self._order is FalconOrder.SEQUENTIAL else hidden)
        return self._mlp(normed, attended)
