"""The attention heads of a model, and which of them a rank holds."""

from __future__ import annotations

from dataclasses import dataclass

from bros_kernels.linear import RMSNorm
from bros_kernels.paged_attention import AttentionLayer
from bros_shard.models.model import KVShape
from bros_shard.parallel import ParallelGroup


@dataclass(frozen=True)
class Heads:
    """`num_heads` query heads, of which neighbours share one of `num_kv_heads` key-value heads.

    Every rank holds as many query heads as the others, and the key-value heads that these read. The numbers are those
    that `check_divisible` lets pass.
    """

    parallel: ParallelGroup
    num_heads: int
    num_kv_heads: int
    head_dim: int

    @property
    def group_size(self) -> int:
        """Query heads that share a key-value head."""
        return self.num_heads // self.num_kv_heads

    @property
    def num_kv_parts(self) -> int:
        """Parts that the key-value heads are cut into: ranks share a part where there are fewer heads than ranks."""
        return min(self.num_kv_heads, self.parallel.world_size)

    @property
    def local(self) -> range:
        """This rank's query heads."""
        size = self.num_heads // self.parallel.world_size
        return range(self.parallel.rank * size, (self.parallel.rank + 1) * size)

    @property
    def local_kv(self) -> range:
        """This rank's key-value heads."""
        size = self.num_kv_heads // self.num_kv_parts
        part = self.parallel.rank * self.num_kv_parts // self.parallel.world_size
        return range(part * size, (part + 1) * size)

    def kv_shape(self, num_layers: int) -> KVShape:
        """What this rank stores for one token."""
        return KVShape(num_layers, len(self.local_kv), self.head_dim)

    def attention_layer(
        self,
        *,
        scale: float | None = None,
        window: int | None = None,
        softcap: float | None = None,
        qk_norms: tuple[RMSNorm, RMSNorm] | None = None,
    ) -> AttentionLayer:
        """What the kernels are told of one layer's attention on this rank.

        Args:
            scale: of the scores; None: head_dim ** -0.5.
            qk_norms: of each head's query and of its key.
        """
        q_norm, k_norm = qk_norms or (None, None)
        return AttentionLayer(
            num_heads=len(self.local),
            num_kv_heads=len(self.local_kv),
            head_dim=self.head_dim,
            scale=self.head_dim**-0.5 if scale is None else scale,
            window=window,
            softcap=softcap,
            q_norm=q_norm,
            k_norm=k_norm,
        )
