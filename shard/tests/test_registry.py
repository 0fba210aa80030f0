"""A whole model's logits are those of transformers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from bros_kernels.attn_meta import AttnMeta
from bros_kernels.kernels import select_kernels
from bros_kernels.linear import RMSNorm
from bros_kernels.torch_kernels import TorchKernels
from bros_shard.checkpoint import Checkpoint
from bros_shard.kv_cache import KVCache
from bros_shard.model_config import ConfigFields, UnsupportedModelError
from bros_shard.models.experts import Experts
from bros_shard.models.layers import check_divisible
from bros_shard.models.model import ModelLimits
from bros_shard.models.qwen_moe import read_qwen3_moe
from bros_shard.models.registry import load_model
from bros_shard.parallel import ParallelGroup
from bros_shard.weights import RankWeights

CPU = torch.device("cpu")


@torch.inference_mode()
def logits_of(path: Path, prompt: list[int], dtype: torch.dtype) -> Tensor:
    """Logits after each token of a prompt that is run in one step."""
    kernels = select_kernels("auto", CPU, dtype, num_threads=2)
    model = load_model(path, ConfigFields.load(path), ParallelGroup(), CPU, dtype, ModelLimits(), kernels)
    length = len(prompt)
    cache = KVCache(model.kv_shape, num_blocks=1, block_size=64, num_host_blocks=0, dtype=dtype, device=CPU)
    meta = AttnMeta(
        block_table=torch.zeros(1, 1, dtype=torch.int32),
        seq_lens=torch.tensor([length], dtype=torch.int32),
        cu_q=torch.tensor([0, length], dtype=torch.int32),
        slot_mapping=torch.arange(length),
        max_q=length,
        max_k=length,
        n_decode=0,
        block_size=64,
    )
    attention = kernels.attention(meta)
    hidden = model.forward(torch.tensor(prompt), torch.arange(length), cache.layers, attention)
    logits = model.logits(hidden)
    assert logits is not None
    return logits


@pytest.mark.parametrize(
    "name",
    [
        "llama",
        "mistral-window",
        "qwen2",
        "qwen3",
        "mixtral",
        "qwen2-moe",
        "qwen3-moe",
        "gemma",
        "gemma2",
        "gemma3",
        "phi3",
        "phi3-longrope",
        "starcoder2",
        "falcon",
        "falcon-new",
        "opt",
        "opt-350m-like",
        "gpt2",
        "gpt-bigcode",
        "gpt-neox",
        "granite",
        "olmo2",
    ],
)
def test_float32_logits_equal_transformers(name: str, reference) -> None:
    expected = reference(name)
    with torch.inference_mode():
        logits = expected.model(torch.tensor([expected.prompts[10]])).logits[0]
    found = logits_of(expected.path, expected.prompts[10], torch.float32)
    torch.testing.assert_close(found, logits, rtol=2e-5, atol=2e-5 * float(logits.abs().max()))


@pytest.mark.parametrize(
    "name",
    [
        "llama",
        "llama-head-dim",
        "qwen3-window-bias",
        "gemma",
        "gemma2",
        "gemma3",
        "opt",
        "gpt2",
        "gpt-neox",
        "cohere2",
        "olmo2",
    ],
)
def test_bfloat16_is_as_close_to_float32_as_transformers_is(name: str, reference) -> None:
    expected = reference(name)
    prompt = expected.prompts[10]
    with torch.inference_mode():
        exact = expected.model(torch.tensor([prompt])).logits[0]
        rounded = type(expected.model).from_pretrained(expected.path, dtype=torch.bfloat16)
        theirs = rounded(torch.tensor([prompt])).logits[0].float()
    ours = logits_of(expected.path, prompt, torch.bfloat16).float()
    assert (ours - exact).square().mean() < 1.2 * (theirs - exact).square().mean()


def test_logits_come_up_to_their_cap(reference) -> None:
    expected = reference("gemma2")
    largest = logits_of(expected.path, expected.prompts[10], torch.float32).abs().max()
    assert 0.98 < largest < 1.0


@pytest.mark.parametrize(
    ("name", "extra"),
    [
        ("llama-tied", ["lm_head.weight", "model.layers.0.self_attn.rotary_emb.inv_freq"]),
        ("gpt2", ["lm_head.weight", "transformer.h.0.attn.bias", "transformer.h.0.attn.masked_bias"]),
        ("gpt-neox-sequential", ["embed_out.weight", "gpt_neox.layers.0.attention.masked_bias"]),
    ],
)
def test_tied_heads_frequencies_and_masks_in_a_checkpoint_are_ignored(
    name: str, extra: list[str], reference, tmp_path: Path
) -> None:
    expected = reference(name)
    (tmp_path / "config.json").write_text((expected.path / "config.json").read_text())
    tensors = load_file(expected.path / "model.safetensors")
    assert tensors.keys().isdisjoint(extra)
    save_file(tensors | {each: torch.zeros(8, 8) for each in extra}, tmp_path / "model.safetensors")
    prompt = expected.prompts[3]
    assert torch.equal(logits_of(tmp_path, prompt, torch.float32), logits_of(expected.path, prompt, torch.float32))


@pytest.mark.parametrize(("name", "module"), [("opt", "model."), ("gpt2", "transformer.")])
def test_first_checkpoints_lack_the_outer_module(name: str, module: str, reference, tmp_path: Path) -> None:
    expected = reference(name)
    (tmp_path / "config.json").write_text((expected.path / "config.json").read_text())
    tensors = load_file(expected.path / "model.safetensors")
    save_file(
        {name.removeprefix(module): tensor for name, tensor in tensors.items()},
        tmp_path / "model.safetensors",
    )
    prompt = expected.prompts[3]
    assert torch.equal(logits_of(tmp_path, prompt, torch.float32), logits_of(expected.path, prompt, torch.float32))


class Ranks:
    """What loading a model asks of a `ParallelGroup`."""

    def __init__(self, world_size: int) -> None:
        self.rank = 0
        self.world_size = world_size


def test_experts_that_cannot_be_split_are_refused(reference) -> None:
    path = reference("qwen3-moe").path
    ranks: Any = Ranks(3)
    (experts, *_) = read_qwen3_moe(ConfigFields.load(path), ModelLimits()).experts
    assert experts is not None
    with Checkpoint(path) as checkpoint:
        weights = RankWeights(checkpoint, ranks, CPU, torch.float32, TorchKernels(torch.float32))
        norm = RMSNorm(torch.ones(64), 1e-6)
        with pytest.raises(UnsupportedModelError, match="32 features of the MLP cannot be split over 3 ranks"):
            Experts(experts, weights, "model.layers.0", 64, torch.relu, norm)


def test_heads_that_cannot_be_split_are_refused(reference) -> None:
    path = reference("llama").path
    ranks: Any = Ranks(3)
    kernels = TorchKernels(torch.float32)
    with pytest.raises(UnsupportedModelError, match="4 attention heads cannot be split over 3 ranks"):
        load_model(path, ConfigFields.load(path), ranks, CPU, torch.float32, ModelLimits(), kernels)


@pytest.mark.parametrize(
    ("world_size", "num_heads", "num_kv_heads", "inner_size"),
    [(1, 9, 3, 1536), (2, 8, 2, 96), (4, 8, 2, 96), (4, 8, 1, 96), (2, 8, 8, 96), (2, 12, 6, 96)],
)
def test_models_that_can_be_split(world_size: int, num_heads: int, num_kv_heads: int, inner_size: int) -> None:
    ranks: Any = Ranks(world_size)
    check_divisible(ranks, num_heads, num_kv_heads, inner_size)


@pytest.mark.parametrize(
    ("world_size", "num_heads", "num_kv_heads", "inner_size", "message"),
    [
        (2, 9, 3, 1536, "9 attention heads cannot be split over 2 ranks"),
        (4, 8, 2, 98, "98 features of the MLP cannot be split over 4 ranks"),
        (4, 12, 6, 96, "6 key-value heads cannot be split over 4 ranks"),
        (1, 8, 3, 96, "8 attention heads do not share 3 key-value heads evenly"),
    ],
)
def test_models_that_cannot_be_split(
    world_size: int, num_heads: int, num_kv_heads: int, inner_size: int, message: str
) -> None:
    ranks: Any = Ranks(world_size)
    with pytest.raises(UnsupportedModelError, match=message):
        check_divisible(ranks, num_heads, num_kv_heads, inner_size)
