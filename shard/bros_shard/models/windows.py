"""Which layers of a model see no more than the last tokens, and how many."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

from bros_shard.model_config import ConfigFields

#: What `layer_types` calls layers with a window, and those without.
SLIDING: Final = "sliding_attention"
FULL: Final = "full_attention"


def read_window(config: ConfigFields, default: int | None = None) -> int | None:
    """`sliding_window`. Where it is absent, the family's default; where it is null, none."""
    if config.is_null("sliding_window"):
        return None if config.has("sliding_window") else default
    return config.integer("sliding_window")


def read_layer_types(config: ConfigFields, default: Sequence[str]) -> Sequence[str]:
    """`SLIDING` or `FULL` for each layer: `layer_types`, or, where that is absent, what the family means then."""
    if config.is_null("layer_types"):
        return default
    layer_types = config.items("layer_types")
    if len(layer_types) != len(default) or any(each not in (SLIDING, FULL) for each in layer_types):
        raise config.refusal("layer_types", f"must say {FULL} or {SLIDING} for {len(default)} layers")
    return layer_types


def windows_of(layer_types: Sequence[str], window: int | None) -> tuple[int | None, ...]:
    """The window of each layer, where sliding ones have this one."""
    return tuple(window if layer_type == SLIDING else None for layer_type in layer_types)
