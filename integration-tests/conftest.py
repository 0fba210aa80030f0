"""Real servers for the tests: the launcher as users start it, its ranks, and clients over HTTP."""

from __future__ import annotations

import concurrent.futures
import contextlib
import json
import os
import queue
import signal
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import psutil
import pytest

#: Step times are measured once and then known, but nothing of a run is left behind.
_CACHE = tempfile.TemporaryDirectory(prefix="bros-tests-")
_ENVIRONMENT = {"HOSTNAME": "127.0.0.1", "PORT": "0", "XDG_CACHE_HOME": _CACHE.name}

START_TIMEOUT_S = 60.0
STOP_TIMEOUT_S = 60.0


class Launcher:
    """One `text-generation-launcher` process and what it logs."""

    def __init__(self, *arguments: str, program: Sequence[str] = (), environment: dict[str, str] | None = None) -> None:
        program = program or [str(Path(sys.executable).parent / "text-generation-launcher")]
        self.process = subprocess.Popen(
            [*program, "--json-output", *arguments],
            env=os.environ | _ENVIRONMENT | (environment or {}),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        self.lines: list[str] = []
        self.url = ""
        self._events: queue.Queue[dict[str, Any] | None] = queue.Queue()
        threading.Thread(target=self._read, daemon=True).start()

    def _read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self.lines.append(line)
            with contextlib.suppress(ValueError):
                self._events.put(json.loads(line))
        self._events.put(None)

    def wait_for(self, message: str, timeout_s: float = START_TIMEOUT_S) -> dict[str, Any]:
        """The fields of the next log line with this message."""
        deadline_s = time.monotonic() + timeout_s
        while True:
            try:
                event = self._events.get(timeout=max(0.0, deadline_s - time.monotonic()))
            except queue.Empty:
                pytest.fail(f"no {message!r} within {timeout_s} s:\n{''.join(self.lines)}")
            if event is None:
                pytest.fail(f"the launcher ended before {message!r}:\n{''.join(self.lines)}")
            if event["message"] == message:
                return event

    def wait_until_ready(self) -> Launcher:
        """Wait for the one line that says where to send requests."""
        self.url = self.wait_for("ready")["url"]
        return self

    @property
    def port(self) -> int:
        """The HTTP port."""
        return int(self.url.rsplit(":", 1)[1])

    @property
    def ranks(self) -> list[psutil.Process]:
        """The processes of the ranks, in order of rank."""
        children = psutil.Process(self.process.pid).children(recursive=True)
        ranks = [child for child in children if "bros_shard" in child.cmdline()]
        return sorted(ranks, key=lambda rank: rank.cmdline()[rank.cmdline().index("--rank") + 1])

    def get(self, path: str) -> str:
        """Body of a GET."""
        with urllib.request.urlopen(self.url + path, timeout=30) as reply:
            return reply.read().decode()

    def metric(self, series: str) -> float:
        """Value of one series of `/metrics`; 0 where it has not appeared yet."""
        for line in self.get("/metrics").splitlines():
            if line.startswith(series + " "):
                return float(line.rsplit(" ", 1)[1])
        return 0.0

    def stop(self, timeout_s: float = STOP_TIMEOUT_S) -> int:
        """SIGTERM, and the exit status."""
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
        return self.process.wait(timeout_s)


@pytest.fixture(scope="session")
def launch() -> Iterator[Callable[..., Launcher]]:
    """`launch(*flags, program=(), environment=None)` starts a launcher; all are ended with the session."""
    started: list[Launcher] = []

    def start(*arguments: str, **how: Any) -> Launcher:
        started.append(Launcher(*arguments, **how))
        return started[-1]

    yield start
    for launcher in started:
        if launcher.process.poll() is None:
            launcher.process.kill()
        launcher.process.wait(STOP_TIMEOUT_S)


@pytest.fixture(scope="session")
def server(launch: Callable[..., Launcher]) -> Launcher:
    """A server of the demo model in float32 that the whole session shares."""
    return launch("--dtype", "float32", "--kv-cache-memory", "256MiB").wait_until_ready()


def wait_until(condition: Callable[[], bool], timeout_s: float) -> None:
    """Poll until a fact about another process holds; fails after `timeout_s`."""
    deadline_s = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline_s, "it never came true"
        time.sleep(0.02)


@pytest.fixture(scope="session")
def eventually() -> Callable[..., None]:
    """`eventually(condition, timeout_s)`: see `wait_until`."""
    return wait_until


@pytest.fixture(scope="session")
def contend(eventually: Callable[..., None]) -> Callable[..., list[Any]]:
    """`contend(server, best_effort, real_time)`: what these calls give, in this order, twelve of a class at a time.

    The real-time ones begin once some best-effort sequences own memory, so that they must take it from them. Begun
    together they might have it all until they are done, while best-effort sequences wait and are never preempted.
    """

    def run(server: Launcher, best_effort: list[Callable[[], Any]], real_time: list[Callable[[], Any]]) -> list[Any]:
        def is_contended() -> bool:
            return server.metric('bros_sequences{class="be",state="running"}') >= 2 or all(job.done() for job in batch)

        with concurrent.futures.ThreadPoolExecutor(12) as first, concurrent.futures.ThreadPoolExecutor(12) as second:
            batch = [first.submit(call) for call in best_effort]
            eventually(is_contended, timeout_s=60)
            chats = [second.submit(call) for call in real_time]
            return [job.result() for job in (*batch, *chats)]

    return run
