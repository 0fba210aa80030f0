"""Decoders that embed, turn, run their layers and normalise: they differ in their layers and in names of weights."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Protocol

from torch import Tensor

from bros_kernels.paged_attention import Angles, PagedAttention
from bros_shard.models.layers import LayerNorm, Vocabulary
from bros_shard.models.model import KVShape, LayerKV
from bros_shard.models.rotary import Rotary


class RotaryDecoderLayer(Protocol):
    """One layer."""

    def __call__(self, hidden: Tensor, angles: Angles, kv: LayerKV, attention: PagedAttention) -> Tensor:
        """(T, size) to (T, size)."""


class RotaryDecoder:
    """Implements `CausalLM`. Subclasses set these when they are made."""

    vocab_size: int
    max_length: int
    kv_shape: KVShape
    _vocabulary: Vocabulary
    _rotary: Rotary
    _layers: Sequence[RotaryDecoderLayer]
    _norm: LayerNorm

    def forward(self, input_ids: Tensor, positions: Tensor, kv: Iterable[LayerKV], attention: PagedAttention) -> Tensor:
        """See `CausalLM.forward`."""
        hidden = self._vocabulary.embed(input_ids)
        angles = self._rotary.angles(positions)
        for layer, layer_kv in zip(self._layers, kv, strict=True):
            hidden = layer(hidden, angles, layer_kv, attention)
        return hidden

    def logits(self, hidden: Tensor) -> Tensor | None:
        """See `CausalLM.logits`."""
        return self._vocabulary.logits(self._norm(hidden))
