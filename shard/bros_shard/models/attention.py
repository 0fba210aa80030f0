"""Self-attention over the paged region, and the projection of its inputs in the layouts that checkpoints have."""

from __future__ import annotations

from enum import Enum

import torch
from torch import Tensor

from bros_kernels.linear import Linear, RMSNorm
from bros_kernels.paged_attention import Angles, AttentionLayer, PagedAttention
from bros_shard.models.heads import Heads
from bros_shard.models.model import LayerKV
from bros_shard.weights import RankWeights


class QKVLayout(Enum):
    """In which order one tensor holds the rows of all query, key and value heads."""

    BY_ROLE = "all queries, all keys, all values"
    BY_KEY_HEAD = "for each key head the queries that read it, the key, the value"


class Attention:
    """Projection to queries, keys and values; attention; projection of what was attended to."""

    def __init__(self, layer: AttentionLayer, qkv: Linear, output: Linear) -> None:
        """`qkv`: to this rank's query, key and value heads. `output`: of all ranks together."""
        self.layer = layer
        self.qkv = qkv
        self.output = output

    def __call__(
        self, x: Tensor, residual: Tensor | None, angles: Angles | None, kv: LayerKV, attention: PagedAttention
    ) -> Tensor:
        """(T, hidden_size) to the same: what was attended to, and `residual` added to it.

        Args:
            angles: `Rotary.angles` of the tokens' positions, None for a model without rotation.
        """
        return self.output(attention.attend(self.layer, self.qkv(x), angles, *kv), residual)


def separate_qkv(
    weights: RankWeights, prefix: str, heads: Heads, hidden_size: int, has_bias: bool, norm: RMSNorm | None = None
) -> Linear:
    """The projection that a checkpoint keeps as `q_proj`, `k_proj` and `v_proj`. `norm`: of its inputs."""
    num_rows = {"q_proj": heads.num_heads, "k_proj": heads.num_kv_heads, "v_proj": heads.num_kv_heads}
    num_parts = {"q_proj": heads.parallel.world_size, "k_proj": heads.num_kv_parts, "v_proj": heads.num_kv_parts}

    def rows(kind: str, *columns: int) -> Tensor:
        return torch.cat(
            [
                weights.rows(f"{prefix}.{name}.{kind}", (num * heads.head_dim, *columns), num_parts[name])
                for name, num in num_rows.items()
            ]
        )

    return weights.kernels.linear(rows("weight", hidden_size), rows("bias") if has_bias else None, norm)


def fused_qkv(
    weights: RankWeights,
    name: str,
    heads: Heads,
    hidden_size: int,
    layout: QKVLayout,
    has_bias: bool,
    norm: RMSNorm | None = None,
) -> Linear:
    """The projection that a checkpoint keeps as one tensor. `norm`: of its inputs."""
    chosen = _fused_heads(heads, layout)
    num_rows = (heads.num_heads + 2 * heads.num_kv_heads) * heads.head_dim
    weight = weights.blocks(f"{name}.weight", (num_rows, hidden_size), heads.head_dim, chosen)
    bias = weights.blocks(f"{name}.bias", (num_rows,), heads.head_dim, chosen) if has_bias else None
    return weights.kernels.linear(weight, bias, norm)


def _fused_heads(heads: Heads, layout: QKVLayout) -> list[int]:
    """Where a fused tensor holds this rank's heads: its queries, then its keys, then its values."""
    group = heads.group_size
    if layout is QKVLayout.BY_ROLE:
        keys = [heads.num_heads + head for head in heads.local_kv]
        return [*heads.local, *keys, *(key + heads.num_kv_heads for key in keys)]
    # | q q q k v | q q q k v | with a group of 3
    keys = [head * (group + 2) + group for head in heads.local_kv]
    queries = [head // group * (group + 2) + head % group for head in heads.local]
    return [*queries, *keys, *(key + 1 for key in keys)]
