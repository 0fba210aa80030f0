"""What a rank cannot serve: it names in one line what is wrong, and ends with the status of that class."""

from __future__ import annotations

import json
import shutil
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import zmq
from safetensors.torch import load_file, save_file

from bros_shard.exit_codes import ExitCode
from bros_shard.options import ShardOptions
from bros_shard.protocol import Fault, decode_from_rank
from bros_shard.server import ShardServer


@pytest.fixture
def model(reference, tmp_path: Path) -> Path:
    """A copy of a good checkpoint to break."""
    return Path(shutil.copytree(reference("llama").path, tmp_path / "model"))


@pytest.fixture
def serve(tmp_path: Path) -> Iterator[Callable[..., tuple[int, str]]]:
    """`serve(path, **options)`: the exit status of a rank that serves this, and what it says to the router at last."""
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    with zmq.Context() as context, context.socket(zmq.ROUTER) as router:
        router.setsockopt(zmq.RCVTIMEO, 60_000)
        endpoint = f"ipc://{tmp_path}/shards"
        router.bind(endpoint)

        def run(path: Path, **options: Any) -> tuple[int, str]:
            status = ShardServer(
                ShardOptions(endpoint=endpoint, rendezvous="", model_path=str(path), model_id="m", **options)
            ).run()
            while True:
                _, frame = router.recv_multipart()
                message = decode_from_rank(frame)
                if isinstance(message, Fault):
                    return status, message.reason

        yield run
    for number, handler in handlers.items():
        signal.signal(number, handler)


def edit_config(model: Path, **fields: Any) -> None:
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(config | fields))


def truncate_weights(model: Path) -> None:
    weights = model / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1000])


def lie_about_the_header(model: Path) -> None:
    weights = bytearray((model / "model.safetensors").read_bytes())
    weights[:8] = (2**60).to_bytes(8, "little")
    (model / "model.safetensors").write_bytes(weights)


def remove_a_tensor(model: Path) -> None:
    tensors = load_file(model / "model.safetensors")
    del tensors["model.layers.0.mlp.up_proj.weight"]
    save_file(tensors, model / "model.safetensors")


def reshape_a_tensor(model: Path) -> None:
    tensors = load_file(model / "model.safetensors")
    tensors["model.norm.weight"] = tensors["model.norm.weight"][:-1].contiguous()
    save_file(tensors, model / "model.safetensors")


def take_another_architecture(model: Path) -> None:
    edit_config(model, architectures=["T5ForConditionalGeneration"])


def claim_to_see(model: Path) -> None:
    edit_config(model, architectures=["LlavaForConditionalGeneration"], model_type="llava")


def claim_code_of_its_own(model: Path) -> None:
    edit_config(model, architectures=["MyModel"], model_type="mine", auto_map={"AutoModelForCausalLM": "mine.My"})


@pytest.mark.parametrize(
    ("mutilate", "reason"),
    [
        (truncate_weights, "model.safetensors cannot be read: "),
        (lie_about_the_header, "model.safetensors cannot be read: "),
        (remove_a_tensor, "tensor 'model.layers.0.mlp.up_proj.weight' is missing from the checkpoint"),
        (reshape_a_tensor, "model.safetensors: tensor 'model.norm.weight' has shape [63], the model needs [64]"),
        (take_another_architecture, "architectures = ['T5ForConditionalGeneration']: this is no causal language model"),
        (claim_to_see, "models of more than text are not supported"),
        (claim_code_of_its_own, "the model needs code of its own, which is not run"),
    ],
    ids=lambda value: getattr(value, "__name__", None),
)
def test_broken_checkpoint_is_refused_by_name(mutilate, reason: str, model: Path, serve) -> None:
    mutilate(model)
    status, said = serve(model)
    assert status == ExitCode.BAD_CHECKPOINT
    assert reason in said
    assert "\n" not in said


def test_adapter_of_another_model_is_refused_by_name(model: Path, tmp_path: Path, serve) -> None:
    name = "base_model.model.model.layers.3.self_attn.q_proj"  # the model has three layers
    tensors = {f"{name}.lora_A.weight": torch.zeros(4, 64), f"{name}.lora_B.weight": torch.zeros(64, 4)}
    save_file(tensors, tmp_path / "adapter_model.safetensors")
    (tmp_path / "adapter_config.json").write_text('{"peft_type": "LORA", "r": 4, "lora_alpha": 8}')
    status, said = serve(model, adapters=json.dumps({"mine": str(tmp_path)}))
    assert status == ExitCode.BAD_CHECKPOINT
    assert said.startswith(f"adapter mine: adapter_model.safetensors: tensor '{name}.lora_A.weight' is not part of")


def test_device_that_is_not_there_is_told_alike(model: Path, serve) -> None:
    status, said = serve(model, device="cuda", rank=1000)
    assert status == ExitCode.USAGE
    assert said.startswith("rank 1000 needs a GPU of its own")
