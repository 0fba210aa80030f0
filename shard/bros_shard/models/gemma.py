"""The Gemma decoders: the Llama kind with scaled embeddings, offset norms; since Gemma 2 caps, windows, more norms."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Final

import torch
from torch import Tensor

from bros_kernels.linear import RMSNorm
from bros_kernels.paged_attention import Angles, PagedAttention
from bros_shard.model_config import ConfigFields
from bros_shard.models.heads import Heads
from bros_shard.models.layers import Vocabulary, check_divisible, read_activation, rms_norm
from bros_shard.models.llama import LlamaConfig, llama_attention, llama_mlp, read_dimensions
from bros_shard.models.model import LayerKV, ModelLimits
from bros_shard.models.rotary import Rotary
from bros_shard.models.windows import FULL, SLIDING, read_layer_types, read_window, windows_of
from bros_shard.weights import RankWeights

#: Checkpoints keep what the weights of norms are above this.
_NORM_OFFSET: Final = 1.0
_GELU: Final = "gelu_pytorch_tanh"


@dataclass(frozen=True, kw_only=True)
class GemmaConfig:
    """What makes one Gemma differ from another."""

    llama: LlamaConfig  # what it shares with models of the Llama kind
    scale: float  # of the scores
    score_cap: float | None = None
    logit_cap: float | None = None
    has_post_norms: bool = False  # what attention and the MLP give is normalised too


def read_gemma(config: ConfigFields, limits: ModelLimits) -> GemmaConfig:
    """`GemmaForCausalLM`. The first configs say `gelu` and mean its approximation by tanh."""
    if config.text("hidden_activation", _GELU) != _GELU:
        raise config.refusal("hidden_activation", "this family has hidden_act")
    if config.text("hidden_act", _GELU) == "gelu":
        config = config.updated({"hidden_act": _GELU})
    llama = _read_llama_part(config, limits, num_kv_heads=16)
    llama = replace(llama, activation=read_activation(config, "hidden_act", _GELU))
    return GemmaConfig(llama=llama, scale=llama.head_dim**-0.5)


def read_gemma2(config: ConfigFields, limits: ModelLimits) -> GemmaConfig:
    """`Gemma2ForCausalLM`. Every other layer has a window, the first one too."""
    llama = _read_llama_part(config, limits, num_kv_heads=4)
    alternating = [FULL if index % 2 else SLIDING for index in range(llama.num_layers)]
    return GemmaConfig(
        llama=replace(
            llama,
            activation=read_activation(config, "hidden_activation", _GELU),
            windows=windows_of(read_layer_types(config, alternating), read_window(config, 4096)),
        ),
        scale=config.integer("query_pre_attn_scalar", 256) ** -0.5,
        score_cap=_read_cap(config, "attn_logit_softcapping", 50.0),
        logit_cap=_read_cap(config, "final_logit_softcapping", 30.0),
        has_post_norms=True,
    )


def _read_llama_part(config: ConfigFields, limits: ModelLimits, num_kv_heads: int) -> LlamaConfig:
    if config.boolean("use_bidirectional_attention", False):
        raise config.refusal("use_bidirectional_attention", "tokens see what came before them alone")
    config = config.with_defaults({"head_dim": 256, "tie_word_embeddings": True})
    has_bias = config.boolean("attention_bias", False)
    dimensions = read_dimensions(config, limits, num_kv_heads)
    return replace(dimensions, has_qkv_bias=has_bias, has_output_bias=has_bias)


def _read_cap(config: ConfigFields, name: str, default: float) -> float | None:
    """An absent field means the default, a null one no cap."""
    return None if config.has(name) and config.is_null(name) else config.number(name, default)


class Gemma:
    """Implements `CausalLM`."""

    def __init__(self, config: GemmaConfig, weights: RankWeights) -> None:
        llama = config.llama
        check_divisible(weights.parallel, llama.num_heads, llama.num_kv_heads, llama.inner_size)
        self.vocab_size = llama.vocab_size
        self.max_length = llama.max_length
        heads = Heads(weights.parallel, llama.num_heads, llama.num_kv_heads, llama.head_dim)
        self.kv_shape = heads.kv_shape(llama.num_layers)
        head_name = None if llama.is_head_tied else "lm_head"
        self._vocabulary = Vocabulary(weights, "model.embed_tokens", head_name, llama.vocab_size, llama.hidden_size)
        # Rounded to the dtype first, as in training: the root of 3072 is 55.5 in bfloat16.
        self._embedding_scale = float(torch.tensor(llama.hidden_size**0.5, dtype=weights.dtype))
        self._rotary = Rotary(llama.rope, weights.device, weights.dtype)
        self._layers = [GemmaLayer(config, heads, weights, index) for index in range(llama.num_layers)]
        self._norm = rms_norm(weights, "model.norm", llama.hidden_size, llama.norm_eps, _NORM_OFFSET)
        self._logit_cap = config.logit_cap
        self._kernels = weights.kernels

    def forward(self, input_ids: Tensor, positions: Tensor, kv: Iterable[LayerKV], attention: PagedAttention) -> Tensor:
        """See `CausalLM.forward`."""
        hidden = self._vocabulary.embed(input_ids) * self._embedding_scale
        angles = self._rotary.angles(positions)
        for layer, layer_kv in zip(self._layers, kv, strict=True):
            hidden = layer(hidden, angles, layer_kv, attention)
        return hidden

    def logits(self, hidden: Tensor) -> Tensor | None:
        """See `CausalLM.logits`."""
        logits = self._vocabulary.logits(self._kernels.rms_norm(hidden, self._norm))
        if logits is None or self._logit_cap is None:
            return logits
        return logits.div_(self._logit_cap).tanh_().mul_(self._logit_cap)


class GemmaLayer:
    """Attention and a gated MLP, each normalised before, since Gemma 2 also after, and added to what came in."""

    def __init__(self, config: GemmaConfig, heads: Heads, weights: RankWeights, index: int) -> None:
        llama, prefix = config.llama, f"model.layers.{index}"

        def norm(name: str) -> RMSNorm:
            return rms_norm(weights, f"{prefix}.{name}", llama.hidden_size, llama.norm_eps, _NORM_OFFSET)

        mlp_norm_name = "pre_feedforward_layernorm" if config.has_post_norms else "post_attention_layernorm"
        self._post_norms: tuple[RMSNorm, RMSNorm] | None = None
        if config.has_post_norms:
            self._post_norms = norm("post_attention_layernorm"), norm("post_feedforward_layernorm")
        layer = heads.attention_layer(
            scale=config.scale, window=llama.windows[index] if llama.windows else None, softcap=config.score_cap
        )
        attention_name = f"{prefix}.self_attn"
        self._attention = llama_attention(llama, heads, weights, attention_name, layer, norm("input_layernorm"))
        self._mlp = llama_mlp(llama, weights, f"{prefix}.mlp", norm(mlp_norm_name))
        self._kernels = weights.kernels

    def __call__(self, hidden: Tensor, angles: Angles, kv: LayerKV, attention: PagedAttention) -> Tensor:
        if self._post_norms is None:
            hidden = self._attention(hidden, hidden, angles, kv, attention)
            return self._mlp(hidden, hidden)
        attention_norm, mlp_norm = self._post_norms
        attended = self._attention(hidden, None, angles, kv, attention)
        hidden = hidden + self._kernels.rms_norm(attended, attention_norm)
        return hidden + self._kernels.rms_norm(self._mlp(hidden), mlp_norm)
