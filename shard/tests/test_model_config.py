"""Fields of a config.json are honoured, or refuse the model by name."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from bros_shard.model_config import ConfigFields, UnsupportedModelError
from bros_shard.models.gemma import read_gemma3
from bros_shard.models.gpt_neox import read_gpt_neox
from bros_shard.models.model import ModelLimits
from bros_shard.models.registry import read_dtype


@pytest.mark.parametrize(
    ("model", "change", "message"),
    [
        ("llama", {"architectures": ["BloomForCausalLM"]}, "architectures = ['BloomForCausalLM']: this is no"),
        ("llama", {"architectures": None}, "architectures = None: the model needs this field"),
        ("llama", {"quantization_config": {"bits": 4}}, "quantization_config = {'bits': 4}: quantised weights"),
        ("llama", {"per_layer_config": {"1": {"head_dim": 8}}}, "fields that differ from layer to layer are not"),
        ("llama", {"hidden_act": "relu2"}, "hidden_act = 'relu2': this activation is not supported"),
        ("llama", {"hidden_size": None}, "hidden_size = None: the model needs this field"),
        ("llama", {"hidden_size": "64"}, "hidden_size = '64': is of the wrong type"),
        ("llama", {"num_hidden_layers": True}, "num_hidden_layers = True: is of the wrong type"),
        ("llama", {"num_hidden_layers": 0}, "num_hidden_layers = 0: must be at least 1"),
        ("llama", {"num_key_value_heads": 3}, "4 attention heads do not share 3 key-value heads evenly"),
        ("llama", {"head_dim": 15}, "head_dim = 15: must be even"),
        ("llama", {"rms_norm_eps": -1e-6}, "rms_norm_eps = -1e-06: must be a positive number"),
        ("llama", {"tie_word_embeddings": 1}, "tie_word_embeddings = 1: is of the wrong type"),
        ("llama", {"dtype": "int8"}, "dtype = 'int8': this dtype is not supported"),
        ("llama", {"rope_parameters": {"rope_type": "axial"}}, "rope_parameters.rope_type = 'axial'"),
        ("mistral", {"sliding_window": 0}, "sliding_window = 0: must be at least 1"),
        ("qwen2", {"layer_types": ["full_attention"]}, "layer_types = ['full_attention']: must say"),
        ("qwen3", {"layer_types": ["full_attention"] * 2 + ["chunked_attention"]}, "layer_types = ['full"),
        ("mixtral", {"num_experts_per_tok": 5}, "num_experts_per_tok = 5: there are 4 experts"),
        ("gemma", {"hidden_activation": "relu"}, "hidden_activation = 'relu': this family has hidden_act"),
        ("gemma", {"use_bidirectional_attention": True}, "use_bidirectional_attention = True: tokens see"),
        ("gemma2", {"use_bidirectional_attention": True}, "use_bidirectional_attention = True: tokens see"),
        ("gemma2", {"hidden_activation": "relu2"}, "hidden_activation = 'relu2': this activation is not supported"),
        ("gemma2", {"layer_types": ["full_attention"]}, "layer_types = ['full_attention']: must say"),
        ("gemma2", {"attn_logit_softcapping": 0}, "attn_logit_softcapping = 0: must be a positive number"),
        ("gemma2", {"sliding_window": None}, "sliding_window = None: this family has one"),
        ("gemma3", {"attn_logit_softcapping": 50.0}, "attn_logit_softcapping = 50.0: this family caps no scores"),
        ("gemma3", {"rope_parameters": {"rope_type": "default"}}, "must hold full_attention and sliding_attention"),
        ("phi3", {"attention_bias": True}, "attention_bias = True: this family has none"),
        ("phi3", {"rope_parameters": {"rope_type": "yarn"}}, "rope_parameters.rope_type = 'yarn': this family"),
        ("starcoder2", {"norm_type": "rms_norm"}, "norm_type = 'rms_norm': only layer_norm is supported"),
        ("starcoder2", {"mlp_type": "gated"}, "mlp_type = 'gated': only default is supported"),
        ("falcon", {"alibi": True}, "alibi = True: biases of the scores are not supported"),
        ("falcon", {"num_attention_heads": 5}, "num_attention_heads = 5: does not divide hidden_size = 64"),
        ("falcon", {"num_ln_in_parallel_attn": 2}, "num_ln_in_parallel_attn = 2: the layer has no use"),
        ("falcon", {"multi_query": False, "num_kv_heads": 2}, "num_kv_heads = 2: groups of heads need new"),
        ("falcon-new", {"parallel_attn": False}, "parallel_attn = False: new_decoder_architecture is always"),
        ("opt", {"activation_function": "quick_gelu"}, "activation_function = 'quick_gelu': this activation"),
        ("opt", {"num_attention_heads": 5}, "num_attention_heads = 5: does not divide hidden_size = 64"),
        ("gpt-neox", {"num_attention_heads": 5}, "num_attention_heads = 5: does not divide hidden_size = 64"),
        ("gpt2", {"n_head": 5}, "n_head = 5: does not divide n_embd = 64"),
        ("gpt2", {"add_cross_attention": True}, "add_cross_attention = True: attention to an encoder"),
    ],
)
def test_models_are_refused_by_the_name_of_a_field(
    model: str, change: dict[str, Any], message: str, reference, make_worker, tmp_path: Path
) -> None:
    shutil.copytree(reference(model).path, tmp_path, dirs_exist_ok=True)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | change))
    with pytest.raises(UnsupportedModelError, match=re.escape(message)):
        make_worker(tmp_path, dtype="auto")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "config.json is missing or cannot be read"),
        ("{", "config.json is not JSON"),
        ("\xff\xfe", "config.json is not JSON"),
        ("[1]", "config.json is not a JSON object"),
    ],
)
def test_unreadable_config_is_refused(content: str | None, message: str, tmp_path: Path) -> None:
    if content is not None:
        (tmp_path / "config.json").write_text(content, encoding="latin-1")
    with pytest.raises(UnsupportedModelError, match=re.escape(message)):
        ConfigFields.load(tmp_path)


@pytest.mark.parametrize(("name", "field"), [("opt", "max_position_embeddings"), ("gpt2", "n_positions")])
def test_an_operator_cannot_scale_or_add_learned_positions(name: str, field: str, reference, make_worker) -> None:
    with pytest.raises(UnsupportedModelError, match="rope_scaling: the model has no rotary embedding"):
        make_worker(reference(name).path, rope_scaling="linear", rope_factor=2.0)
    with pytest.raises(UnsupportedModelError, match=f"{field} = 128: sequences of 129 tokens"):
        make_worker(reference(name).path, max_length=129)


def test_first_gpt_neox_configs_mean_the_same() -> None:
    fields = {"vocab_size": 8, "hidden_size": 64, "intermediate_size": 8, "num_hidden_layers": 1}
    fields |= {"num_attention_heads": 2, "max_position_embeddings": 16}
    older = read_gpt_neox(ConfigFields(fields | {"rotary_emb_base": 500, "rotary_pct": 0.5}), ModelLimits())
    rope = {"rope_type": "default", "rope_theta": 500.0, "partial_rotary_factor": 0.5}
    today = read_gpt_neox(ConfigFields(fields | {"rope_parameters": rope}), ModelLimits())
    assert torch.equal(older.rope.inverse, today.rope.inverse)
    assert len(read_gpt_neox(ConfigFields(fields), ModelLimits()).rope.inverse) == 4  # a quarter of 32, in pairs


def test_first_gemma3_configs_mean_the_same() -> None:
    fields: dict[str, Any] = {"vocab_size": 8, "hidden_size": 64, "intermediate_size": 8, "num_hidden_layers": 4}
    fields |= {"num_attention_heads": 4, "head_dim": 16, "max_position_embeddings": 16, "sliding_window": 3}
    older = fields | {
        "sliding_window_pattern": 3,
        "rope_theta": 500.0,
        "rope_local_base_freq": 20.0,
        "rope_scaling": {"rope_type": "linear", "factor": 8.0},
    }
    today = fields | {
        "layer_types": ["sliding_attention", "sliding_attention", "full_attention", "sliding_attention"],
        "rope_parameters": {
            "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 500.0},
            "sliding_attention": {"rope_type": "default", "rope_theta": 20.0},
        },
    }
    configs = [read_gemma3(ConfigFields(each), ModelLimits()) for each in (older, today)]
    assert [config.llama.windows for config in configs] == [(3, 3, None, 3)] * 2
    ropes = [(config.llama.rope.inverse, config.local_rope.inverse) for config in configs if config.local_rope]
    assert torch.equal(ropes[0][0], ropes[1][0]) and torch.equal(ropes[0][1], ropes[1][1])
    assert not torch.equal(*ropes[0])


def test_dtype_is_read_from_either_name() -> None:
    assert str(read_dtype(ConfigFields({"dtype": "bfloat16"}))) == "torch.bfloat16"
    assert str(read_dtype(ConfigFields({"torch_dtype": "float16"}))) == "torch.float16"
    assert str(read_dtype(ConfigFields({}))) == "torch.float32"


def test_readers_fall_back_to_defaults_for_absent_and_null_fields() -> None:
    config = ConfigFields({"null": None, "inner": {"x": 3}})
    assert config.integer("null", 5) == config.integer("absent", 5) == 5
    assert config.has("null")
    assert not config.has("absent")
    assert config.object("inner").integer("x") == 3
    assert config.object("absent").is_null("x")
    assert config.updated({"null": 7}).integer("null") == 7
