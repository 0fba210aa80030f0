"""A projection that a checkpoint keeps as one tensor is the one that another keeps as several, on every rank."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor
from torch.nn import functional as F

from bros_kernels.torch_kernels import TorchKernels
from bros_shard.checkpoint import Checkpoint
from bros_shard.models.attention import QKVLayout, fused_qkv, separate_qkv
from bros_shard.models.heads import Heads
from bros_shard.models.layers import fused_gated_linear, gated_linear
from bros_shard.weights import RankWeights

SIZE, HEAD_DIM, INNER_SIZE = 12, 4, 8

#: (query heads, key-value heads, ranks).
SHARED = [(4, 4, 1), (4, 4, 2), (8, 2, 1), (8, 2, 2), (8, 2, 4), (8, 2, 8), (4, 1, 1), (4, 1, 2), (6, 3, 3)]


@dataclass(frozen=True)
class Ranks:
    """What loading weights asks of a `ParallelGroup`."""

    rank: int
    world_size: int


def all_ranks(world_size: int) -> list[Any]:
    return [Ranks(rank, world_size) for rank in range(world_size)]


def rank_weights(checkpoint: Checkpoint, parallel: Any) -> RankWeights:
    return RankWeights(checkpoint, parallel, torch.device("cpu"), torch.float32, TorchKernels(torch.float32))


def fuse(q: Tensor, k: Tensor, v: Tensor, layout: QKVLayout) -> Tensor:
    """(heads * HEAD_DIM, …) each."""
    if layout is QKVLayout.BY_ROLE:
        return torch.cat([q, k, v])
    num_kv_heads = len(k) // HEAD_DIM
    parts = zip(*(x.chunk(num_kv_heads) for x in (q, k, v)), strict=True)
    return torch.cat([torch.cat(part) for part in parts])


@pytest.mark.parametrize(("num_heads", "num_kv_heads", "world_size"), SHARED)
def test_ranks_hold_each_query_head_once_and_the_key_heads_that_it_reads(
    num_heads: int, num_kv_heads: int, world_size: int
) -> None:
    ranks = [Heads(parallel, num_heads, num_kv_heads, HEAD_DIM) for parallel in all_ranks(world_size)]
    assert [head for heads in ranks for head in heads.local] == list(range(num_heads))
    for heads in ranks:
        assert {head // heads.group_size for head in heads.local} == set(heads.local_kv)
        layer = heads.attention_layer()
        # What the kernels make of it: local query head h reads local key head h // (local group).
        group = layer.num_heads // layer.num_kv_heads
        assert [heads.local_kv[index // group] for index in range(layer.num_heads)] == [
            head // heads.group_size for head in heads.local
        ]


@pytest.mark.parametrize("layout", QKVLayout)
@pytest.mark.parametrize("is_transposed", [False, True])
@pytest.mark.parametrize(("num_heads", "num_kv_heads", "world_size"), SHARED)
def test_fused_queries_keys_and_values(
    num_heads: int, num_kv_heads: int, world_size: int, is_transposed: bool, layout: QKVLayout, tmp_path: Path
) -> None:
    tensors = {}
    for name, num in (("q_proj", num_heads), ("k_proj", num_kv_heads), ("v_proj", num_kv_heads)):
        tensors[f"{name}.weight"] = torch.randn(num * HEAD_DIM, SIZE)
        tensors[f"{name}.bias"] = torch.randn(num * HEAD_DIM)
    for kind in ("weight", "bias"):
        fused = fuse(*(tensors[f"{name}.{kind}"] for name in ("q_proj", "k_proj", "v_proj")), layout)
        tensors[f"fused.{kind}"] = fused.T.contiguous() if is_transposed and kind == "weight" else fused
    save_file({f"a.{name}": tensor for name, tensor in tensors.items()}, tmp_path / "model.safetensors")
    x = torch.randn(3, SIZE)
    with Checkpoint(tmp_path) as checkpoint:
        for parallel in all_ranks(world_size):
            heads = Heads(parallel, num_heads, num_kv_heads, HEAD_DIM)
            weights = rank_weights(checkpoint, parallel)
            expected = separate_qkv(weights, "a", heads, SIZE, has_bias=True)(x)
            fused_weights = weights.transposed() if is_transposed else weights
            assert torch.equal(fused_qkv(fused_weights, "a.fused", heads, SIZE, layout, has_bias=True)(x), expected)


@pytest.mark.parametrize("has_bias", [False, True])
@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_fused_gate_and_up(world_size: int, has_bias: bool, tmp_path: Path) -> None:
    tensors = {}
    for kind, shape in (("weight", (INNER_SIZE, SIZE)), ("bias", (INNER_SIZE,))):
        gate, up = torch.randn(shape), torch.randn(shape)
        tensors |= {f"gate.{kind}": gate, f"up.{kind}": up, f"fused.{kind}": torch.cat([gate, up])}
    save_file(tensors, tmp_path / "model.safetensors")
    x = torch.randn(3, SIZE)
    with Checkpoint(tmp_path) as checkpoint:
        for parallel in all_ranks(world_size):
            weights = rank_weights(checkpoint, parallel)
            expected = gated_linear(weights, ("gate", "up"), INNER_SIZE, SIZE, F.silu, has_bias)(x)
            assert torch.equal(fused_gated_linear(weights, "fused", INNER_SIZE, SIZE, F.silu, has_bias)(x), expected)
