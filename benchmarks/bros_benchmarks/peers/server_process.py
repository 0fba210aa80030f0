"""A peer's server: started, waited for, and ended with everything that it started."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import time
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Final

from bros_benchmarks.peers.engine import EngineError

_START_TIMEOUT_S: Final = 400.0
_STOP_TIMEOUT_S: Final = 30.0


def free_port() -> int:
    """A port of the loopback that nobody listens on now."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


@contextmanager
def process(
    command: Sequence[str], environment: Mapping[str, str], log: Path, *, talks: bool = False
) -> Iterator[subprocess.Popen[str]]:
    """A process in a group of its own. It is ended when the context is left, and then all of its group.

    Args:
        log: gets what it says, but for its standard output where it `talks` to us by pipes.
    """
    with log.open("w") as output:
        child = subprocess.Popen(
            command,
            env=environment,
            stdin=subprocess.PIPE if talks else subprocess.DEVNULL,
            stdout=subprocess.PIPE if talks else output,
            stderr=output,
            text=True,
            start_new_session=True,
        )
    try:
        yield child
    finally:
        child.terminate()
        with suppress(subprocess.TimeoutExpired):
            child.wait(_STOP_TIMEOUT_S)
        with suppress(ProcessLookupError):  # nobody is left
            os.killpg(child.pid, signal.SIGKILL)
        child.wait()


def wait_until_healthy(child: subprocess.Popen[str], url: str, log: Path) -> None:
    """Return when `url` answers 200.

    Raises:
        EngineError: it does not in time, or the process ended; the message ends with what it said last.
    """
    deadline_s = time.monotonic() + _START_TIMEOUT_S
    while time.monotonic() < deadline_s and child.poll() is None:
        try:
            with urllib.request.urlopen(url, timeout=5) as reply:
                if reply.status == 200:
                    return
        except OSError:
            time.sleep(0.5)
    raise EngineError(f"it did not start: {log.read_text().strip()[-500:]}")
