"""The launcher's private folder: private, gone when it ends, and swept up after launchers that were killed."""

import os
import signal
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from bros_router.runtime_dir import runtime_dir
from bros_router.startup_error import UsageError

KILLED_LAUNCHER = """
import os, signal, sys
from pathlib import Path
from bros_router.runtime_dir import runtime_dir
with runtime_dir(Path(sys.argv[1])) as runtime:
    (runtime.path / "socket").touch()
    print(runtime.path, flush=True)
    os.kill(os.getpid(), signal.SIGKILL)
"""


def test_folder_is_private_and_removed_with_what_is_in_it(tmp_path):
    with runtime_dir(tmp_path) as runtime:
        assert stat.S_IMODE(runtime.path.stat().st_mode) == 0o700
        (runtime.path / "rendezvous-0").touch()
        assert runtime.path.parent == tmp_path
    assert list(tmp_path.iterdir()) == []


def test_folder_is_removed_when_the_launcher_fails(tmp_path):
    with pytest.raises(ZeroDivisionError), runtime_dir(tmp_path):
        _ = 1 / 0
    assert list(tmp_path.iterdir()) == []


def test_folder_of_a_killed_launcher_is_removed_by_the_next(tmp_path):
    command = [sys.executable, "-c", KILLED_LAUNCHER, str(tmp_path)]
    killed = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert killed.returncode == -signal.SIGKILL
    stale = Path(killed.stdout.strip())
    assert (stale / "socket").exists()
    with runtime_dir(tmp_path) as runtime:
        assert list(tmp_path.iterdir()) == [runtime.path]


def test_folder_of_a_living_launcher_is_left_alone(tmp_path):
    with runtime_dir(tmp_path) as first, runtime_dir(tmp_path) as second:
        assert first.path != second.path
        assert sorted(tmp_path.iterdir()) == sorted([first.path, second.path])


def test_everything_else_is_left_alone(tmp_path):
    for name in ("bros-notes", "launcher", "bros-launcher.txt"):
        (tmp_path / name).mkdir()
    (tmp_path / "bros-launcher-file").touch()
    (tmp_path / "bros-launcher-link").symlink_to(tmp_path / "bros-notes")
    before = sorted(tmp_path.rglob("*"))
    with runtime_dir(tmp_path):
        pass
    assert sorted(tmp_path.rglob("*")) == before


def test_lock_is_not_inherited_by_ranks(tmp_path):
    """A rank that outlives its launcher for a moment must not make the folder look alive."""
    show_open_files = "import os; print([os.path.realpath(f'/proc/self/fd/{f}') for f in os.listdir('/proc/self/fd')])"
    with runtime_dir(tmp_path) as runtime:
        ours = [os.path.realpath(f"/proc/self/fd/{number}") for number in os.listdir("/proc/self/fd")]
        assert str(runtime.path) in ours
        command = [sys.executable, "-c", show_open_files]
        child = subprocess.run(command, capture_output=True, text=True, close_fds=False, timeout=60)
        assert child.returncode == 0
        assert str(runtime.path) not in child.stdout


def test_names_that_ranks_connect_to(tmp_path):
    with runtime_dir(tmp_path) as runtime:
        assert runtime.socket_endpoint("shards") == f"ipc://{runtime.path}/shards"
        assert runtime.rendezvous(0) == f"file://{runtime.path}/rendezvous-0"
        assert runtime.rendezvous(1) == f"file://{runtime.path}/rendezvous-1"


def test_socket_path_that_is_too_long_is_refused_with_a_hint(tmp_path):
    base = tmp_path / ("x" * 100)
    base.mkdir()
    with runtime_dir(base) as runtime, pytest.raises(UsageError, match="set TMPDIR to a shorter path"):
        runtime.socket_endpoint("shards")


def test_base_that_is_not_there_is_refused_with_a_hint(tmp_path):
    with pytest.raises(UsageError, match="set TMPDIR to a writable one"), runtime_dir(tmp_path / "missing"):
        pass
