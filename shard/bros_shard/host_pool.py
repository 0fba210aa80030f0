"""The host pool: blocks of ordinary memory to which KV blocks are copied before others overwrite them.

(num_host_blocks, num_layers, 2, block_size, num_kv_heads, head_dim): a host block lies in one piece, and holds tokens
in logical order, whichever end its KV block was filled from. Whose tokens they are is the router's knowledge.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator, Sequence
from typing import Final

import structlog
import torch
from torch import Tensor

from bros_shard.block_layout import block_of, is_reversed
from bros_shard.memory import lazy_zeros
from bros_shard.protocol import HostCopy

#: GPU memory for staging buffers, of which there are at least two.
_STAGING_BYTES: Final = 64 * 2**20

log = structlog.get_logger()


def staging_bytes(block_bytes: int) -> int:
    """GPU memory that a host pool takes."""
    return block_bytes * max(2, _STAGING_BYTES // block_bytes)


class HostPool:
    """Blocks of host memory beside a region, and the copies between the two."""

    def __init__(self, region: Tensor, num_blocks: int) -> None:
        """Allocate `num_blocks` for a region of (num_layers, 2, num_blocks, block_size, num_kv_heads, head_dim)."""
        self._region = region
        block = region[:, :, 0]
        self.blocks = lazy_zeros((num_blocks, *block.shape), region.dtype)
        self._link: _GpuLink | None = None
        if region.device.type == "cuda" and num_blocks > 0:
            self._link = _GpuLink(block)
            if _pin(self.blocks):
                weakref.finalize(self, _unpin, self.blocks.data_ptr()).atexit = False

    def copy_out(self, copies: Sequence[HostCopy]) -> None:
        """Region to pool. No host block may be named twice; its tokens beyond the copied ones are lost.

        On a GPU the transfer goes on while the current stream runs what it is given next, which may overwrite the
        copied slots.
        """
        if self._link is not None:
            self._link.copy_out(self._region, self.blocks, copies)
            return
        for copy in copies:
            tokens = _in_logical_order(_slots_of(self._region, copy), copy.entry)
            self.blocks[copy.host_block, :, :, : copy.num_tokens].copy_(tokens)

    def copy_in(self, copies: Sequence[HostCopy]) -> None:
        """Pool to region. No slot of the region may be written twice.

        On a GPU the current stream waits for the transfer: what it is given next finds the tokens.
        """
        if self._link is not None:
            self._link.copy_in(self._region, self.blocks, copies)
            return
        for copy in copies:
            tokens = self.blocks[copy.host_block, :, :, : copy.num_tokens]
            _slots_of(self._region, copy).copy_(_in_logical_order(tokens, copy.entry))


class _GpuLink:
    """A stream for transfers, and staging buffers in GPU memory, each of the size of a block.

    Only the current stream touches the region, and only the copy stream touches the pool, so each sees its own copies
    in the order in which they were asked for. The two meet in the staging buffers: a buffer is used again when the
    event says that its last reader is done.

        copy out:  region ──current stream──▶ buffer ──copy stream──▶ pool
        copy in:   pool ──copy stream──▶ buffer ──current stream──▶ region
    """

    def __init__(self, block: Tensor) -> None:
        """`block` has the shape, dtype and device of one block of the region."""
        self._stream = torch.cuda.Stream(block.device)  # type: ignore[no-untyped-call]
        num_buffers = staging_bytes(block.nbytes) // block.nbytes
        self._buffers = list(torch.empty((num_buffers, *block.shape), dtype=block.dtype, device=block.device))
        self._are_free = [torch.cuda.Event() for _ in self._buffers]  # type: ignore[no-untyped-call]
        self._next = 0

    def copy_out(self, region: Tensor, pool: Tensor, copies: Sequence[HostCopy]) -> None:
        """See `HostPool.copy_out`."""
        current = torch.cuda.current_stream(region.device)
        for copy, (buffer, is_free) in zip(copies, self._turns(), strict=False):
            current.wait_event(is_free)
            tokens = _in_logical_order(_slots_of(region, copy), copy.entry)
            buffer[:, :, : copy.num_tokens].copy_(tokens)
            self._stream.wait_stream(current)
            with torch.cuda.stream(self._stream):
                # The whole block, since that is one transfer.
                pool[copy.host_block].copy_(buffer, non_blocking=True)
            is_free.record(self._stream)

    def copy_in(self, region: Tensor, pool: Tensor, copies: Sequence[HostCopy]) -> None:
        """See `HostPool.copy_in`."""
        current = torch.cuda.current_stream(region.device)
        for copy, (buffer, is_free) in zip(copies, self._turns(), strict=False):
            self._stream.wait_event(is_free)
            with torch.cuda.stream(self._stream):
                buffer.copy_(pool[copy.host_block], non_blocking=True)
            current.wait_stream(self._stream)
            tokens = buffer[:, :, : copy.num_tokens]
            _slots_of(region, copy).copy_(_in_logical_order(tokens, copy.entry))
            is_free.record(current)

    def _turns(self) -> Iterator[tuple[Tensor, torch.cuda.Event]]:
        """The buffers, each with the event of its last reader, in turn for ever."""
        while True:
            index = self._next
            self._next = (index + 1) % len(self._buffers)
            yield self._buffers[index], self._are_free[index]


def _slots_of(region: Tensor, copy: HostCopy) -> Tensor:
    """The slots that a copy names, ascending: a view of (num_layers, 2, num_tokens, num_kv_heads, head_dim)."""
    block = region[:, :, block_of(copy.entry)]
    if is_reversed(copy.entry):
        return block[:, :, block.shape[2] - copy.num_tokens :]
    return block[:, :, : copy.num_tokens]


def _in_logical_order(tokens: Tensor, entry: int) -> Tensor:
    """From the order of an entry's slots to the order of its tokens, or back."""
    return tokens.flip(2) if is_reversed(entry) else tokens


def _pin(tensor: Tensor) -> bool:
    """Lock the tensor's memory, so that a GPU reads and writes it directly and beside other work.

    In place, since what `pin_memory` allocates is rounded up to a power of two bytes: gigabytes more, perhaps.
    """
    cudart = torch.cuda.cudart()  # type: ignore[no-untyped-call]
    error = int(cudart.cudaHostRegister(tensor.data_ptr(), tensor.nbytes, 0))
    if error != 0:
        log.warning("host pool not pinned: copies wait for each other", cuda_error=error)
    return error == 0


def _unpin(address: int) -> None:
    torch.cuda.cudart().cudaHostUnregister(address)  # type: ignore[no-untyped-call]
