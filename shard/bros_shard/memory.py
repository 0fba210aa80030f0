"""How much of the machine's memory a rank may count on."""

from __future__ import annotations

from pathlib import Path
from typing import Final

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
