"""This rank's KV region: its tensor, and the copies in it. The host pool is beside it.

The region is (num_layers, 2, num_blocks, block_size, num_kv_heads, head_dim): keys, then values. It is filled with
zeros, so that reading a slot nobody wrote is harmless. Which block is whose is the router's knowledge; nothing here
checks it.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from bros_kernels.tails import copy_tails
from bros_shard.host_pool import HostPool
from bros_shard.memory import lazy_zeros
from bros_shard.models.model import KVShape, LayerKV
from bros_shard.protocol import TailMove


def block_bytes(shape: KVShape, block_size: int, dtype: torch.dtype) -> int:
    """Bytes of one block on this rank: all layers, keys and values."""
    return 2 * shape.num_layers * block_size * shape.num_kv_heads * shape.head_dim * dtype.itemsize


class KVCache:
    """The region on the device, and the host pool beside it."""

    def __init__(
        self,
        shape: KVShape,
        num_blocks: int,
        block_size: int,
        num_host_blocks: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        self.num_blocks = num_blocks
        self.num_host_blocks = num_host_blocks
        self.block_size = block_size
        sizes = (shape.num_layers, 2, num_blocks, block_size, shape.num_kv_heads, shape.head_dim)
        is_on_host = device.type == "cpu"
        self.region = lazy_zeros(sizes, dtype) if is_on_host else torch.zeros(sizes, dtype=dtype, device=device)
        self.layers: list[LayerKV] = [(layer[0], layer[1]) for layer in self.region]
        self.host_pool = HostPool(self.region, num_host_blocks)
        self._num_touched = 0

    def touch(self, num_blocks: int) -> None:
        """Write zeros to the first blocks, once: a CPU reads memory that was never written faster than any other."""
        stop = min(num_blocks, self.num_blocks)
        self.region[:, :, self._num_touched : stop] = 0
        self._num_touched = max(self._num_touched, stop)

    def move_tails(self, moves: Sequence[TailMove]) -> None:
        """Copy tails from one entry's block to another's. No slot may be both source and destination."""
        if moves:
            device = self.region.device
            sources = torch.tensor([move.source_entry for move in moves], dtype=torch.int32, device=device)
            destinations = torch.tensor([move.destination_entry for move in moves], dtype=torch.int32, device=device)
            counts = torch.tensor([move.num_tokens for move in moves], dtype=torch.int32, device=device)
            copy_tails(self.region, sources, destinations, counts)
