"""The private folder of one launcher: its sockets and its rendezvous file, removed with it."""

from __future__ import annotations

import fcntl
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final

from bros_router.startup_error import UsageError

_PREFIX: Final = "bros-launcher-"
#: Bytes in `sockaddr_un.sun_path`, less the final NUL.
_MAX_SOCKET_PATH_BYTES: Final = 107


class RuntimeDir:
    """A folder with mode 0700 that the launcher holds a lock on while it lives: the folder is its own lock file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def socket_endpoint(self, name: str) -> str:
        """ZeroMQ endpoint of a Unix socket in the folder.

        Raises:
            UsageError: the folder's path is too long for a socket.
        """
        path = self.path / name
        if len(os.fsencode(path)) > _MAX_SOCKET_PATH_BYTES:
            raise UsageError(f"{path} is longer than a socket's path may be: set TMPDIR to a shorter path.")
        return f"ipc://{path}"

    def rendezvous(self, generation: int) -> str:
        """`init_method` of torch.distributed: a file that no other generation of ranks has used."""
        return f"file://{self.path / f'rendezvous-{generation}'}"


@contextmanager
def runtime_dir(base: Path) -> Iterator[RuntimeDir]:
    """Make the folder under `base`, removing those that launchers killed before left there.

    Raises:
        UsageError: nothing can be made under `base`.
    """
    try:
        _remove_stale(base)
        path, lock = _create_locked(base)
    except OSError as error:
        raise UsageError(f"Cannot make a folder in {base} ({error.strerror}): set TMPDIR to a writable one.") from None
    try:
        yield RuntimeDir(path)
    finally:
        shutil.rmtree(path, ignore_errors=True)
        os.close(lock)


def _create_locked(base: Path) -> tuple[Path, int]:
    while True:
        path = Path(tempfile.mkdtemp(prefix=_PREFIX, dir=base))
        # Until it is locked, another launcher may take the new folder for a stale one and remove it.
        lock = _try_lock(path)
        if lock is not None and path.exists():
            return path, lock
        if lock is not None:
            os.close(lock)


def _remove_stale(base: Path) -> None:
    for path in base.glob(f"{_PREFIX}*"):
        lock = _try_lock(path)
        if lock is None:
            continue
        if os.fstat(lock).st_uid == os.geteuid():
            shutil.rmtree(path, ignore_errors=True)
        os.close(lock)


def _try_lock(path: Path) -> int | None:
    """An open, locked descriptor of the folder; `None` where it is gone, not a folder, not ours to read, or in use."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    except OSError:
        return None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(descriptor)
        return None
    return descriptor
