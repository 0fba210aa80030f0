"""What a machine offers, read from copies of the files that Linux shows."""

from pathlib import Path

import pytest

from bros_router.host import Host

GIB = 1024**3


def machine(root: Path, *, num_gpus: int = 0, available_kib: int = 8 * 1024**2, **files: str) -> Path:
    """A tree with the devices and memory files of a machine; `files` by path with `__` for `/`."""
    (root / "dev").mkdir()
    for name in ["nvidiactl", "nvidia-uvm", *(f"nvidia{gpu}" for gpu in range(num_gpus))]:
        (root / "dev" / name).touch()
    (root / "proc").mkdir()
    (root / "proc" / "meminfo").write_text(f"MemTotal: 99 kB\nMemFree: 1 kB\nMemAvailable:   {available_kib} kB\n")
    for name, content in files.items():
        path = root / name.replace("__", "/")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content)
    return root


@pytest.mark.parametrize(
    ("environment", "num_devices", "num_gpus", "default_num_shard"),
    [
        ({}, 0, 0, 1),
        ({}, 4, 4, 1),  # TGI's rule: nobody chose GPUs, so one rank
        ({"CUDA_VISIBLE_DEVICES": "0,2"}, 4, 2, 2),
        ({"CUDA_VISIBLE_DEVICES": "3"}, 4, 1, 1),
        ({"CUDA_VISIBLE_DEVICES": ""}, 4, 0, 1),
        ({"CUDA_VISIBLE_DEVICES": "-1"}, 4, 0, 1),
        ({"CUDA_VISIBLE_DEVICES": "0,-1,2"}, 4, 1, 1),
        ({"CUDA_VISIBLE_DEVICES": "MIG-a,MIG-b,MIG-c"}, 1, 3, 3),
        ({"CUDA_VISIBLE_DEVICES": "0,1"}, 0, 0, 1),
        ({"NVIDIA_VISIBLE_DEVICES": "all"}, 4, 4, 4),
        ({"NVIDIA_VISIBLE_DEVICES": "all"}, 0, 0, 1),
        ({"NVIDIA_VISIBLE_DEVICES": "void"}, 4, 0, 1),
        ({"NVIDIA_VISIBLE_DEVICES": "none"}, 4, 0, 1),
        ({"NVIDIA_VISIBLE_DEVICES": "1,3"}, 2, 2, 2),
        ({"NVIDIA_VISIBLE_DEVICES": "all", "CUDA_VISIBLE_DEVICES": "0"}, 4, 1, 1),
    ],
)
def test_gpus(tmp_path, environment, num_devices, num_gpus, default_num_shard):
    host = Host.read(environment, machine(tmp_path, num_gpus=num_devices))
    assert (host.num_gpus, host.default_num_shard) == (num_gpus, default_num_shard)


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({}, 8 * GIB),
        (
            {"sys__fs__cgroup__memory.max": f"{4 * GIB}\n", "sys__fs__cgroup__memory.current": f"{GIB}\n"},
            3 * GIB,
        ),
        ({"sys__fs__cgroup__memory.max": "max\n", "sys__fs__cgroup__memory.current": f"{GIB}\n"}, 8 * GIB),
        (
            {"sys__fs__cgroup__memory.max": f"{64 * GIB}\n", "sys__fs__cgroup__memory.current": "0\n"},
            8 * GIB,
        ),
        (
            {"sys__fs__cgroup__memory.max": f"{GIB}\n", "sys__fs__cgroup__memory.current": f"{2 * GIB}\n"},
            0,
        ),
        (
            {
                "sys__fs__cgroup__memory__memory.limit_in_bytes": f"{2 * GIB}",
                "sys__fs__cgroup__memory__memory.usage_in_bytes": f"{GIB}",
            },
            GIB,
        ),
    ],
)
def test_free_memory_is_the_machines_or_the_containers_whichever_is_less(tmp_path, files, expected):
    assert Host.read({}, machine(tmp_path, **files)).free_memory_bytes == expected


def test_this_machine_can_be_read():
    host = Host.read({})
    assert host.num_cores >= 1
    assert host.free_memory_bytes > 0
