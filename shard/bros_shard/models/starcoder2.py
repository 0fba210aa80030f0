"""The StarCoder2 decoder: rotary embeddings and shared key heads, but LayerNorms, biases and a plain MLP."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from bros_kernels.linear import Activation
from bros_kernels.paged_attention import Angles, PagedAttention
from bros_shard.model_config import ConfigFields
from bros_shard.models.attention import Attention, separate_qkv
from bros_shard.models.heads import Heads
from bros_shard.models.layers import MLP, LayerNorm, Vocabulary, check_divisible, read_activation
from bros_shard.models.model import LayerKV, ModelLimits
from bros_shard.models.projections import row_parallel
from bros_shard.models.rotary import RopeFrequencies, Rotary, read_rope
from bros_shard.models.rotary_decoder import RotaryDecoder
from bros_shard.models.windows import read_window
from bros_shard.weights import RankWeights


@dataclass(frozen=True, kw_only=True)
class Starcoder2Config:
    """What makes one StarCoder2 model differ from another."""

    vocab_size: int
    hidden_size: int
    inner_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    max_length: int
    norm_eps: float
    activation: Activation
    rope: RopeFrequencies
    window: int | None
    has_bias: bool
    is_head_tied: bool


def read_starcoder2(config: ConfigFields, limits: ModelLimits) -> Starcoder2Config:
    """`Starcoder2ForCausalLM`. The first configs name the kinds of norm and MLP, of which there is one each."""
    for name, only in (("norm_type", "layer_norm"), ("mlp_type", "default")):
        if config.text(name, only) != only:
            raise config.refusal(name, f"only {only} is supported")
    hidden_size = config.integer("hidden_size")
    num_heads = config.integer("num_attention_heads")
    head_dim = config.integer("head_dim", hidden_size // num_heads)
    if head_dim % 2:
        raise config.refusal("head_dim", "must be even")
    max_length = limits.max_length or limits.extended(config.integer("max_position_embeddings"))
    return Starcoder2Config(
        vocab_size=config.integer("vocab_size"),
        hidden_size=hidden_size,
        inner_size=config.integer("intermediate_size"),
        num_layers=config.integer("num_hidden_layers"),
        num_heads=num_heads,
        num_kv_heads=config.integer("num_key_value_heads", 2),
        head_dim=head_dim,
        max_length=max_length,
        norm_eps=config.number("norm_epsilon", 1e-5),
        activation=read_activation(config, "hidden_act", "gelu_pytorch_tanh"),
        rope=read_rope(config, head_dim, max_length, limits.rope_override),
        window=read_window(config),
        has_bias=config.boolean("use_bias", True),
        is_head_tied=config.boolean("tie_word_embeddings", True),
    )


class Starcoder2(RotaryDecoder):
    """The whole model."""

    def __init__(self, config: Starcoder2Config, weights: RankWeights) -> None:
        check_divisible(weights.parallel, config.num_heads, config.num_kv_heads, config.inner_size)
        hidden_size = config.hidden_size
        self.vocab_size = config.vocab_size
        self.max_length = config.max_length
        heads = Heads(weights.parallel, config.num_heads, config.num_kv_heads, config.head_dim)
        self.kv_shape = heads.kv_shape(config.num_layers)
        head_name = None if config.is_head_tied else "lm_head"
        self._vocabulary = Vocabulary(weights, "model.embed_tokens", head_name, config.vocab_size, hidden_size)
        self._rotary = Rotary(config.rope, weights.device, weights.dtype)
        self._layers = [
            Starcoder2Layer(config, heads, weights, f"model.layers.{index}") for index in range(config.num_layers)
        ]
        self._norm = LayerNorm(weights, "model.norm", hidden_size, config.norm_eps)


class Starcoder2Layer:
    """Attention and an MLP, each normalised before and added to what came in."""

    def __init__(self, config: Starcoder2Config, heads: Heads, weights: RankWeights, prefix: str) -> None:
        hidden_size, has_bias, name = config.hidden_size, config.has_bias, f"{prefix}.self_attn"
        self._attention_norm = LayerNorm(weights, f"{prefix}.input_layernorm", hidden_size, config.norm_eps)
        self._attention = Attention(
            heads.attention_layer(window=config.window),
            separate_qkv(weights, name, heads, hidden_size, has_bias),
            row_parallel(weights, f"{name}.o_proj", hidden_size, heads.num_heads * heads.head_dim, has_bias),
        )
        self._mlp_norm = LayerNorm(weights, f"{prefix}.post_attention_layernorm", hidden_size, config.norm_eps)
        names = f"{prefix}.mlp.c_fc", f"{prefix}.mlp.c_proj"
        self._mlp = MLP(weights, names, hidden_size, config.inner_size, config.activation, has_bias)

    def __call__(self, hidden: Tensor, angles: Angles, kv: LayerKV, attention: PagedAttention) -> Tensor:
        hidden = self._attention(self._attention_norm(hidden), hidden, angles, kv, attention)
        return self._mlp(self._mlp_norm(hidden), hidden)
