"""The GPT-2 decoder: learned positions, LayerNorm before each part, a plain MLP, fused projections."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from torch import Tensor

from bros_kernels.linear import Activation
from bros_kernels.paged_attention import PagedAttention
from bros_shard.model_config import ConfigFields
from bros_shard.models.attention import Attention, QKVLayout, fused_qkv
from bros_shard.models.heads import Heads
from bros_shard.models.layers import MLP, LayerNorm, Vocabulary, check_divisible, read_activation
from bros_shard.models.model import LayerKV, ModelLimits
from bros_shard.models.positions import LearnedPositions, read_num_positions
from bros_shard.models.projections import row_parallel
from bros_shard.weights import RankWeights


@dataclass(frozen=True, kw_only=True)
class GPT2Config:
    """What makes one model of the GPT-2 kind differ from another."""

    vocab_size: int
    hidden_size: int
    inner_size: int
    num_heads: int
    num_kv_heads: int
    num_positions: int
    max_length: int
    norm_eps: float
    activation: Activation
    scales: tuple[float, ...]  # of each layer's scores
    is_head_tied: bool
    qkv_layout: QKVLayout
    are_matrices_transposed: bool


def read_gpt2(config: ConfigFields, limits: ModelLimits) -> GPT2Config:
    """`GPT2LMHeadModel`. `reorder_and_upcast_attn` asks for scores in float32, which they are anyway."""
    if config.boolean("add_cross_attention", False):
        raise config.refusal("add_cross_attention", "attention to an encoder is not supported")
    hidden_size = config.integer("n_embd")
    num_heads = config.integer("n_head")
    if hidden_size % num_heads:
        raise config.refusal("n_head", f"does not divide n_embd = {hidden_size}")
    num_positions = read_num_positions(config, "n_positions", limits)
    scale = (hidden_size // num_heads) ** -0.5 if config.boolean("scale_attn_weights", True) else 1.0
    is_scaled_by_layer = config.boolean("scale_attn_by_inverse_layer_idx", False)
    return GPT2Config(
        vocab_size=config.integer("vocab_size"),
        hidden_size=hidden_size,
        inner_size=config.integer("n_inner", 4 * hidden_size),
        num_heads=num_heads,
        num_kv_heads=num_heads,
        num_positions=num_positions,
        max_length=limits.max_length or num_positions,
        norm_eps=config.number("layer_norm_epsilon", 1e-5),
        activation=read_activation(config, "activation_function", "gelu_new"),
        scales=tuple(scale / (index + 1 if is_scaled_by_layer else 1) for index in range(config.integer("n_layer"))),
        is_head_tied=config.boolean("tie_word_embeddings", True),
        qkv_layout=QKVLayout.BY_ROLE,
        are_matrices_transposed=True,
    )


class GPT2:
    """Implements `CausalLM`."""

    def __init__(self, config: GPT2Config, weights: RankWeights) -> None:
        check_divisible(weights.parallel, config.num_heads, config.num_kv_heads, config.inner_size)
        # The first GPT-2 checkpoints were saved without the outer module.
        prefix = "transformer." if "transformer.wte.weight" in weights.checkpoint else ""
        hidden_size = config.hidden_size
        self.vocab_size = config.vocab_size
        self.max_length = config.max_length
        heads = Heads(weights.parallel, config.num_heads, config.num_kv_heads, hidden_size // config.num_heads)
        self.kv_shape = heads.kv_shape(len(config.scales))
        head_name = None if config.is_head_tied else "lm_head"
        self._vocabulary = Vocabulary(weights, f"{prefix}wte", head_name, config.vocab_size, hidden_size)
        self._positions = LearnedPositions(weights, f"{prefix}wpe", config.num_positions, hidden_size)
        matrices = weights.transposed() if config.are_matrices_transposed else weights
        self._layers = [
            GPT2Layer(config, heads, matrices, f"{prefix}h.{index}", scale) for index, scale in enumerate(config.scales)
        ]
        self._norm = LayerNorm(weights, f"{prefix}ln_f", hidden_size, config.norm_eps)

    def forward(self, input_ids: Tensor, positions: Tensor, kv: Iterable[LayerKV], attention: PagedAttention) -> Tensor:
        """See `CausalLM.forward`."""
        hidden = self._vocabulary.embed(input_ids) + self._positions(positions)
        for layer, layer_kv in zip(self._layers, kv, strict=True):
            hidden = layer(hidden, layer_kv, attention)
        return hidden

    def logits(self, hidden: Tensor) -> Tensor | None:
        """See `CausalLM.logits`."""
        return self._vocabulary.logits(self._norm(hidden))


class GPT2Layer:
    """Attention and an MLP, each normalised before and added to what came in."""

    def __init__(self, config: GPT2Config, heads: Heads, weights: RankWeights, prefix: str, scale: float) -> None:
        hidden_size = config.hidden_size
        self._attention_norm = LayerNorm(weights, f"{prefix}.ln_1", hidden_size, config.norm_eps)
        self._attention = Attention(
            heads.attention_layer(scale=scale),
            fused_qkv(weights, f"{prefix}.attn.c_attn", heads, hidden_size, config.qkv_layout, has_bias=True),
            row_parallel(weights, f"{prefix}.attn.c_proj", hidden_size, hidden_size, has_bias=True),
        )
        self._mlp_norm = LayerNorm(weights, f"{prefix}.ln_2", hidden_size, config.norm_eps)
        names = f"{prefix}.mlp.c_fc", f"{prefix}.mlp.c_proj"
        self._mlp = MLP(weights, names, hidden_size, config.inner_size, config.activation, has_bias=True)

    def __call__(self, hidden: Tensor, kv: LayerKV, attention: PagedAttention) -> Tensor:
        hidden = self._attention(self._attention_norm(hidden), hidden, None, kv, attention)
        return self._mlp(self._mlp_norm(hidden), hidden)
