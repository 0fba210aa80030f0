"""Models through transformers' code: which are refused and in which words, and that a wrong one is noticed."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from structlog.testing import capture_logs

from bros_kernels.kernels import select_kernels
from bros_shard.checkpoint import CheckpointError
from bros_shard.model_config import ConfigFields, UnsupportedModelError
from bros_shard.models import transformers_attention
from bros_shard.models.model import CausalLM, ModelLimits
from bros_shard.models.registry import load_model
from bros_shard.models.rotary import RopeOverride
from bros_shard.parallel import ParallelGroup

CPU = torch.device("cpu")
_SIZES = {"vocab_size": 131, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
_LLAMA = _SIZES | {"intermediate_size": 96, "num_key_value_heads": 2, "max_position_embeddings": 128}
_NO_TOKENS = {"pad_token_id": None, "bos_token_id": None, "eos_token_id": None}


def load(path: Path, limits: ModelLimits | None = None, num_ranks: int = 1, quantize: bool = False) -> CausalLM:
    kernels = select_kernels("torch", CPU, torch.float32, num_threads=2, has_int8_weights=quantize)
    ranks: Any = ParallelGroup()
    ranks.world_size = num_ranks
    return load_model(path, ConfigFields.load(path), ranks, CPU, torch.float32, limits or ModelLimits(), kernels)


def edit_config(source: Path, target: Path, **fields: Any) -> Path:
    shutil.copytree(source, target, dirs_exist_ok=True)
    config = json.loads((target / "config.json").read_text())
    (target / "config.json").write_text(json.dumps(config | fields))
    return target


def test_architecture_is_named_in_a_warning(reference) -> None:
    with capture_logs() as logs:
        load(reference("olmo2").path)
    (warning,) = (log for log in logs if log["log_level"] == "warning")
    assert warning["event"] == "served through transformers, which is slower than a decoder of our own"
    assert warning["architecture"] == "Olmo2ForCausalLM"


@pytest.mark.parametrize(
    ("model_class", "config", "message"),
    [
        ("T5ForConditionalGeneration", {"d_model": 64, "d_kv": 16, "d_ff": 96, "num_layers": 2}, "with an encoder"),
        ("BartForCausalLM", {"d_model": 64, "decoder_layers": 2, "decoder_ffn_dim": 96}, "with an encoder|decoder"),
        ("BertForMaskedLM", _SIZES | {"intermediate_size": 96}, "no causal language model"),
        ("BertLMHeadModel", _SIZES | {"intermediate_size": 96}, "attend by a rule that is not supported"),
        ("BloomForCausalLM", {"n_layer": 2, "n_head": 4, "hidden_size": 64, "seq_length": 64}, "cannot be replaced"),
        ("MptForCausalLM", {"n_layers": 2, "n_heads": 4, "d_model": 64}, "cannot be replaced"),
        ("MambaForCausalLM", _SIZES | {"state_size": 8}, "recurrent state"),
        ("Qwen3_5ForCausalLM", _LLAMA | {"head_dim": 16}, "recurrent state"),
        ("GptOssForCausalLM", _LLAMA | {"head_dim": 16, "num_local_experts": 4}, "attention with s_aux"),
        (
            "Lfm2ForCausalLM",
            _LLAMA | {"layer_types": ["conv", "full_attention"], "block_auto_adjust_ff_dim": False},
            "it computes something else than by itself",
        ),
    ],
)
def test_what_paged_attention_cannot_do_is_refused(
    model_class: str, config: dict[str, Any], message: str, tmp_path: Path
) -> None:
    make: Any = getattr(transformers, model_class)
    torch.manual_seed(0)
    model = make(make.config_class(**({"vocab_size": 131} | config | _NO_TOKENS)))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0.0, 0.2)
    model.save_pretrained(tmp_path)
    with pytest.raises(UnsupportedModelError, match=message) as error:
        load(tmp_path)
    assert model_class in str(error.value)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"architectures": ["OlmoForSequenceClassification"]}, "no causal language model"),
        ({"model_type": "nothing"}, "neither this server nor transformers knows it"),
        ({"model_type": "nothing", "auto_map": {"AutoModel": "model.py"}}, "code of its own, which is not run"),
        ({"model_type": "llava", "architectures": ["LlavaForConditionalGeneration"]}, "of more than text"),
        ({"hidden_size": "many"}, "transformers cannot read it"),
    ],
)
def test_configs_that_are_not_of_such_a_model_are_refused(
    fields: dict[str, Any], message: str, reference, tmp_path: Path
) -> None:
    with pytest.raises(UnsupportedModelError, match=message):
        load(edit_config(reference("olmo2").path, tmp_path, **fields))


def test_what_operators_may_ask_for(reference, tmp_path: Path) -> None:
    path = reference("olmo2").path
    assert load(path).max_length == 128
    assert load(path, ModelLimits(max_length=99)).max_length == 99
    with pytest.raises(UnsupportedModelError, match="sequences of 129 tokens were asked for"):
        load(path, ModelLimits(max_length=129))
    with pytest.raises(UnsupportedModelError, match="rope_scaling"):
        load(path, ModelLimits(rope_override=RopeOverride("linear", 2.0)))
    with pytest.raises(UnsupportedModelError, match=r"Olmo2ForCausalLM runs .* on one rank alone"):
        load(path, num_ranks=2)
    longrope = {
        "rope_type": "longrope",
        "rope_theta": 1000.0,
        "factor": 4.0,
        "original_max_position_embeddings": 32,
        "short_factor": [1.0] * 8,
        "long_factor": [4.0] * 8,
    }
    assert load(edit_config(path, tmp_path, rope_parameters=longrope)).max_length == 32


def _forget_windows(patch: Callable[..., None]) -> None:
    patch(transformers_attention, "_read_rule", lambda mask_function, length: 0)


def _shift_windows(patch: Callable[..., None]) -> None:
    read_rule = transformers_attention._read_rule
    patch(transformers_attention, "_read_rule", lambda *rule: read_rule(*rule) and read_rule(*rule) + 1)


def _change_layers(patch: Callable[..., None], **changes: Any) -> None:
    layer = transformers_attention.AttentionLayer
    patch(transformers_attention, "AttentionLayer", lambda **fields: replace(layer(**fields), **changes))


@pytest.mark.parametrize(
    ("name", "plant"),
    [
        ("cohere2", _forget_windows),
        ("cohere2", _shift_windows),
        ("vaultgemma", lambda patch: _change_layers(patch, softcap=None)),
        ("deepseek-v3", lambda patch: _change_layers(patch, scale=0.2)),
    ],
)
def test_model_that_attends_otherwise_than_its_code_is_refused(name, plant, reference, monkeypatch) -> None:
    plant(monkeypatch.setattr)
    with pytest.raises(UnsupportedModelError, match="it computes something else than by itself"):
        load(reference(name).path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda tensors: tensors.pop("model.layers.1.mlp.up_proj.weight"),
            "'model.layers.1.mlp.up_proj.weight' is missing",
        ),
        (lambda tensors: tensors.update(other=torch.zeros(2)), "'other' is not part of the model"),
        (lambda tensors: tensors.update({"model.norm.weight": torch.zeros(63)}), "'model.norm.weight' has shape .63"),
        (
            lambda tensors: tensors.update({"model.norm.weight": torch.zeros(64, dtype=torch.int8)}),
            "'model.norm.weight' has dtype I8",
        ),
    ],
    ids=["missing", "superfluous", "reshaped", "integers"],
)
def test_tensors_that_do_not_fit_refuse_the_model_by_name(change, message: str, reference, tmp_path: Path) -> None:
    shutil.copytree(reference("olmo2").path, tmp_path, dirs_exist_ok=True)
    tensors = load_file(tmp_path / "model.safetensors")
    change(tensors)
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match=message):
        load(tmp_path)


def test_int8_rounds_what_is_linear(reference, make_worker, scripted_router) -> None:
    expected = reference("olmo2")
    outputs = []
    for quantize in ("", "int8"):
        router = scripted_router(make_worker(expected.path, kernels="torch", quantize=quantize))
        for prompt in expected.prompts:
            router.add(prompt)
        outputs.append(router.run())
    assert outputs[0] == expected.outputs
    assert outputs[1] != outputs[0]
    firsts = [rounded[0] == exact[0] for rounded, exact in zip(outputs[1], outputs[0], strict=True)]
    assert sum(firsts) > len(firsts) // 2
