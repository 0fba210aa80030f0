"""A layer in one call against its parts."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch.nn import functional as F

from bros_kernels.attn_meta import AttnMeta
from bros_kernels.cpu_kernels import CpuKernels
from bros_kernels.linear import RMSNorm
from bros_kernels.paged_attention import AttentionLayer

SIZE, INNER_SIZE, HEAD_DIM, NUM_HEADS, NUM_KV_HEADS = 48, 96, 32, 6, 2


@pytest.mark.parametrize("has_int8_weights", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("num_new", [1, 40])
def test_layer_has_the_bits_of_its_parts(
    cpu_kernels: Callable[..., CpuKernels], num_new: int, dtype: torch.dtype, has_int8_weights: bool
) -> None:
    """Two sequences: one decodes at the end of a second span, one brings `num_new` tokens."""
    kernels = cpu_kernels(dtype, has_int8_weights)

    def normal(*sizes: int) -> torch.Tensor:
        return torch.randn(sizes).to(dtype)

    norms = [RMSNorm(torch.rand(SIZE).add(0.5).to(dtype), 1e-5) for _ in range(2)]
    head_norms = [RMSNorm(torch.rand(HEAD_DIM).add(0.5).to(dtype), 1e-5) for _ in range(2)]
    qkv = kernels.linear(normal((NUM_HEADS + 2 * NUM_KV_HEADS) * HEAD_DIM, SIZE), normal(320), norms[0])
    output = kernels.linear(normal(SIZE, NUM_HEADS * HEAD_DIM))
    gated = kernels.gated_linear(normal(2 * INNER_SIZE, SIZE), None, F.silu, norms[1])
    down = kernels.linear(normal(SIZE, INNER_SIZE), normal(SIZE))
    layer = AttentionLayer(
        num_heads=NUM_HEADS,
        num_kv_heads=NUM_KV_HEADS,
        head_dim=HEAD_DIM,
        scale=0.2,
        q_norm=head_norms[0],
        k_norm=head_norms[1],
    )
    meta = AttnMeta(
        block_table=torch.tensor([[0, ~1, 2, 3, 4, 5, 6, 7, 8, 9], [~10, 11] + [0] * 8], dtype=torch.int32),
        seq_lens=torch.tensor([600, 20 + num_new], dtype=torch.int32),
        cu_q=torch.tensor([0, 1, 1 + num_new], dtype=torch.int32),
        slot_mapping=torch.tensor([9 * 64 + 23, *(10 * 64 + 63 - 20 - i for i in range(num_new))]),
        max_q=num_new,
        max_k=600,
        n_decode=2 if num_new == 1 else 1,
        block_size=64,
    )
    k, v, hidden = normal(12, 64, NUM_KV_HEADS, HEAD_DIM), normal(12, 64, NUM_KV_HEADS, HEAD_DIM), normal(41, SIZE)
    hidden = hidden[: 1 + num_new].contiguous()
    angles = normal(1 + num_new, 1, 16), normal(1 + num_new, 1, 16)
    region = k.clone(), v.clone()

    attended = kernels.attention(meta).attend(layer, qkv(hidden), angles, *region)
    between = output(attended, hidden)
    expected = down(gated(between), between)
    fused = kernels.fuse_layer(layer, qkv, output, gated, down)
    assert fused is not None
    assert torch.equal(fused(hidden.clone(), angles, k, v, kernels.attention(meta)), expected)
    assert torch.equal(k, region[0]) and torch.equal(v, region[1])


def test_layer_of_other_parts_has_no_single_call(cpu_kernels: Callable[..., CpuKernels]) -> None:
    kernels = cpu_kernels(torch.bfloat16)
    layer = AttentionLayer(num_heads=1, num_kv_heads=1, head_dim=33, scale=1.0)
    linear = kernels.linear(torch.randn(32, 32).bfloat16())
    gelu = kernels.gated_linear(torch.randn(64, 32).bfloat16(), None, F.gelu, None)
    silu = kernels.gated_linear(torch.randn(64, 32).bfloat16(), None, F.silu, None)
    even = AttentionLayer(num_heads=1, num_kv_heads=1, head_dim=32, scale=1.0)
    assert kernels.fuse_layer(even, linear, linear, silu, linear) is not None
    assert kernels.fuse_layer(even, linear, linear, gelu, linear) is None
    assert kernels.fuse_layer(layer, linear, linear, silu, linear) is None
    assert kernels.fuse_layer(even, linear, lambda x, residual=None: x, silu, linear) is None
