"""The tensor-parallel group as one rank sees it: who it is, and the collectives between the ranks."""

from __future__ import annotations

import atexit
import os

import torch
import torch.distributed as dist
from torch import Tensor


class ParallelGroup:
    """Collectives of one rank. A group of one initialises nothing, and its collectives return at once.

    Every rank must call the same collectives in the same order. A lost peer makes them raise `RuntimeError`.
    """

    def __init__(self, rank: int = 0, world_size: int = 1, rendezvous: str = "", device: str = "cpu") -> None:
        """Wait until all ranks are there.

        Args:
            rendezvous: a `file://` URL that the ranks share and nobody has used before.
            device: type of the tensors that will be passed: `cpu` (Gloo) or `cuda` (NCCL).
        """
        assert 0 <= rank < world_size
        self.rank = rank
        self.world_size = world_size
        if world_size > 1:
            # The ranks of a group share a host; without this the libraries listen on outside interfaces too.
            os.environ["GLOO_SOCKET_IFNAME"] = "lo"
            os.environ["NCCL_SOCKET_IFNAME"] = "lo"
            dist.init_process_group(
                "nccl" if device == "cuda" else "gloo", init_method=rendezvous, rank=rank, world_size=world_size
            )
            # Gloo's threads must be gone before the interpreter is, however the process ends.
            atexit.register(dist.destroy_process_group)

    def all_reduce(self, tensor: Tensor) -> Tensor:
        """Sum over the ranks, in place. Returns the tensor."""
        if self.world_size > 1:
            dist.all_reduce(tensor)
        return tensor

    def minimum(self, value: int, device: torch.device) -> int:
        """The smallest `value` of all ranks, on every rank."""
        if self.world_size == 1:
            return value
        smallest = torch.tensor(value, dtype=torch.int64, device=device)
        dist.all_reduce(smallest, dist.ReduceOp.MIN)
        return int(smallest)

    def gather_last_dim(self, tensor: Tensor) -> Tensor | None:
        """Concatenate the ranks' (…, n) tensors along the last dimension, on rank 0; None on the others."""
        if self.world_size == 1:
            return tensor
        tensor = tensor.contiguous()
        parts = [torch.empty_like(tensor) for _ in range(self.world_size)] if self.rank == 0 else None
        dist.gather(tensor, parts)
        return None if parts is None else torch.cat(parts, dim=-1)

    def broadcast(self, tensor: Tensor) -> Tensor:
        """Overwrite the tensor with rank 0's, which has the same shape and dtype. Returns the tensor."""
        if self.world_size > 1:
            dist.broadcast(tensor, src=0)
        return tensor


def part_of(parallel: ParallelGroup, size: int, num_parts: int | None = None) -> range:
    """This rank's part of `size` things, cut into `num_parts`: the world size, or fewer where ranks share a part."""
    num_parts = num_parts or parallel.world_size
    assert size % num_parts == 0
    part_size, index = size // num_parts, parallel.rank * num_parts // parallel.world_size
    return range(index * part_size, (index + 1) * part_size)
