"""Rotary frequencies are those of transformers, whichever way a config.json writes them."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from transformers import GPTNeoXConfig, LlamaConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
from transformers.models.gpt_neox import modeling_gpt_neox as gpt_neox
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding, apply_rotary_pos_emb

from bros_kernels.reference_attention import rotate
from bros_shard.model_config import ConfigFields, UnsupportedModelError
from bros_shard.models.rotary import RopeOverride, Rotary, read_rope

HEAD_DIM, LENGTH = 32, 64

SCALINGS: list[dict[str, Any]] = [
    {"rope_type": "default"},
    {"rope_type": "linear", "factor": 3.0},
    {"rope_type": "dynamic", "factor": 3.0},
    {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 24,
    },
    {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16},
    {"rope_type": "yarn", "factor": 4.0},
    {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16, "truncate": False},
    {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16, "attention_factor": 0.7},
    {
        "rope_type": "yarn",
        "factor": 4.0,
        "original_max_position_embeddings": 16,
        "mscale": 0.8,
        "mscale_all_dim": 1.2,
        "beta_fast": 8.0,
        "beta_slow": 2.0,
    },
]


def today(scaling: dict[str, Any]) -> dict[str, Any]:
    return {"max_position_embeddings": LENGTH, "rope_parameters": {"rope_theta": 500.0, **scaling}}


def llama_config(scaling: dict[str, Any]) -> LlamaConfig:
    return LlamaConfig(hidden_size=4 * HEAD_DIM, num_attention_heads=4, **today(scaling))


@pytest.mark.parametrize("scaling", SCALINGS, ids=str)
def test_rotation_equals_transformers(scaling: dict[str, Any]) -> None:
    positions = torch.arange(LENGTH)
    q, k = torch.randn(1, 4, LENGTH, HEAD_DIM), torch.randn(1, 2, LENGTH, HEAD_DIM)
    expected = apply_rotary_pos_emb(q, k, *LlamaRotaryEmbedding(llama_config(scaling))(q, positions[None]))
    frequencies = read_rope(ConfigFields(today(scaling)), HEAD_DIM, LENGTH)
    angles = Rotary(frequencies, torch.device("cpu"), torch.float32).angles(positions)
    for x, y in zip((q, k), expected, strict=True):
        rotated = rotate(x[0].transpose(0, 1), *angles)
        torch.testing.assert_close(rotated.transpose(0, 1), y[0], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("scaling", [SCALINGS[0], SCALINGS[1], SCALINGS[2], SCALINGS[4]], ids=str)
def test_rotation_of_a_part_of_the_head_equals_transformers(scaling: dict[str, Any]) -> None:
    fields = today(scaling | {"partial_rotary_factor": 0.25})
    config = GPTNeoXConfig(hidden_size=4 * HEAD_DIM, num_attention_heads=4, **today(fields["rope_parameters"]))
    positions = torch.arange(LENGTH)
    q, k = torch.randn(1, 4, LENGTH, HEAD_DIM), torch.randn(1, 4, LENGTH, HEAD_DIM)
    expected = gpt_neox.apply_rotary_pos_emb(q, k, *gpt_neox.GPTNeoXRotaryEmbedding(config)(q, positions[None]))
    frequencies = read_rope(ConfigFields(fields), HEAD_DIM, LENGTH, is_partial=True)
    assert len(frequencies.inverse) == HEAD_DIM // 8
    angles = Rotary(frequencies, torch.device("cpu"), torch.float32).angles(positions)
    for x, y in zip((q, k), expected, strict=True):
        rotated = rotate(x[0].transpose(0, 1), *angles)
        torch.testing.assert_close(rotated.transpose(0, 1), y[0], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("scaling", SCALINGS, ids=str)
def test_older_configs_mean_the_same(scaling: dict[str, Any]) -> None:
    older = {name: value for name, value in scaling.items() if name != "rope_type"}
    older_config = {
        "max_position_embeddings": LENGTH,
        "rope_theta": 500.0,
        "rope_scaling": older | {"type": scaling["rope_type"]} if older else None,
    }
    expected = read_rope(ConfigFields(today(scaling)), HEAD_DIM, LENGTH)
    frequencies = read_rope(ConfigFields(older_config), HEAD_DIM, LENGTH)
    assert torch.equal(frequencies.inverse, expected.inverse)
    assert frequencies.attention_factor == expected.attention_factor


def test_dynamic_beyond_the_models_length_uses_the_factor_of_the_longest_sequence() -> None:
    scaling = {"rope_type": "dynamic", "factor": 2.0}
    expected, _ = ROPE_INIT_FUNCTIONS["dynamic"](llama_config(scaling), seq_len=3 * LENGTH)
    frequencies = read_rope(ConfigFields(today(scaling)), HEAD_DIM, max_length=3 * LENGTH)
    torch.testing.assert_close(frequencies.inverse, expected)


@pytest.mark.parametrize("name", ["longrope", "su"])
@pytest.mark.parametrize("max_length", [24, 25, LENGTH])
@pytest.mark.parametrize("more", [{}, {"factor": 8.0}, {"attention_factor": 1.5}], ids=str)
def test_longrope_has_other_factors_beyond_the_pretrained_length(
    more: dict[str, float], max_length: int, name: str
) -> None:
    scaling = {
        "rope_type": "longrope",
        "short_factor": [1 + index / 8 for index in range(HEAD_DIM // 2)],
        "long_factor": [2 + index for index in range(HEAD_DIM // 2)],
        "original_max_position_embeddings": 24,
        **more,
    }
    expected, attention_factor = ROPE_INIT_FUNCTIONS["longrope"](llama_config(scaling), seq_len=max_length)
    frequencies = read_rope(ConfigFields(today(scaling | {"rope_type": name})), HEAD_DIM, max_length)
    torch.testing.assert_close(frequencies.inverse, expected)
    assert frequencies.attention_factor == pytest.approx(attention_factor)


@pytest.mark.parametrize(("rope_type", "max_length"), [("linear", LENGTH), ("dynamic", 2 * LENGTH)])
def test_operator_overrides_the_models_scaling(rope_type: str, max_length: int) -> None:
    asked_for = {"rope_type": rope_type, "factor": 2.0}
    frequencies = read_rope(ConfigFields(today(SCALINGS[4])), HEAD_DIM, max_length, RopeOverride(rope_type, 2.0))
    expected = read_rope(ConfigFields(today(asked_for)), HEAD_DIM, max_length)
    assert torch.equal(frequencies.inverse, expected.inverse)
    assert frequencies.attention_factor == 1.0


@pytest.mark.parametrize(
    ("scaling", "message"),
    [
        ({"rope_type": "proportional"}, "rope_parameters.rope_type = 'proportional'"),
        ({"rope_type": "longrope"}, "rope_parameters.short_factor = None: the model needs this field"),
        ({"rope_type": "longrope", "short_factor": [1.0] * 3}, "must be 16 positive numbers"),
        ({"rope_type": "longrope", "short_factor": [1.0] * 15 + [0]}, "must be 16 positive numbers"),
        ({"rope_type": "linear"}, "rope_parameters.factor = None: the model needs this field"),
        ({"rope_type": "linear", "factor": 0.0}, "rope_parameters.factor = 0.0: must be a positive number"),
        ({"rope_type": "llama3", "factor": 8.0}, "rope_parameters.low_freq_factor = None"),
        ({"partial_rotary_factor": 0.5}, "rope_parameters.partial_rotary_factor = 0.5"),
    ],
)
def test_what_cannot_be_honoured_is_refused(scaling: dict[str, Any], message: str) -> None:
    with pytest.raises(UnsupportedModelError, match=re.escape(message)):
        read_rope(ConfigFields(today(scaling)), HEAD_DIM, LENGTH)


@pytest.mark.parametrize("factor", [0.01, 0.1, 1.5])
def test_part_that_cannot_be_rotated_is_refused(factor: float) -> None:
    config = ConfigFields(today({"partial_rotary_factor": factor}))
    with pytest.raises(UnsupportedModelError, match="must be an even number of the 32 numbers of a head"):
        read_rope(config, HEAD_DIM, LENGTH, is_partial=True)


def test_partial_rotation_beside_the_object_is_refused() -> None:
    config = ConfigFields(today({"rope_type": "default"}) | {"partial_rotary_factor": 0.25})
    with pytest.raises(UnsupportedModelError, match="partial_rotary_factor"):
        read_rope(config, HEAD_DIM, LENGTH)
