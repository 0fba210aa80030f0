"""Self-attention over the paged region, and the projection of its inputs in the layouts that checkpoints have."""

from __future__ import annotations

from enum import Enum

from torch import Tensor

from bros_kernels.linear import Linear, RMSNorm
from bros_kernels.paged_attention import Angles, AttentionLayer, PagedAttention
from bros_shard.models.heads import Heads
from bros_shard.models.model import LayerKV
from bros_shard.models.projections import HeldFeatures, column_parallel
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
    num_heads = {"q_proj": heads.num_heads, "k_proj": heads.num_kv_heads, "v_proj": heads.num_kv_heads}
    num_parts = {"q_proj": heads.parallel.world_size, "k_proj": heads.num_kv_parts, "v_proj": heads.num_kv_parts}
    held = [
        HeldFeatures.part(heads.parallel, f"{prefix}.{name}", num * heads.head_dim, num_parts[name])
        for name, num in num_heads.items()
    ]
    return column_parallel(weights, held, hidden_size, has_bias, norm)


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
    num_features = (heads.num_heads + 2 * heads.num_kv_heads) * heads.head_dim
    held = HeldFeatures.blocks(name, num_features, heads.head_dim, _fused_heads(heads, layout))
    return column_parallel(weights, [held], hidden_size, has_bias, norm)


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
