"""Saves and restores a training run, and writes the finished model as Hugging Face files. Nothing is pickled."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Final

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.optim import Optimizer

from bros_shard.demo_model.model import CausalLM, ModelConfig
from bros_shard.demo_model.tokenizer import EOS_TOKEN_IDS, write_json

CHECKPOINT_NAME: Final = "checkpoint.safetensors"


@dataclass
class RunState:
    """Where a run stands, weights and optimiser state aside."""

    step: int = 0
    num_tokens: int = 0
    elapsed_s: float = 0.0
    num_passes: int = 0
    num_rows: int = 0
    row_length: int = 0
    curve: list[dict[str, float]] = field(default_factory=list)


def save_atomically(tensors: Mapping[str, Tensor], path: Path, metadata: dict[str, str]) -> None:
    """A reader sees the old file or the new one, never half of either."""
    partial = path.with_suffix(".partial")
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, partial, metadata)
    partial.chmod(0o644)  # save_file keeps it to its owner; a model is for everyone
    os.replace(partial, path)


def save_checkpoint(folder: Path, model: nn.Module, optimizers: Sequence[Optimizer], state: RunState) -> None:
    tensors = {f"model.{name}": tensor for name, tensor in model.state_dict().items()}
    for number, optimizer in enumerate(optimizers):
        for index, values in optimizer.state_dict()["state"].items():
            tensors |= {f"optimizer.{number}.{index}.{name}": value for name, value in values.items()}
    folder.mkdir(parents=True, exist_ok=True)
    save_atomically(tensors, folder / CHECKPOINT_NAME, {"state": json.dumps(asdict(state))})


def load_checkpoint(folder: Path, model: nn.Module, optimizers: Sequence[Optimizer]) -> RunState:
    """Fill the model and the optimisers in place. Raises FileNotFoundError if nothing was saved."""
    weights: dict[str, Tensor] = {}
    moments: list[dict[int, dict[str, Tensor]]] = [{} for _ in optimizers]
    with safe_open(folder / CHECKPOINT_NAME, framework="pt") as file:
        state = RunState(**json.loads(file.metadata()["state"]))
        for key in file.keys():  # noqa: SIM118 - not a dict
            owner, rest = key.split(".", 1)
            if owner == "model":
                weights[rest] = file.get_tensor(key)
            else:
                number, index, name = rest.split(".")
                moments[int(number)].setdefault(int(index), {})[name] = file.get_tensor(key)
    model.load_state_dict(weights)
    for optimizer, values in zip(optimizers, moments, strict=True):
        optimizer.load_state_dict({"state": values, "param_groups": optimizer.state_dict()["param_groups"]})
    return state


def export_model(model: CausalLM, folder: Path) -> None:
    """Write model.safetensors (bf16), config.json and generation_config.json.

    The output matrix is tied to the embedding and is therefore not in the file.
    """
    weights = {name: tensor.to("cpu", torch.bfloat16) for name, tensor in model.state_dict().items()}
    save_atomically(weights, folder / "model.safetensors", {"format": "pt"})
    write_json(folder / "config.json", hugging_face_config(model.config))
    write_json(
        folder / "generation_config.json",
        {"eos_token_id": list(EOS_TOKEN_IDS), "pad_token_id": EOS_TOKEN_IDS[0]},
    )


def hugging_face_config(config: ModelConfig) -> dict[str, Any]:
    shape = asdict(config)
    rope_theta = shape.pop("rope_theta")
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        **shape,
        "attention_bias": False,
        "attention_dropout": 0.0,
        "dtype": "bfloat16",
        "eos_token_id": list(EOS_TOKEN_IDS),
        "hidden_act": "silu",
        "initializer_range": 0.02,
        "mlp_bias": False,
        "pad_token_id": EOS_TOKEN_IDS[0],
        "rope_parameters": {"rope_theta": rope_theta, "rope_type": "default"},
        "tie_word_embeddings": True,
        "use_cache": True,
    }
