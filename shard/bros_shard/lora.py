"""A LoRA adapter as PEFT saves it: adapter_config.json and adapter_model.safetensors."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import torch
from torch import Tensor

from bros_shard.checkpoint import Checkpoint, CheckpointError
from bros_shard.model_config import ConfigFields

CONFIG_FILE: Final = "adapter_config.json"
WEIGHTS_FILE: Final = "adapter_model.safetensors"
#: What PEFT puts before the model's own name of a module, and behind it.
_PREFIX: Final = "base_model.model."
_DOWN, _UP = ".lora_A.weight", ".lora_B.weight"
#: How factors begin that are trained beside a base model as it is. Other ways take something from its weights.
_HARMLESS_BEGINNINGS: Final = ("gaussian", "eva", "orthogonal")
#: Fields that may not hold more than nothing, and what they ask for.
_REFUSED_FIELDS: Final = {
    "modules_to_save": "whole modules are not supported, only what is added to projections",
    "layer_replication": "layers that stand in the model several times are not supported",
    "trainable_token_indices": "embeddings of single tokens are not supported",
    "alora_invocation_tokens": "adapters that begin in the middle of a prompt are not supported",
}


@dataclass(frozen=True)
class Factors:
    """What an adapter adds to the weight of one projection: up @ down, of these features of all ranks."""

    checkpoint: Checkpoint
    #: Of their tensors.
    name: str
    rank: int
    #: Of the product.
    scale: float

    def down(self, in_features: int, columns: range | None = None) -> Tensor:
        """(rank, in_features), or some columns of it."""
        start, stop = (0, None) if columns is None else (columns.start, columns.stop)
        return self.checkpoint.take(self.name + _DOWN, (self.rank, in_features), 1, start, stop)

    def up(self, out_features: int, ranges: Iterable[range]) -> Tensor:
        """Ranges of the rows of (out_features, rank), with the scale in them; float32."""
        name, shape = self.name + _UP, (out_features, self.rank)
        parts = [self.checkpoint.take(name, shape, 0, rows.start, rows.stop) for rows in ranges]
        return torch.cat(parts).float() * self.scale


class LoraAdapter:
    """One adapter. Use as a context manager: its tensors are read while the model is built."""

    def __init__(self, name: str, folder: Path) -> None:
        """Read what it is like; `name` is for messages.

        Raises:
            UnsupportedModelError: it is more than LoRA, or its configuration cannot be read.
            CheckpointError: it has no safetensors, or they cannot be read.
        """
        title = f"adapter {name}: "
        self._config = _read_config(folder, title)
        if not (folder / WEIGHTS_FILE).is_file():
            raise CheckpointError(f"{title}there is no {WEIGHTS_FILE}, and other formats are not loaded")
        self._checkpoint = Checkpoint(folder, file_name=WEIGHTS_FILE, title=title)
        ends = [name.removesuffix(_DOWN) for name in self._checkpoint if name.endswith(_DOWN)]
        self._modules = {name.removeprefix(_PREFIX) for name in ends if name.startswith(_PREFIX)}

    def __enter__(self) -> LoraAdapter:
        return self

    def __exit__(self, *exception: object) -> None:
        self._checkpoint.__exit__(*exception)

    def factors(self, projection: str) -> Factors | None:
        """What it adds to the projection that the model's checkpoint calls so; `None`: nothing.

        Adapters name modules of the whole model, and some checkpoints were saved without the outer one.

        Raises:
            UnsupportedModelError: a rank or a scale that makes no sense.
        """
        module = projection
        if module not in self._modules:
            module = next((name for name in self._modules if name.endswith(f".{projection}")), "")
        if not module:
            return None
        config = self._config
        ranks, alphas = config.object("rank_pattern"), config.object("alpha_pattern")
        rank_key, alpha_key = _matching(ranks, module), _matching(alphas, module)
        rank = config.integer("r") if rank_key is None else ranks.integer(rank_key)
        alpha = config.number("lora_alpha") if alpha_key is None else alphas.number(alpha_key)
        divisor = rank**0.5 if config.boolean("use_rslora", False) else rank
        return Factors(self._checkpoint, _PREFIX + module, rank, alpha / divisor)

    def check_all_taken(self) -> None:
        """Refuse tensors that no projection took. Raises `CheckpointError`."""
        self._checkpoint.check_all_taken()


def _read_config(folder: Path, title: str) -> ConfigFields:
    config = ConfigFields.read(folder / CONFIG_FILE, title + CONFIG_FILE)
    if config.text("peft_type") != "LORA":
        raise config.refusal("peft_type", "only LORA is supported")
    for name in ("use_dora", "lora_bias", "use_qalora"):
        if config.boolean(name, False):
            raise config.refusal(name, "only plain LoRA is supported")
    if config.text("bias", "none") != "none":
        raise config.refusal("bias", "biases that change are not supported")
    for name, reason in _REFUSED_FIELDS.items():
        if config.anything(name):
            raise config.refusal(name, reason)
    beginning = config.anything("init_lora_weights")
    if isinstance(beginning, str) and beginning not in _HARMLESS_BEGINNINGS:
        raise config.refusal("init_lora_weights", "the weights of the base model would have to change")
    return config


def _matching(patterns: ConfigFields, module: str) -> str | None:
    """The first that matches the end of a module's name, as PEFT sees it: a regular expression behind a dot."""
    for pattern in patterns:
        try:
            if re.match(rf"(.*\.)?({pattern})$", module):
                return pattern
        except re.error:
            raise patterns.refusal(pattern, "is not named by a regular expression") from None
    return None
