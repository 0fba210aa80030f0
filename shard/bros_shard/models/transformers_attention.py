"""The attention of `transformers`' modelling code: what its layers ask for, and our paged region in its place.

The library's models call the attention function that their config names, in each layer. Two are registered here: one
that takes down what the layers ask for, and one that serves them.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any, Final, TypeAlias

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AttentionInterface, AttentionMaskInterface

from bros_kernels.paged_attention import AttentionLayer, PagedAttention
from bros_shard.model_config import UnsupportedModelError
from bros_shard.models.model import LayerKV

#: Names of attention functions, as configs have them.
NOTED: Final = "bros-noted"
PAGED: Final = "bros-paged"

#: What a layer may tell an attention function that changes nothing here: what it must not attend to is said by
#: positions, and there is neither training nor another cache.
_NEUTRAL_ARGUMENTS: Final = frozenset(
    {
        "cache",
        "cache_position",
        "deterministic",
        "dropout",
        "output_attentions",
        "output_hidden_states",
        "output_router_logits",
        "past_key_values",
        "position_embeddings",
        "position_ids",
        "return_dict",
        "use_cache",
    }
)
#: In a mask that stands for a rule, what says that the rule is none that paged attention knows.
_UNKNOWN_RULE: Final = -1

#: A layer's module and what it asks for.
LayerCall: TypeAlias = tuple[nn.Module, AttentionLayer]


@dataclass
class Notes:
    """What layers ask for, in the order in which they are run."""

    max_length: int  # of sequences: windows that reach as far are none
    layers: list[LayerCall] = field(default_factory=list)


@dataclass(frozen=True)
class _Step:
    """The step that runs: its attention, and what its layers ask for and where their region is, one after the other."""

    layers: Iterator[tuple[LayerCall, LayerKV]]
    attention: PagedAttention


_notes: ContextVar[Notes] = ContextVar("notes")
_step: ContextVar[_Step] = ContextVar("step")


@contextmanager
def taking_notes(max_length: int) -> Iterator[Notes]:
    """What the layers ask for that are run in this context with the attention function `NOTED`.

    Raises:
        UnsupportedModelError: in the context; paged attention cannot do what a layer asks for.
    """
    notes = Notes(max_length)
    token = _notes.set(notes)
    try:
        yield notes
    finally:
        _notes.reset(token)


@contextmanager
def running_step(layers: Iterable[LayerCall], kv: Iterable[LayerKV], attention: PagedAttention) -> Iterator[None]:
    """The step that layers belong to that are run in this context with the attention function `PAGED`.

    Taking the region of a layer may run another step: contexts nest.
    """
    step = _Step(zip(layers, kv, strict=True), attention)
    token = _step.set(step)
    try:
        yield
    finally:
        _step.reset(token)
    assert next(step.layers, None) is None, "a layer was not run"


def _note(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **arguments: Any
) -> tuple[Tensor, None]:
    """Take down one layer. query: (1, num_heads, T, size); key, value: (1, num_kv_heads, T, size)."""
    notes = _notes.get()
    name = type(module).__name__
    for argument, what in arguments.items():
        is_known = argument in ("is_causal", "scaling", "sliding_window", "softcap")
        if what is not None and not is_known and argument not in _NEUTRAL_ARGUMENTS:
            raise UnsupportedModelError(f"{name}: attention with {argument} is not supported")
    if arguments.get("is_causal") is False or key.shape[2] != query.shape[2] or len(query) != 1:
        raise UnsupportedModelError(f"{name}: attention to anything but the tokens before is not supported")
    scale = arguments.get("scaling")
    layer = AttentionLayer(
        num_heads=query.shape[1],
        num_kv_heads=key.shape[1],
        head_dim=max(key.shape[3], value.shape[3]),
        scale=float(key.shape[3] ** -0.5 if scale is None else scale),
        window=_window(name, attention_mask, arguments.get("sliding_window"), notes.max_length),
        softcap=arguments.get("softcap"),
    )
    notes.layers.append((module, layer))
    return value.new_zeros(1, query.shape[2], query.shape[1], value.shape[3]), None


def _window(name: str, mask: Tensor | None, told: int | None, max_length: int) -> int | None:
    """The window of a layer: by its mask, which is what counts, or as it is told where there is none."""
    window = told or 0 if mask is None else int(mask.reshape(-1)[0])
    if window < 0 or (mask is not None and bool((mask != window).any())):
        raise UnsupportedModelError(f"{name}: its tokens attend by a rule that is not supported")
    return window if 0 < window < max_length else None


def _mask_of_rule(
    *, batch_size: int, q_length: int, kv_length: int, mask_function: Any, device: Any, use_vmap: bool, **_: Any
) -> Tensor:
    """A mask of the shape that modelling code expects, and full of what the rule behind it is: a window, 0 for none."""
    rule = _UNKNOWN_RULE if use_vmap else _read_rule(mask_function, _notes.get().max_length)
    return torch.full((batch_size, 1, q_length, kv_length), rule, device=device)


def _read_rule(mask_function: Any, length: int) -> int:
    """How many tokens each of `length` sees up to itself where that is one number; 0: all of them."""
    keys, zero = torch.arange(length), torch.tensor(0)
    window = length
    # From the end: the last tokens see as many as any, unless there are chunks, which one of two neighbours begins.
    for position in (length - 1, max(0, length - 2), (length - 1) // 2):
        is_seen = mask_function(zero, zero, torch.tensor(position), keys).expand(length)
        if position == length - 1:
            window = int(is_seen.sum())
        if not torch.equal(is_seen, (keys <= position) & (keys > position - window)):
            return _UNKNOWN_RULE
    return window if window < length else 0


def _attend(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: None, **_: Any
) -> tuple[Tensor, None]:
    """Attention of one layer over the paged region. Shapes are those of `_note`; T are the tokens of a step."""
    step = _step.get()
    (expected, layer), (k, v) = next(step.layers)
    assert module is expected, "layers are not run in the order in which they were noted"
    size = value.shape[3]
    # Heads of zeros beyond their own size change no score, and are cut off again.
    parts = [F.pad(part, (0, layer.head_dim - part.shape[3])) for part in (query, key, value)]
    qkv = torch.cat(parts, 1)[0].transpose(0, 1).reshape(query.shape[2], -1)
    attended = step.attention.attend(layer, qkv, None, k, v)
    return attended.view(1, -1, layer.num_heads, layer.head_dim)[..., :size], None


AttentionInterface.register(NOTED, _note)
AttentionMaskInterface.register(NOTED, _mask_of_rule)
AttentionInterface.register(PAGED, _attend)
