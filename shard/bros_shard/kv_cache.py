"""This rank's KV region and host pool: their tensors, and the copies in and between them.

The region is (num_layers, 2, num_blocks, block_size, num_kv_heads, head_dim): keys, then values. It is filled with
zeros, so that reading a slot nobody wrote is harmless. The host pool has the same layout, but its blocks hold tokens
in logical order only. Which block is whose is the router's knowledge; nothing here checks it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from bros_kernels.paged_attention import copy_tails
from bros_kernels.slots import slots_of
from bros_shard.models.model import KVShape, LayerKV
from bros_shard.protocol import HostCopy, TailMove


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
        token_sizes = (block_size, shape.num_kv_heads, shape.head_dim)
        self.region = _zeros((shape.num_layers, 2, num_blocks, *token_sizes), dtype, device)
        self.layers: list[LayerKV] = [(layer[0], layer[1]) for layer in self.region]
        self.host_pool = _zeros((shape.num_layers, 2, num_host_blocks, *token_sizes), dtype, torch.device("cpu"))
        if device.type == "cuda":
            self.host_pool = self.host_pool.pin_memory()  # so that the GPU reads and writes it directly

    def copy_out(self, copies: Sequence[HostCopy]) -> None:
        """Region to host pool. No host block may be named twice."""
        if copies:
            device_slots, host_slots = self._slots(copies)
            tokens = self.region.flatten(2, 3).index_select(2, device_slots)
            self.host_pool.flatten(2, 3).index_copy_(2, host_slots, tokens.cpu())

    def copy_in(self, copies: Sequence[HostCopy]) -> None:
        """Host pool to region. No slot of the region may be written twice."""
        if copies:
            device_slots, host_slots = self._slots(copies)
            tokens = self.host_pool.flatten(2, 3).index_select(2, host_slots)
            self.region.flatten(2, 3).index_copy_(2, device_slots, tokens.to(self.region.device))

    def move_tails(self, moves: Sequence[TailMove]) -> None:
        """Copy tails from one entry's block to another's. No slot may be both source and destination."""
        if moves:
            device = self.region.device
            sources = torch.tensor([move.source_entry for move in moves], dtype=torch.int32, device=device)
            destinations = torch.tensor([move.destination_entry for move in moves], dtype=torch.int32, device=device)
            counts = torch.tensor([move.num_tokens for move in moves], dtype=torch.int32, device=device)
            copy_tails(self.region, sources, destinations, counts)

    def _slots(self, copies: Sequence[HostCopy]) -> tuple[Tensor, Tensor]:
        """Region slots (on the device) and host slots of the copied tokens, in logical order."""
        entries: list[int] = []
        host_blocks: list[int] = []
        offsets: list[int] = []
        for copy in copies:
            entries += [copy.entry] * copy.num_tokens
            host_blocks += [copy.host_block] * copy.num_tokens
            offsets += range(copy.num_tokens)
        offset = torch.tensor(offsets)
        device_slots = slots_of(torch.tensor(entries), offset, self.block_size)
        return device_slots.to(self.region.device), slots_of(torch.tensor(host_blocks), offset, self.block_size)


def _zeros(sizes: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    if device.type != "cpu" or 0 in sizes:
        return torch.zeros(sizes, dtype=dtype, device=device)
    # NumPy takes zeroed memory from the system, which commits a page when it is first written; torch.zeros would
    # write all of it now: seconds, and gigabytes that may never be needed.
    return torch.from_numpy(np.zeros(math.prod(sizes) * dtype.itemsize, dtype=np.uint8)).view(dtype).view(sizes)
