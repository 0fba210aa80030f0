"""The Llama decoder. Mistral, Qwen, Phi-3 and Mixtral add biases, windows, normalised heads, fused weights, experts."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace

from torch import Tensor

from bros_kernels.fused_layer import FusedLayer
from bros_kernels.linear import Activation, RMSNorm
from bros_kernels.low_rank import unadapted
from bros_kernels.paged_attention import Angles, AttentionLayer, PagedAttention
from bros_shard.model_config import ConfigFields
from bros_shard.models.attention import Attention, QKVLayout, fused_qkv, separate_qkv
from bros_shard.models.experts import Experts, ExpertsConfig
from bros_shard.models.heads import Heads
from bros_shard.models.layers import (
    GatedMLP,
    Vocabulary,
    check_divisible,
    fused_gated_linear,
    gated_linear,
    qk_norms,
    read_activation,
    rms_norm,
)
from bros_shard.models.model import LayerKV, ModelLimits
from bros_shard.models.projections import row_parallel
from bros_shard.models.rotary import RopeFrequencies, Rotary, read_rope
from bros_shard.weights import RankWeights


@dataclass(frozen=True, kw_only=True)
class LlamaConfig:
    """What makes one model of the Llama kind differ from another."""

    vocab_size: int
    hidden_size: int
    inner_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    norm_eps: float
    activation: Activation
    rope: RopeFrequencies
    is_head_tied: bool
    max_length: int
    has_qkv_bias: bool = False
    has_output_bias: bool = False
    has_mlp_bias: bool = False
    has_qk_norm: bool = False
    is_fused: bool = False  # one tensor each for queries, keys and values, and for gate and up
    windows: tuple[int | None, ...] = ()  # of each layer; empty: no layer has one
    experts: tuple[ExpertsConfig | None, ...] = ()  # of each layer, None where it has an MLP; empty: no layer has any


def read_dimensions(
    config: ConfigFields, limits: ModelLimits, num_kv_heads: int | None = None, is_rotation_partial: bool = False
) -> LlamaConfig:
    """What all families of this kind write alike.

    Args:
        num_kv_heads: the family's own default; None: as many as attention heads.
        is_rotation_partial: the family may rotate a part of each head.
    """
    hidden_size = config.integer("hidden_size")
    num_heads = config.integer("num_attention_heads")
    head_dim = config.integer("head_dim", hidden_size // num_heads)
    if head_dim % 2:
        raise config.refusal("head_dim", "must be even")
    max_length = limits.max_length or limits.extended(config.integer("max_position_embeddings"))
    return LlamaConfig(
        vocab_size=config.integer("vocab_size"),
        hidden_size=hidden_size,
        inner_size=config.integer("intermediate_size"),
        num_layers=config.integer("num_hidden_layers"),
        num_heads=num_heads,
        num_kv_heads=config.integer("num_key_value_heads", num_kv_heads or num_heads),
        head_dim=head_dim,
        norm_eps=config.number("rms_norm_eps", 1e-6),
        activation=read_activation(config, "hidden_act", "silu"),
        rope=read_rope(config, head_dim, max_length, limits.rope_override, is_partial=is_rotation_partial),
        is_head_tied=config.boolean("tie_word_embeddings", False),
        max_length=max_length,
    )


def read_llama(config: ConfigFields, limits: ModelLimits) -> LlamaConfig:
    """`LlamaForCausalLM`."""
    has_attention_bias = config.boolean("attention_bias", False)
    return replace(
        read_dimensions(config, limits),
        has_qkv_bias=has_attention_bias,
        has_output_bias=has_attention_bias,
        has_mlp_bias=config.boolean("mlp_bias", False),
    )


class Llama:
    """Implements `CausalLM`."""

    def __init__(self, config: LlamaConfig, weights: RankWeights) -> None:
        check_divisible(weights.parallel, config.num_heads, config.num_kv_heads, config.inner_size)
        self.vocab_size = config.vocab_size
        self.max_length = config.max_length
        heads = Heads(weights.parallel, config.num_heads, config.num_kv_heads, config.head_dim)
        self.kv_shape = heads.kv_shape(config.num_layers)
        self._vocabulary = Vocabulary(
            weights,
            "model.embed_tokens",
            None if config.is_head_tied else "lm_head",
            config.vocab_size,
            config.hidden_size,
        )
        self._rotary = Rotary(config.rope, weights.device, weights.dtype)
        self._layers = [LlamaLayer(config, heads, weights, index) for index in range(config.num_layers)]
        self._norm = rms_norm(weights, "model.norm", config.hidden_size, config.norm_eps)
        self._kernels = weights.kernels

    def forward(self, input_ids: Tensor, positions: Tensor, kv: Iterable[LayerKV], attention: PagedAttention) -> Tensor:
        """See `CausalLM.forward`."""
        hidden = self._vocabulary.embed(input_ids)
        angles = self._rotary.angles(positions)
        for layer, layer_kv in zip(self._layers, kv, strict=True):
            hidden = layer(hidden, angles, layer_kv, attention)
        return hidden

    def logits(self, hidden: Tensor) -> Tensor | None:
        """See `CausalLM.logits`."""
        return self._vocabulary.logits(self._kernels.rms_norm(hidden, self._norm))


class LlamaLayer:
    """Attention and a gated MLP, or experts, each normalised before and added to what came in."""

    def __init__(self, config: LlamaConfig, heads: Heads, weights: RankWeights, index: int) -> None:
        prefix = f"model.layers.{index}"
        name, hidden_size, eps = f"{prefix}.self_attn", config.hidden_size, config.norm_eps
        layer = heads.attention_layer(
            window=config.windows[index] if config.windows else None,
            qk_norms=qk_norms(weights, name, heads.head_dim, eps) if config.has_qk_norm else None,
        )
        attention_norm = rms_norm(weights, f"{prefix}.input_layernorm", hidden_size, eps)
        self._attention = llama_attention(config, heads, weights, name, layer, attention_norm)
        mlp_norm = rms_norm(weights, f"{prefix}.post_attention_layernorm", hidden_size, eps)
        experts = config.experts[index] if config.experts else None
        self._mlp: GatedMLP | Experts
        self._fused: FusedLayer | None = None
        self._routing = weights.routing
        if experts is None:
            self._mlp = mlp = llama_mlp(config, weights, f"{prefix}.mlp", mlp_norm)
            projections = self._attention.qkv, self._attention.output, mlp.gated, mlp.down
            self._fused = weights.kernels.fuse_layer(layer, *map(unadapted, projections))
        else:
            self._mlp = Experts(experts, weights, prefix, hidden_size, config.activation, mlp_norm)

    def __call__(self, hidden: Tensor, angles: Angles, kv: LayerKV, attention: PagedAttention) -> Tensor:
        """Compute it; `hidden` may be overwritten."""
        if self._fused is not None and not self._routing.adapted_rows:
            return self._fused(hidden, angles, *kv, attention)
        hidden = self._attention(hidden, hidden, angles, kv, attention)
        return self._mlp(hidden, hidden)


def llama_attention(
    config: LlamaConfig, heads: Heads, weights: RankWeights, name: str, layer: AttentionLayer, norm: RMSNorm
) -> Attention:
    """The attention whose tensors' names begin with `name`. `norm`: of its inputs."""
    hidden_size, has_bias = config.hidden_size, config.has_qkv_bias
    if config.is_fused:
        qkv = fused_qkv(weights, f"{name}.qkv_proj", heads, hidden_size, QKVLayout.BY_ROLE, has_bias, norm)
    else:
        qkv = separate_qkv(weights, name, heads, hidden_size, has_bias, norm)
    output_size = heads.num_heads * heads.head_dim
    return Attention(
        layer, qkv, row_parallel(weights, f"{name}.o_proj", hidden_size, output_size, config.has_output_bias)
    )


def llama_mlp(config: LlamaConfig, weights: RankWeights, name: str, norm: RMSNorm) -> GatedMLP:
    """The gated MLP whose tensors' names begin with `name`. `norm`: of its inputs."""
    shape, has_bias = (config.inner_size, config.hidden_size), config.has_mlp_bias
    if config.is_fused:
        gated = fused_gated_linear(weights, f"{name}.gate_up_proj", *shape, config.activation, has_bias, norm)
    else:
        names = f"{name}.gate_proj", f"{name}.up_proj"
        gated = gated_linear(weights, names, *shape, config.activation, has_bias, norm)
    return GatedMLP(gated, row_parallel(weights, f"{name}.down_proj", config.hidden_size, config.inner_size, has_bias))
