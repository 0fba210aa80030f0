"""The server as users start it, with its step loop written down: what the simulator is fitted to.

`python -m bros_benchmarks.evaluation.recorded_server FILE serve …` takes the server's own command line after FILE,
and writes there, when it ends, a `ServerLog`.
"""

from __future__ import annotations

import atexit
import sys
import time
from pathlib import Path

import msgspec

from bros_router.__main__ import main as serve
from bros_router.request import RequestClass
from bros_router.scheduling.latency_model import LatencyModel
from bros_router.scheduling.scheduler import Scheduler
from bros_router.scheduling.sequence import Sequence
from bros_shard.protocol import StepShape


class RecordedStep(msgspec.Struct, frozen=True):
    """A step that its latency model learned from."""

    shape: StepShape
    #: On the ranks.
    seconds: float
    #: When its tokens were taken in, by `time.perf_counter`, which all processes of a machine share on Linux.
    committed_s: float


class ServerLog(msgspec.Struct):
    """What a server did."""

    steps: list[RecordedStep] = msgspec.field(default_factory=list)
    #: When the scheduler got each real-time request, by the same clock.
    rt_added_s: list[float] = msgspec.field(default_factory=list)

    @classmethod
    def read(cls, path: Path) -> ServerLog:
        """What was written."""
        return msgspec.json.decode(path.read_bytes(), type=cls)


def record(path: Path) -> None:
    """From now on, write down what this process does; it goes to `path` at the end of the process."""
    log = ServerLog()
    observe, add = LatencyModel.observe, Scheduler.add

    def observe_and_keep(self: LatencyModel, shape: StepShape, seconds: float) -> None:
        log.steps.append(RecordedStep(shape, seconds, time.perf_counter()))
        observe(self, shape, seconds)

    def add_and_keep(self: Scheduler, sequence: Sequence) -> None:
        if sequence.request_class is RequestClass.RT:
            log.rt_added_s.append(time.perf_counter())
        add(self, sequence)

    LatencyModel.observe = observe_and_keep  # type: ignore[method-assign]
    Scheduler.add = add_and_keep  # type: ignore[method-assign]
    atexit.register(lambda: path.write_bytes(msgspec.json.encode(log)))


if __name__ == "__main__":
    record(Path(sys.argv.pop(1)))
    serve()
