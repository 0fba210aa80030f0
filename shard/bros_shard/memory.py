"""The machine's memory: how much of it a rank may count on, and how it is taken without being written."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Final

import numpy as np
import torch
from torch import Tensor

_MEMINFO: Final = Path("/proc/meminfo")
_CGROUP: Final = Path("/sys/fs/cgroup")


class InsufficientMemoryError(Exception):
    """There is no room for what a rank needs at least."""


def available_bytes() -> int:
    """What can be allocated without swapping: the kernel's estimate, or less where a container is limited (cgroup v2).

    Raises:
        InsufficientMemoryError: the kernel does not say (not Linux).
    """
    try:
        fields = dict(line.split(":", 1) for line in _MEMINFO.read_text().splitlines())
        available = int(fields["MemAvailable"].split()[0]) * 1024
    except (OSError, KeyError, ValueError):
        raise InsufficientMemoryError("cannot tell how much memory is free; set kv_memory_bytes") from None
    try:
        limit = int((_CGROUP / "memory.max").read_text()) - int((_CGROUP / "memory.current").read_text())
    except (OSError, ValueError):  # no cgroup v2, or "max": no limit
        return available
    return max(0, min(available, limit))


def host_pool_bytes(region_bytes: int, reserved_bytes: int, world_size: int) -> int:
    """What the host pool of each of `world_size` ranks may take, where nobody said: as much as its region.

    At most a quarter of the memory that is free now, less `reserved_bytes` that were promised but not yet taken, goes
    to all pools together; nothing where the kernel does not say what is free.
    """
    try:
        free_bytes = available_bytes() - reserved_bytes
    except InsufficientMemoryError:
        return 0
    return min(region_bytes, max(0, free_bytes) // 4 // world_size)


def lazy_zeros(sizes: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """A tensor of zeros on the CPU whose pages the system commits when they are first written.

    `torch.zeros` would write all of it now: seconds, and gigabytes that may never be needed.
    """
    num_bytes = math.prod(sizes) * dtype.itemsize
    if num_bytes == 0:
        return torch.zeros(sizes, dtype=dtype)
    return torch.from_numpy(np.zeros(num_bytes, dtype=np.uint8)).view(dtype).view(sizes)
