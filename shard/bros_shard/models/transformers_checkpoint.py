"""A model of `transformers` as its config describes it, with the weights of our `Checkpoint`."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import torch
import transformers
from torch import Tensor

from bros_shard.checkpoint import Checkpoint, CheckpointError
from bros_shard.model_config import ConfigFields, UnsupportedModelError
from bros_shard.models.model import ModelLimits

#: What configs call the most tokens that a model was made for.
_LENGTH_FIELDS: Final = ("max_position_embeddings", "max_seq_len", "max_sequence_length", "seq_length", "n_ctx")
#: Rotary embeddings whose frequencies are others beyond the length that the model was first made for.
_LENGTH_DEPENDENT_ROPE: Final = "longrope"

# It would read tensors ahead, in threads: more of them than it needs, and progress is reported in this one.
os.environ["HF_DEACTIVATE_ASYNC_LOAD"] = "1"
_library_logging: Any = transformers.utils.logging
_library_logging.set_verbosity_error()
_library_logging.disable_progress_bar()


@dataclass(frozen=True)
class TransformersConfig:
    """A causal language model that `transformers` has modelling code for."""

    architecture: str
    model_class: Any
    fields: Any  # transformers' own config
    vocab_size: int
    max_length: int


def read_transformers(folder: Path, config: ConfigFields, limits: ModelLimits) -> TransformersConfig:
    """What `transformers` makes of the config.json in `folder`.

    Raises:
        UnsupportedModelError: it knows no such model, or its modelling code cannot run here.
    """
    if limits.rope_override is not None:
        raise UnsupportedModelError("rope_scaling: models that run through transformers keep their own")
    fields = _read_fields(folder, config)
    if fields.is_encoder_decoder:
        raise config.refusal("architectures", "models with an encoder are not supported")
    if fields.get_text_config() is not fields:
        raise config.refusal("architectures", "models of more than text are not supported")
    model_class: Any = transformers.MODEL_FOR_CAUSAL_LM_MAPPING.get(type(fields), None)
    if model_class is None or model_class.__name__ not in config.items("architectures"):
        raise config.refusal("architectures", "this is no causal language model that transformers has code for")
    if model_class._is_stateful:
        raise config.refusal("architectures", "models with a recurrent state are not supported")
    return TransformersConfig(
        architecture=model_class.__name__,
        model_class=model_class,
        fields=fields,
        vocab_size=fields.vocab_size,
        max_length=_read_length(fields, limits),
    )


def _read_fields(folder: Path, config: ConfigFields) -> Any:
    if config.text("model_type", "") not in transformers.CONFIG_MAPPING:
        if not config.is_null("auto_map"):
            raise config.refusal("auto_map", "the model needs code of its own, which is not run")
        raise config.refusal("architectures", "neither this server nor transformers knows it")
    try:
        return transformers.AutoConfig.from_pretrained(folder, trust_remote_code=False, local_files_only=True)
    except Exception as error:  # whatever a broken config provokes in the library
        raise UnsupportedModelError(f"config.json: transformers cannot read it: {_one_line(error)}") from None


def _read_length(fields: Any, limits: ModelLimits) -> int:
    """The longest sequence: as long as the operator wants, and no longer than the model was made for."""
    lengths = [getattr(fields, name, None) for name in _LENGTH_FIELDS]
    most = next((length for length in lengths if isinstance(length, int) and length > 0), limits.max_length)
    for rope in _ropes(getattr(fields, "rope_parameters", None) or {}):
        if rope.get("rope_type") == _LENGTH_DEPENDENT_ROPE:
            original = rope.get("original_max_position_embeddings")
            most = min(most, original or getattr(fields, "original_max_position_embeddings", None) or most)
    if most <= 0:
        raise UnsupportedModelError("config.json does not say how long sequences may be: --max-total-tokens must")
    if limits.max_length > most:
        raise UnsupportedModelError(
            f"sequences of {limits.max_length} tokens were asked for, and through transformers this model has {most}"
        )
    return limits.max_length or most


def _ropes(parameters: dict[str, Any]) -> list[dict[str, Any]]:
    """The parameters of rotary embeddings, of which some models have one for each type of layer."""
    return [parameters, *(each for each in parameters.values() if isinstance(each, dict))]


class _Unread:
    """A tensor of the checkpoint that is read when `transformers` asks for it."""

    def __init__(self, checkpoint: Checkpoint, name: str) -> None:
        self._checkpoint = checkpoint
        self._name = name

    def __getitem__(self, everything: Any) -> Tensor:
        # A copy: what still lay in the mapped file would fault if the file were cut while serving.
        return self._checkpoint.take(self._name, self._checkpoint.shape(self._name)).clone()


def load_module(config: TransformersConfig, checkpoint: Checkpoint, device: torch.device, dtype: torch.dtype) -> Any:
    """The model with its weights: tensors are renamed, joined and tied as `transformers` does it.

    Raises:
        CheckpointError: a tensor is missing or of another shape.
    """
    try:
        module, found = config.model_class.from_pretrained(
            None,
            config=config.fields,
            state_dict={name: _Unread(checkpoint, name) for name in checkpoint},
            dtype=dtype,
            attn_implementation="eager",
            ignore_mismatched_sizes=True,  # they are refused below, in our own words
            output_loading_info=True,
        )
    except CheckpointError:
        raise
    except Exception as error:  # what the library says of a checkpoint or a config is as varied as its models
        raise CheckpointError(f"transformers cannot build {config.architecture}: {_one_line(error)}") from None
    for name in sorted(found["missing_keys"]):
        raise CheckpointError(f"tensor {name!r} is missing from the checkpoint")
    for name, shape, needed in sorted(found["mismatched_keys"]):
        raise CheckpointError(f"tensor {name!r} has shape {list(shape)}, the model needs {list(needed)}")
    # Such as the layers that predict further tokens, which some checkpoints have.
    ignored = config.model_class._keys_to_ignore_on_load_unexpected or ()
    checkpoint.skip(name for name in checkpoint if any(re.search(pattern, name) for pattern in ignored))
    return module.to(device)


def _one_line(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())}"[:300]
