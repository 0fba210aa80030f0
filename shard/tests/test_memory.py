"""Free memory is the kernel's estimate, or what a container still may take."""

from __future__ import annotations

from pathlib import Path

import pytest

from bros_shard import memory
from bros_shard.memory import InsufficientMemoryError, available_bytes


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
