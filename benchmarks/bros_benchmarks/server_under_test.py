"""The server that a benchmark drives: the launcher as users start it."""

from __future__ import annotations

import json
import subprocess
import sys
import time
import urllib.request
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Final

_START_TIMEOUT_S: Final = 180.0
_STOP_TIMEOUT_S: Final = 60.0


class ServerUnderTest:
    """The launcher on a free port of the loopback, ready when this is made. Leaving the `with` block stops it."""

    def __init__(
        self, model: Path, num_threads: int, log: Path, *flags: str, program: Sequence[str] = ("-m", "bros_router")
    ) -> None:
        """Start it with further `flags`. What it says goes to the file `log`.

        Args:
            program: what Python runs: the server, or something that wraps it.

        Raises:
            RuntimeError: it did not become ready; the message ends with what it said last.
        """
        # A file, not a pipe: nobody reads while requests run, and a full pipe would stop the server.
        self._log = log
        self.command = (
            *(sys.executable, *program, "serve", "--json-output", "--model-id", str(model)),
            *("--hostname", "127.0.0.1", "--port", "0", "--cpu-threads", str(num_threads), *flags),
        )
        with self._log.open("w") as output:
            self._process = subprocess.Popen(self.command, stdout=output, stderr=subprocess.STDOUT)
        self.url = self._wait_until_ready()

    def _wait_until_ready(self) -> str:
        deadline_s = time.monotonic() + _START_TIMEOUT_S
        while time.monotonic() < deadline_s and self._process.poll() is None:
            for line in self._log.read_text().splitlines():
                fields = json.loads(line) if line.startswith("{") and line.endswith("}") else {}
                if fields.get("message") == "ready":
                    return str(fields["url"])
            time.sleep(0.1)
        self._process.kill()
        self._process.wait()
        raise RuntimeError(f"the server did not start:\n{self._log.read_text()[-2000:]}")

    def __enter__(self) -> ServerUnderTest:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    def stop(self) -> None:
        """SIGTERM, and wait; what does not end is killed."""
        self._process.terminate()
        try:
            self._process.wait(_STOP_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()

    @property
    def pid(self) -> int:
        """The router's process."""
        return self._process.pid

    def metrics(self) -> dict[str, float]:
        """Every series of `/metrics`, labels included in its name."""
        with urllib.request.urlopen(f"{self.url}/metrics", timeout=30) as reply:
            lines = reply.read().decode().splitlines()
        return {name: float(value) for name, value in (line.rsplit(" ", 1) for line in lines if line[:1] != "#")}

    def busy_and_idle_s(self) -> tuple[float, ...]:
        """Seconds the rank spent in steps, and between steps while there was work, since the start."""
        values = self.metrics()
        return tuple(values.get(f"bros_rank_{kind}_duration_sum", 0.0) for kind in ("step", "idle"))
