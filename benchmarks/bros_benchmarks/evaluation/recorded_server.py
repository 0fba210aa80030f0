"""The server as users start it, with every step that its latency model learns from written down.

`python -m bros_benchmarks.evaluation.recorded_server FILE serve …` takes the server's own command line after FILE,
and writes there, when it ends, a list of (shape, seconds).
"""

from __future__ import annotations

import atexit
import sys
from pathlib import Path

import msgspec

from bros_router.__main__ import main as serve
from bros_router.scheduling.latency_model import LatencyModel
from bros_shard.protocol import StepShape


def record_steps(path: Path) -> None:
    """From now on, keep what the latency model observes; write it to `path` at the end of the process."""
    steps: list[tuple[StepShape, float]] = []
    observe = LatencyModel.observe

    def observe_and_keep(self: LatencyModel, shape: StepShape, seconds: float) -> None:
        steps.append((shape, seconds))
        observe(self, shape, seconds)

    LatencyModel.observe = observe_and_keep  # type: ignore[method-assign]
    atexit.register(lambda: path.write_bytes(msgspec.json.encode(steps)))


def read_steps(path: Path) -> list[tuple[StepShape, float]]:
    """What was written."""
    return msgspec.json.decode(path.read_bytes(), type=list[tuple[StepShape, float]])


if __name__ == "__main__":
    record_steps(Path(sys.argv.pop(1)))
    serve()
