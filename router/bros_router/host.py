"""What this machine, or this container, offers: cores, free memory, GPUs."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

#: (limit, usage) files of a container's memory: control groups version 2, then version 1.
_MEMORY_FILES = (
    ("sys/fs/cgroup/memory.max", "sys/fs/cgroup/memory.current"),
    ("sys/fs/cgroup/memory/memory.limit_in_bytes", "sys/fs/cgroup/memory/memory.usage_in_bytes"),
)
#: Values of NVIDIA_VISIBLE_DEVICES that name no device.
_NO_DEVICES = {"", "void", "none"}


@dataclass(frozen=True, slots=True)
class Host:
    """A machine as it was when the launcher started."""

    #: Cores that this process may use.
    num_cores: int
    free_memory_bytes: int
    #: GPUs that the ranks will see.
    num_gpus: int
    #: Whether someone chose GPUs for this process; if so, a rank on each of them is the default.
    has_gpu_selection: bool

    @classmethod
    def read(cls, environment: Mapping[str, str], root: Path = Path("/")) -> Host:
        """Ask the kernel. Loads no CUDA library: that takes seconds."""
        selection = environment.get("CUDA_VISIBLE_DEVICES", environment.get("NVIDIA_VISIBLE_DEVICES"))
        num_devices = sum(path.name.removeprefix("nvidia").isdigit() for path in (root / "dev").glob("nvidia*"))
        return cls(
            num_cores=len(os.sched_getaffinity(0)),
            free_memory_bytes=_free_memory_bytes(root),
            num_gpus=num_devices if selection is None else _num_selected(selection, num_devices),
            has_gpu_selection=selection is not None,
        )

    @property
    def default_num_shard(self) -> int:
        """TGI's rule: a rank on each GPU that the environment makes visible; one where it says nothing."""
        return max(1, self.num_gpus) if self.has_gpu_selection else 1


def _num_selected(selection: str, num_devices: int) -> int:
    """How many of the devices a list such as `0,2` selects. What follows an invalid entry is not seen (CUDA's rule)."""
    if selection.strip() == "all":
        return num_devices
    if selection.strip() in _NO_DEVICES or num_devices == 0:
        return 0
    num_selected = 0
    for entry in selection.split(","):
        if entry.strip() in ("", "-1"):
            break
        num_selected += 1
    return num_selected


def _free_memory_bytes(root: Path) -> int:
    """What may be allocated without swapping, on the machine and within the container's limit."""
    free = _available_bytes(root)
    for limit_file, usage_file in _MEMORY_FILES:
        try:
            limit = int((root / limit_file).read_text())
            usage = int((root / usage_file).read_text())
        except (OSError, ValueError):  # not this version, or "max"
            continue
        free = min(free, max(0, limit - usage))
    return free


def _available_bytes(root: Path) -> int:
    for line in (root / "proc" / "meminfo").read_text().splitlines():
        name, _, value = line.partition(":")
        if name == "MemAvailable":
            return int(value.split()[0]) * 1024
    return 0
