"""The Gemma decoders: the Llama kind with scaled embeddings, offset norms; since Gemma 2 caps, windows, more norms."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Final

import torch
from torch import Tensor

from bros_kernels.linear import RMSNorm
from bros_kernels.paged_attention import Angles, PagedAttention
from bros_shard.model_config import ConfigFields
from bros_shard.models.heads import Heads
from bros_shard.models.layers import Vocabulary, check_divisible, qk_norms, read_activation, rms_norm
from bros_shard.models.llama import LlamaConfig, llama_attention, llama_mlp, read_dimensions
from bros_shard.models.model import LayerKV, ModelLimits
from bros_shard.models.rotary import RopeFrequencies, Rotary, read_rope
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
    local_rope: RopeFrequencies | None = None  # of layers with a window; None: the same as the others'


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
            windows=_read_windows(config, alternating),
        ),
        scale=config.integer("query_pre_attn_scalar", 256) ** -0.5,
        score_cap=_read_cap(config, "attn_logit_softcapping", 50.0),
        logit_cap=_read_cap(config, "final_logit_softcapping", 30.0),
        has_post_norms=True,
    )


def read_gemma3(config: ConfigFields, limits: ModelLimits) -> GemmaConfig:
    """`Gemma3ForCausalLM`, which is the text model alone. One layer in six has no window."""
    if not config.is_null("attn_logit_softcapping"):
        raise config.refusal("attn_logit_softcapping", "this family caps no scores")
    llama = _read_llama_part(config, limits, num_kv_heads=4)
    period = config.integer("sliding_window_pattern", 6)
    layer_types = [SLIDING if (index + 1) % period else FULL for index in range(llama.num_layers)]
    head_dim, max_length = llama.head_dim, llama.max_length
    return GemmaConfig(
        llama=replace(
            llama,
            activation=read_activation(config, "hidden_activation", _GELU),
            windows=_read_windows(config, layer_types),
            has_qk_norm=True,
            # What the operator scales are the distances that a window does not bound.
            rope=read_rope(config, head_dim, max_length, limits.rope_override, rope=_rope_fields(config, FULL)),
        ),
        scale=config.integer("query_pre_attn_scalar", 256) ** -0.5,
        logit_cap=_read_cap(config, "final_logit_softcapping", None),
        has_post_norms=True,
        local_rope=read_rope(config, head_dim, max_length, rope=_rope_fields(config, SLIDING)),
    )


def _rope_fields(config: ConfigFields, layer_type: str) -> ConfigFields:
    """The rotary embedding's parameters in layers of this type: an object for each, once names beside each other."""
    ropes = config.object("rope_parameters")
    if not config.is_null("rope_parameters") and ropes.is_null(FULL) and ropes.is_null(SLIDING):
        raise config.refusal("rope_parameters", f"must hold {FULL} and {SLIDING}")
    is_full = layer_type == FULL
    rope = config.object("rope_scaling") if is_full and ropes.is_null(FULL) else ropes.object(layer_type)
    theta = config.number("rope_theta", 1e6) if is_full else config.number("rope_local_base_freq", 1e4)
    return rope.with_defaults({"rope_type": rope.text("type", "default"), "rope_theta": theta})


def _read_windows(config: ConfigFields, layer_types: Sequence[str]) -> tuple[int | None, ...]:
    """The window of each layer. `layer_types`: what is meant where the config does not say."""
    window = read_window(config, 4096)
    if window is None:
        raise config.refusal("sliding_window", "this family has one")
    return windows_of(read_layer_types(config, layer_types), window)


def _read_llama_part(config: ConfigFields, limits: ModelLimits, num_kv_heads: int) -> LlamaConfig:
    if config.boolean("use_bidirectional_attention", False):
        raise config.refusal("use_bidirectional_attention", "tokens see what came before them alone")
    config = config.with_defaults({"head_dim": 256, "tie_word_embeddings": True})
    has_bias = config.boolean("attention_bias", False)
    dimensions = read_dimensions(config, limits, num_kv_heads)
    return replace(dimensions, has_qkv_bias=has_bias, has_output_bias=has_bias)


def _read_cap(config: ConfigFields, name: str, default: float | None) -> float | None:
    """An absent field means the default, a null one no cap."""
    if config.is_null(name):
        return None if config.has(name) else default
    return config.number(name)


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
        self._local_rotary: Rotary | None = None
        if config.local_rope is not None:
            self._local_rotary = Rotary(config.local_rope, weights.device, weights.dtype)
        self._layers = [GemmaLayer(config, heads, weights, index) for index in range(llama.num_layers)]
        self._norm = rms_norm(weights, "model.norm", llama.hidden_size, llama.norm_eps, _NORM_OFFSET)
        self._logit_cap = config.logit_cap
        self._kernels = weights.kernels

    def forward(self, input_ids: Tensor, positions: Tensor, kv: Iterable[LayerKV], attention: PagedAttention) -> Tensor:
        """See `CausalLM.forward`."""
        hidden = self._vocabulary.embed(input_ids) * self._embedding_scale
        angles = local_angles = self._rotary.angles(positions)
        if self._local_rotary is not None:
            local_angles = self._local_rotary.angles(positions)
        for layer, layer_kv in zip(self._layers, kv, strict=True):
            hidden = layer(hidden, local_angles if layer.has_window else angles, layer_kv, attention)
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
        name = f"{prefix}.self_attn"
        layer = heads.attention_layer(
            scale=config.scale,
            window=llama.windows[index] if llama.windows else None,
            softcap=config.score_cap,
            qk_norms=qk_norms(weights, name, heads.head_dim, llama.norm_eps, _NORM_OFFSET)
            if llama.has_qk_norm
            else None,
        )
        self.has_window = layer.window is not None
        self._attention = llama_attention(llama, heads, weights, name, layer, norm("input_layernorm"))
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
