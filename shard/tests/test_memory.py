"""Free memory is the kernel's estimate, or what a container still may take."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from bros_shard import memory
from bros_shard.memory import InsufficientMemoryError, available_bytes, host_pool_bytes, lazy_zeros


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A machine with 6 GiB available, without container limits."""
    monkeypatch.setattr(memory, "_MEMINFO", tmp_path / "meminfo")
    monkeypatch.setattr(memory, "_CGROUP", tmp_path)
    (tmp_path / "meminfo").write_text("MemTotal:  8388608 kB\nMemAvailable:  6291456 kB\nSwapTotal: 0 kB\n")
    return tmp_path


def test_without_a_container(machine: Path) -> None:
    assert available_bytes() == 6 * 2**30


@pytest.mark.parametrize(
    ("limit", "used", "expected"),
    [("max", 2**30, 6 * 2**30), (4 * 2**30, 2**30, 3 * 2**30), (64 * 2**30, 0, 6 * 2**30), (2**30, 2**31, 0)],
)
def test_in_a_container(limit: int | str, used: int, expected: int, machine: Path) -> None:
    (machine / "memory.max").write_text(f"{limit}\n")
    (machine / "memory.current").write_text(f"{used}\n")
    assert available_bytes() == expected


def test_unknown(machine: Path) -> None:
    (machine / "meminfo").write_text("MemTotal: 8388608 kB\n")
    with pytest.raises(InsufficientMemoryError, match="set kv_memory_bytes"):
        available_bytes()


@pytest.mark.parametrize(
    ("region_bytes", "reserved_bytes", "world_size", "expected"),
    [
        (2**30, 0, 1, 2**30),  # as much as the region
        (2**33, 0, 1, 6 * 2**28),  # a quarter of 6 GiB
        (2**33, 2 * 2**30, 2, 2**29),  # a quarter of 4 GiB, for two
        (2**33, 2**33, 1, 0),
    ],
)
def test_host_pool_takes_at_most_a_quarter(
    region_bytes: int, reserved_bytes: int, world_size: int, expected: int, machine: Path
) -> None:
    assert host_pool_bytes(region_bytes, reserved_bytes, world_size) == expected


def test_no_host_pool_where_nobody_knows_what_is_free(machine: Path) -> None:
    (machine / "meminfo").write_text("")
    assert host_pool_bytes(2**30, 0, 1) == 0


def test_lazy_zeros() -> None:
    zeros = lazy_zeros((2, 3, 5), torch.bfloat16)
    assert (zeros.shape, zeros.dtype, zeros.is_contiguous()) == ((2, 3, 5), torch.bfloat16, True)
    assert not zeros.any()
    assert lazy_zeros((0, 3), torch.float32).shape == (0, 3)
