"""Rotary position embedding: the frequencies of each scaling type, and their application to queries and keys."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from bros_kernels.paged_attention import Angles
from bros_shard.model_config import ConfigFields


@dataclass(frozen=True)
class RopeOverride:
    """Scaling that the operator asks for in place of the model's own (TGI's `--rope-scaling`, `--rope-factor`)."""

    rope_type: str  # "linear" or "dynamic"
    factor: float


@dataclass(frozen=True)
class RopeFrequencies:
    """What the positions are multiplied with."""

    inverse: Tensor  # float32 (rotary_dim / 2), on the CPU: radians per position
    attention_factor: float = 1.0  # multiplies cos and sin


def read_rope(
    config: ConfigFields,
    head_dim: int,
    max_length: int,
    override: RopeOverride | None = None,
    *,
    rope: ConfigFields | None = None,
    is_partial: bool = False,
) -> RopeFrequencies:
    """The frequencies that a config.json asks for, in today's form (`rope_parameters`) or the older ones.

    Frequencies that depend on the length of the sequence (`dynamic`, `longrope`) cannot be exact where keys are cached
    after rotation. They are exact while `max_length` does not exceed the length that the model was first made for
    (`max_position_embeddings`; for longrope `original_max_position_embeddings`); beyond it all positions use the
    frequencies of a sequence of `max_length` tokens.

    Args:
        max_length: the longest sequence that will be served.
        rope: the object with the parameters, where the config has several.
        is_partial: the family may rotate a part of each head (`partial_rotary_factor`).

    Raises:
        UnsupportedModelError: an unknown type, or a field that is missing or not honoured.
    """
    rope = rope_fields(config) if rope is None else rope
    if override is not None:
        rope = rope.updated({"rope_type": override.rope_type, "factor": override.factor})
    rotary_dim = _rotary_dim(rope, head_dim, is_partial)
    theta = rope.number("rope_theta", 10_000.0)
    rope_type = rope.text("rope_type", "default")
    inverse = _inverse_frequencies(theta, rotary_dim)
    if rope_type == "default":
        return RopeFrequencies(inverse)
    if rope_type == "linear":
        return RopeFrequencies(inverse / rope.number("factor"))
    original_length = config.integer("max_position_embeddings")
    if rope_type == "dynamic":
        factor = rope.number("factor")
        growth = factor * max(max_length, original_length) / original_length - (factor - 1)
        return RopeFrequencies(_inverse_frequencies(theta * growth ** (rotary_dim / (rotary_dim - 2)), rotary_dim))
    # As transformers does, a field beside the rope object takes precedence over one inside it.
    pretrained_length = config.integer(
        "original_max_position_embeddings", rope.integer("original_max_position_embeddings", original_length)
    )
    if rope_type == "llama3":
        return RopeFrequencies(_llama3(rope, inverse, pretrained_length))
    if rope_type == "yarn":
        return _yarn(rope, theta, rotary_dim, pretrained_length, original_length)
    if rope_type in ("longrope", "su"):
        return _longrope(rope, inverse, max_length, pretrained_length, original_length)
    raise rope.refusal("rope_type", "this scaling of the rotary embedding is not supported")


def rope_fields(config: ConfigFields) -> ConfigFields:
    """One object with what transformers 5 writes into `rope_parameters` and older releases beside `rope_scaling`."""
    rope = config.object("rope_parameters" if not config.is_null("rope_parameters") else "rope_scaling")
    moved: dict[str, float | str] = {
        name: config.number(name)
        for name in ("rope_theta", "partial_rotary_factor")
        if rope.is_null(name) and not config.is_null(name)
    }
    if rope.is_null("rope_type"):
        moved["rope_type"] = rope.text("type", "default")
    return rope.updated(moved)


def _rotary_dim(rope: ConfigFields, head_dim: int, is_partial: bool) -> int:
    """How many numbers of a head are rotated."""
    factor = rope.number("partial_rotary_factor", 1.0)
    if factor == 1.0:
        return head_dim
    if not is_partial:
        raise rope.refusal("partial_rotary_factor", "only a rotation of the whole head is supported")
    rotary_dim = int(head_dim * factor)
    if rotary_dim % 2 or not 0 < rotary_dim <= head_dim:
        raise rope.refusal("partial_rotary_factor", f"must be an even number of the {head_dim} numbers of a head")
    return rotary_dim


def _inverse_frequencies(theta: float, rotary_dim: int) -> Tensor:
    return 1.0 / theta ** (torch.arange(0, rotary_dim, 2, dtype=torch.float32) / rotary_dim)


def _llama3(rope: ConfigFields, inverse: Tensor, pretrained_length: int) -> Tensor:
    """Llama 3.1: long wavelengths are divided by the factor, short ones kept, those between interpolated."""
    factor = rope.number("factor")
    low, high = rope.number("low_freq_factor"), rope.number("high_freq_factor")
    wavelength = 2 * math.pi / inverse
    kept = (pretrained_length / wavelength - low) / (high - low)
    interpolated = (1 - kept) * inverse / factor + kept * inverse
    scaled = torch.where(wavelength > pretrained_length / low, inverse / factor, interpolated)
    return torch.where(wavelength < pretrained_length / high, inverse, scaled)


def _yarn(
    rope: ConfigFields, theta: float, rotary_dim: int, pretrained_length: int, max_positions: int
) -> RopeFrequencies:
    """YaRN (arXiv 2309.00071): interpolate dimensions by how often they turn within the pretrained length."""
    factor = rope.number("factor", max_positions / pretrained_length)

    def dimension_turning(num_rotations: float) -> float:
        return rotary_dim * math.log(pretrained_length / (num_rotations * 2 * math.pi)) / (2 * math.log(theta))

    low = dimension_turning(rope.number("beta_fast", 32.0))
    high = dimension_turning(rope.number("beta_slow", 1.0))
    if rope.boolean("truncate", True):
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, rotary_dim - 1)
    high = high if high != low else high + 0.001  # a ramp needs a width; the same one as transformers'
    ramp = ((torch.arange(rotary_dim // 2, dtype=torch.float32) - low) / (high - low)).clamp(0, 1)
    inverse = _inverse_frequencies(theta, rotary_dim)
    return RopeFrequencies(inverse / factor * ramp + inverse * (1 - ramp), _yarn_attention_factor(rope, factor))


def _yarn_attention_factor(rope: ConfigFields, factor: float) -> float:
    if not rope.is_null("attention_factor"):
        return rope.number("attention_factor")

    def magnitude(scale: float) -> float:
        return 1.0 if factor <= 1 else 0.1 * scale * math.log(factor) + 1.0

    if rope.is_null("mscale") or rope.is_null("mscale_all_dim"):
        return magnitude(1.0)
    return magnitude(rope.number("mscale")) / magnitude(rope.number("mscale_all_dim"))


def _longrope(
    rope: ConfigFields, inverse: Tensor, max_length: int, pretrained_length: int, max_positions: int
) -> RopeFrequencies:
    """LongRoPE (arXiv 2402.13753): a factor for each frequency, others beyond the pretrained length than up to it."""
    name = "long_factor" if max_length > pretrained_length else "short_factor"
    factors = rope.items(name)
    if len(factors) != len(inverse) or not all(isinstance(each, (int, float)) and each > 0 for each in factors):
        raise rope.refusal(name, f"must be {len(inverse)} positive numbers")
    growth = rope.number("factor", max_positions / pretrained_length)
    attention_factor = math.sqrt(1 + math.log(growth) / math.log(pretrained_length)) if growth > 1 else 1.0
    return RopeFrequencies(inverse / torch.tensor(factors), rope.number("attention_factor", attention_factor))


class Rotary:
    """Rotates queries and keys, given the positions of a step's tokens."""

    def __init__(self, frequencies: RopeFrequencies, device: torch.device, dtype: torch.dtype) -> None:
        self._inverse = frequencies.inverse.to(device)
        self._attention_factor = frequencies.attention_factor
        self._dtype = dtype

    def angles(self, positions: Tensor) -> Angles:
        """Those of the positions, int64 (T); computed once per step."""
        angles = positions[:, None, None] * self._inverse
        cos, sin = angles.cos() * self._attention_factor, angles.sin() * self._attention_factor
        return torch.cat([cos, cos], -1).to(self._dtype), torch.cat([-sin, sin], -1).to(self._dtype)
