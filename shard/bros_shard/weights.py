"""This rank's share of a checkpoint's tensors."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from bros_kernels.kernels import Kernels
from bros_kernels.low_rank import AdapterRouting
from bros_shard.checkpoint import Checkpoint
from bros_shard.lora import LoraAdapter
from bros_shard.parallel import ParallelGroup, part_of


@dataclass(frozen=True, eq=False)
class RankWeights:
    """This rank's share of a checkpoint, on its device and in the dtype that is served. Read where it is asked for."""

    checkpoint: Checkpoint
    parallel: ParallelGroup
    device: torch.device
    dtype: torch.dtype
    #: What is computed with the weights, which may lay them out anew.
    kernels: Kernels
    #: The checkpoint's matrices are (in_features, out_features). Shapes, rows and columns are said of what becomes of
    #: them: (out_features, in_features).
    are_transposed: bool = False
    #: What is added to some of the weights, for the rows that the routing says, by index.
    adapters: Sequence[LoraAdapter] = ()
    routing: AdapterRouting = field(default_factory=AdapterRouting)

    def transposed(self) -> RankWeights:
        """The same share, of matrices that the checkpoint holds as (in_features, out_features)."""
        return replace(self, are_transposed=True)

    def unadapted(self) -> RankWeights:
        """The same share, to which no adapter adds anything."""
        return replace(self, adapters=())

    def whole(self, name: str, shape: Sequence[int]) -> Tensor:
        """The whole tensor, on every rank."""
        return self._take(name, shape)

    def rows(self, name: str, shape: Sequence[int], ranges: Iterable[range]) -> Tensor:
        """Ranges of dim 0, in their order."""
        parts = [self._take(name, shape, 0, rows.start, rows.stop) for rows in ranges]
        return torch.cat(parts) if len(parts) > 1 else parts[0]

    def columns(self, name: str, shape: Sequence[int]) -> Tensor:
        """This rank's part of dim 1."""
        columns = part_of(self.parallel, shape[1])
        return self._take(name, shape, 1, columns.start, columns.stop)

    def padded_rows(self, name: str, shape: tuple[int, int]) -> Tensor:
        """This rank's part of dim 0, cut into equal parts of which the last is filled up with zeros."""
        num_rows = -(-shape[0] // self.parallel.world_size)
        start = min(self.parallel.rank * num_rows, shape[0])
        stop = min(start + num_rows, shape[0])
        part = self.checkpoint.take(name, shape, 0, start, stop)
        if stop - start < num_rows:
            part = torch.cat([part, part.new_zeros(num_rows - (stop - start), shape[1])])
        return self.placed(part)

    def placed(self, tensor: Tensor) -> Tensor:
        """A copy on this rank's device, in the dtype that is served."""
        # Always: a tensor that still lay in the mapped file would fault if the file were cut while serving.
        return tensor.to(device=self.device, dtype=self.dtype, copy=True, memory_format=torch.contiguous_format)

    def _take(self, name: str, shape: Sequence[int], dim: int = 0, start: int = 0, stop: int | None = None) -> Tensor:
        if self.are_transposed and len(shape) == 2:
            return self.placed(self.checkpoint.take(name, shape[::-1], 1 - dim, start, stop).T)
        return self.placed(self.checkpoint.take(name, shape, dim, start, stop))
