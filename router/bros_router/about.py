"""What the server runs on, as text for a bug report: no environment variables, no addresses, no secrets."""

from __future__ import annotations

import platform
import subprocess
from importlib.metadata import PackageNotFoundError, version

from bros_router.host import Host

_LIBRARIES = ("torch", "transformers", "tokenizers", "safetensors", "triton")


def server_version() -> str:
    """The version of this software."""
    return version("bros")


def describe(host: Host) -> str:
    """Several lines: versions, processor, memory, GPUs."""
    lines = [
        f"bros {server_version()}",
        f"Python {platform.python_version()} on {platform.system()} {platform.release()} {platform.machine()}",
        *(f"{library} {_version(library)}" for library in _LIBRARIES),
        f"cores: {host.num_cores}",
        f"free memory: {host.free_memory_bytes / 2**30:.1f} GiB",
        f"GPUs: {host.num_gpus}",
    ]
    return "\n".join(lines + _nvidia_smi())


def _version(library: str) -> str:
    """Read from the package's metadata: importing torch would take seconds."""
    try:
        return version(library)
    except PackageNotFoundError:
        return "is not installed"


def _nvidia_smi() -> list[str]:
    query = "--query-gpu=name,memory.total,driver_version"
    try:
        result = subprocess.run(
            ["nvidia-smi", query, "--format=csv,noheader"], capture_output=True, text=True, timeout=10, check=True
        )
    except (OSError, subprocess.SubprocessError):
        return []
    return result.stdout.strip().splitlines()
