"""Models and flags that cannot be served: refused before serving, in one line, with an exit status by class.

One of each kind: the others are in `router/tests/test_model_source.py` and `shard/tests/test_server.py`.
"""

import json
import shutil
import socket
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from bros_router.model_source import demo_model_path
from bros_shard.exit_codes import ExitCode


@pytest.fixture
def model(tmp_path) -> Path:
    """A copy of the demo model to break."""
    path = tmp_path / "model"
    path.mkdir()
    for name in ("config.json", "generation_config.json", "model.safetensors", "tokenizer.json"):
        shutil.copy(demo_model_path() / name, path / name)
    return path


def edit_config(model: Path, **fields: Any) -> None:
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(config | fields))


def truncate_weights(model: Path) -> None:
    weights = model / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1000])


def remove_a_tensor(model: Path) -> None:
    tensors = load_file(model / "model.safetensors")
    del tensors["model.layers.0.mlp.up_proj.weight"]
    save_file(tensors, model / "model.safetensors")


def claim_an_encoder(model: Path) -> None:
    edit_config(model, architectures=["T5ForConditionalGeneration"], model_type="t5")


def shrink_the_vocabulary(model: Path) -> None:
    edit_config(model, vocab_size=100)


@pytest.mark.parametrize(
    ("mutilate", "named"),
    [
        (truncate_weights, "model.safetensors"),
        (claim_an_encoder, "models with an encoder are not supported"),
        (shrink_the_vocabulary, "tokenizer"),
    ],
    ids=lambda value: getattr(value, "__name__", None),
)
def test_broken_checkpoint_is_refused_by_name(launch, model, mutilate, named):
    mutilate(model)
    launcher = launch("--model-id", str(model))
    assert launcher.process.wait(60) == ExitCode.BAD_CHECKPOINT
    errors = [json.loads(line)["message"] for line in launcher.lines if '"ERROR"' in line]
    assert any(named in message for message in errors), launcher.lines


def test_broken_checkpoint_is_refused_by_two_ranks_as_well(launch, model):
    remove_a_tensor(model)
    launcher = launch("--model-id", str(model), "--num-shard", "2")
    assert launcher.process.wait(60) == ExitCode.BAD_CHECKPOINT


def test_missing_folder_is_refused(launch, tmp_path):
    launcher = launch("--model-id", str(tmp_path / "nothing"), environment={"HF_HUB_OFFLINE": "1"})
    assert launcher.process.wait(60) == ExitCode.MODEL_NOT_FOUND


def test_adapter_of_another_model_is_refused_by_name(launch, tmp_path):
    name = "base_model.model.model.layers.6.self_attn.q_proj"  # the demo model has six layers
    save_file(
        {f"{name}.lora_A.weight": torch.zeros(4, 256), f"{name}.lora_B.weight": torch.zeros(256, 4)},
        tmp_path / "adapter_model.safetensors",
    )
    (tmp_path / "adapter_config.json").write_text('{"peft_type": "LORA", "r": 4, "lora_alpha": 8}')
    launcher = launch("--lora-adapters", f"mine={tmp_path}")
    assert launcher.process.wait(60) == ExitCode.BAD_CHECKPOINT
    errors = [json.loads(line)["message"] for line in launcher.lines if '"ERROR"' in line]
    assert any("adapter mine: adapter_model.safetensors: tensor" in message for message in errors), launcher.lines


def test_missing_adapter_is_refused(launch, tmp_path):
    launcher = launch("--lora-adapters", f"mine={tmp_path}/nothing")
    assert launcher.process.wait(60) == ExitCode.MODEL_NOT_FOUND


def test_busy_port_is_refused_before_the_model_is_read(launch):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        launcher = launch(environment={"PORT": str(taken.getsockname()[1])})
        assert launcher.process.wait(20) == ExitCode.USAGE
    assert any("is taken" in line for line in launcher.lines)
    assert not any("loading" in line for line in launcher.lines)
