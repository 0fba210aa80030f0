"""The OPT decoder: learned positions, LayerNorm before or after each part, a plain MLP."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from torch import Tensor

from bros_kernels.linear import Activation, Linear
from bros_kernels.paged_attention import PagedAttention
from bros_shard.model_config import ConfigFields
from bros_shard.models.attention import Attention, separate_qkv
from bros_shard.models.heads import Heads
from bros_shard.models.layers import (
    MLP,
    LayerNorm,
    Vocabulary,
    check_divisible,
    read_activation,
)
from bros_shard.models.model import LayerKV, ModelLimits
from bros_shard.models.positions import LearnedPositions, read_num_positions
from bros_shard.models.projections import row_parallel
from bros_shard.weights import RankWeights

#: The table of learned positions begins with rows that no position uses.
_NUM_UNUSED_POSITIONS = 2


@dataclass(frozen=True, kw_only=True)
class OPTConfig:
    """What makes one OPT model differ from another."""

    vocab_size: int
    hidden_size: int
    embedding_size: int
    inner_size: int
    num_layers: int
    num_heads: int
    num_positions: int
    max_length: int
    activation: Activation
    has_bias: bool
    has_norm_weights: bool
    is_norm_first: bool
    has_final_norm: bool
    is_head_tied: bool


def read_opt(config: ConfigFields, limits: ModelLimits) -> OPTConfig:
    """`OPTForCausalLM`. Positions are learned, so neither rotary scaling nor a longer sequence is possible."""
    num_positions = read_num_positions(config, "max_position_embeddings", limits)
    hidden_size = config.integer("hidden_size")
    num_heads = config.integer("num_attention_heads")
    if hidden_size % num_heads:
        raise config.refusal("num_attention_heads", f"does not divide hidden_size = {hidden_size}")
    is_norm_first = config.boolean("do_layer_norm_before", True)
    return OPTConfig(
        vocab_size=config.integer("vocab_size"),
        hidden_size=hidden_size,
        embedding_size=config.integer("word_embed_proj_dim", hidden_size),
        inner_size=config.integer("ffn_dim"),
        num_layers=config.integer("num_hidden_layers"),
        num_heads=num_heads,
        num_positions=num_positions,
        max_length=limits.max_length or num_positions,
        activation=read_activation(config, "activation_function", "relu"),
        has_bias=config.boolean("enable_bias", True),
        has_norm_weights=config.boolean("layer_norm_elementwise_affine", True),
        is_norm_first=is_norm_first,
        has_final_norm=is_norm_first and not config.boolean("_remove_final_layer_norm", False),
        is_head_tied=config.boolean("tie_word_embeddings", True),
    )


class OPT:
    """Implements `CausalLM`."""

    def __init__(self, config: OPTConfig, weights: RankWeights) -> None:
        check_divisible(weights.parallel, config.num_heads, config.num_heads, config.inner_size)
        # The first OPT checkpoints were saved without the outer module.
        decoder = "model.decoder" if "model.decoder.embed_tokens.weight" in weights.checkpoint else "decoder"
        hidden_size, embedding_size = config.hidden_size, config.embedding_size
        self.vocab_size = config.vocab_size
        self.max_length = config.max_length
        heads = Heads(weights.parallel, config.num_heads, config.num_heads, hidden_size // config.num_heads)
        self.kv_shape = heads.kv_shape(config.num_layers)
        self._vocabulary = Vocabulary(
            weights,
            f"{decoder}.embed_tokens",
            None if config.is_head_tied else "lm_head",
            config.vocab_size,
            embedding_size,
        )
        self._positions = LearnedPositions(
            weights, f"{decoder}.embed_positions", config.num_positions, hidden_size, _NUM_UNUSED_POSITIONS
        )
        self._project_in: Linear | None = None
        self._project_out: Linear | None = None
        if embedding_size != hidden_size:
            into = weights.whole(f"{decoder}.project_in.weight", (hidden_size, embedding_size))
            out = weights.whole(f"{decoder}.project_out.weight", (embedding_size, hidden_size))
            self._project_in, self._project_out = weights.kernels.linear(into), weights.kernels.linear(out)
        self._layers = [
            OPTLayer(config, heads, weights, f"{decoder}.layers.{index}") for index in range(config.num_layers)
        ]
        self._final_norm: LayerNorm | None = None
        if config.has_final_norm:
            self._final_norm = LayerNorm(
                weights, f"{decoder}.final_layer_norm", hidden_size, has_weights=config.has_norm_weights
            )

    def forward(self, input_ids: Tensor, positions: Tensor, kv: Iterable[LayerKV], attention: PagedAttention) -> Tensor:
        """See `CausalLM.forward`."""
        hidden = self._vocabulary.embed(input_ids)
        if self._project_in is not None:
            hidden = self._project_in(hidden)
        hidden = hidden + self._positions(positions)
        for layer, layer_kv in zip(self._layers, kv, strict=True):
            hidden = layer(hidden, layer_kv, attention)
        return hidden

    def logits(self, hidden: Tensor) -> Tensor | None:
        """See `CausalLM.logits`."""
        if self._final_norm is not None:
            hidden = self._final_norm(hidden)
        if self._project_out is not None:
            hidden = self._project_out(hidden)
        return self._vocabulary.logits(hidden)


class OPTLayer:
    """Attention and an MLP, each added to what came in, normalised before it or (350m) after the sum."""

    def __init__(self, config: OPTConfig, heads: Heads, weights: RankWeights, prefix: str) -> None:
        hidden_size = config.hidden_size
        self._is_norm_first = config.is_norm_first
        self._attention_norm = LayerNorm(
            weights, f"{prefix}.self_attn_layer_norm", hidden_size, has_weights=config.has_norm_weights
        )
        self._attention = Attention(
            heads.attention_layer(),
            separate_qkv(weights, f"{prefix}.self_attn", heads, hidden_size, config.has_bias),
            row_parallel(weights, f"{prefix}.self_attn.out_proj", hidden_size, hidden_size, config.has_bias),
        )
        self._mlp_norm = LayerNorm(
            weights, f"{prefix}.final_layer_norm", hidden_size, has_weights=config.has_norm_weights
        )
        self._mlp = MLP(
            weights,
            (f"{prefix}.fc1", f"{prefix}.fc2"),
            hidden_size,
            config.inner_size,
            config.activation,
            config.has_bias,
        )

    def __call__(self, hidden: Tensor, kv: LayerKV, attention: PagedAttention) -> Tensor:
        if self._is_norm_first:
            hidden = self._attention(self._attention_norm(hidden), hidden, None, kv, attention)
            return self._mlp(self._mlp_norm(hidden), hidden)
        hidden = self._attention_norm(self._attention(hidden, hidden, None, kv, attention))
        return self._mlp_norm(self._mlp(hidden, hidden))
