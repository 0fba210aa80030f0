"""The receive loop of one rank: frames in, steps run, frames out. It decides nothing."""

from __future__ import annotations

import signal
import threading
import time
import traceback
from collections import deque
from typing import Final

import structlog
import zmq

from bros_kernels.kernels import UnknownKernelsError
from bros_shard.checkpoint import CheckpointError
from bros_shard.exit_codes import ExitCode
from bros_shard.memory import InsufficientMemoryError
from bros_shard.model_config import UnsupportedModelError
from bros_shard.options import ShardOptions
from bros_shard.protocol import (
    PROTOCOL_VERSION,
    Drain,
    Fault,
    FrameError,
    FromRank,
    FromRouter,
    Heartbeat,
    Hello,
    Identity,
    Profile,
    Progress,
    Shutdown,
    StepPlan,
    StepResult,
    decode_from_router,
    encode,
)
from bros_shard.worker import DeviceError, Worker

HEARTBEAT_PERIOD_S: Final = 0.5
#: How long a rank that ends waits for its last frames to leave.
_LINGER_MS: Final = 1000

#: Errors that are not ours but the operator's to mend.
_EXIT_CODES: Final[dict[type[Exception], ExitCode]] = {
    DeviceError: ExitCode.USAGE,
    UnknownKernelsError: ExitCode.USAGE,
    InsufficientMemoryError: ExitCode.USAGE,
    CheckpointError: ExitCode.BAD_CHECKPOINT,
    UnsupportedModelError: ExitCode.BAD_CHECKPOINT,
}

log = structlog.get_logger()


class StepClock:
    """How far the steps of this rank have come: written by the step loop, read by the heartbeat thread."""

    def __init__(self) -> None:
        self.num_finished_steps = 0
        self.last_finished_s = time.monotonic()
        self._num_running_steps = 0

    @property
    def is_step_running(self) -> bool:
        """Whether there is one to interrupt."""
        return self._num_running_steps > 0

    def step_started(self) -> None:
        """A plan arrived; maybe in the middle of a step."""
        self._num_running_steps += 1

    def step_finished(self) -> None:
        """Its result is about to be sent."""
        self._num_running_steps -= 1
        self.num_finished_steps += 1
        self.last_finished_s = time.monotonic()


class HeartbeatThread(threading.Thread):
    """Tells the router that this process lives, on a socket of its own: no forward pass can hold it up."""

    def __init__(self, context: zmq.Context[zmq.Socket[bytes]], options: ShardOptions, clock: StepClock) -> None:
        super().__init__(name="heartbeat", daemon=True)
        self._socket = _connect(context, options, channel="heartbeat")
        self._generation = options.generation
        self._clock = clock
        self._is_stopping = threading.Event()

    def run(self) -> None:
        """Beat until stopped."""
        while not self._is_stopping.wait(HEARTBEAT_PERIOD_S):
            age_s = max(0.0, time.monotonic() - self._clock.last_finished_s)
            beat = Heartbeat(
                self._generation,
                self._clock.num_finished_steps,
                age_s,
                self._clock.is_step_running,
                _resident_bytes(),
            )
            self._socket.send(encode(beat))
        self._socket.close(linger=0)

    def stop(self) -> None:
        """End the thread and wait for it."""
        self._is_stopping.set()
        self.join()


class ShardServer:
    """One rank's conversation with the router, from the first `Progress` to `Shutdown`."""

    def __init__(self, options: ShardOptions) -> None:
        self._options = options
        self._generation = options.generation
        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self._socket = _connect(self._context, options, channel="steps")
        self._clock = StepClock()
        self._heartbeat = HeartbeatThread(self._context, options, self._clock)
        self._next_step_id = 0
        #: Messages that came while a step ran, but for interruptions.
        self._backlog: deque[FromRouter] = deque()

    def run(self) -> int:
        """Load the model, then execute plans until `Shutdown`. Returns the exit status.

        Whatever goes wrong is told to the router as a `Fault` and ends the process: ranks must never run
        different plans, so a rank that cannot follow one takes its group down with it.
        """
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the launcher's to handle
        signal.signal(signal.SIGTERM, lambda *_: self._send(Drain(self._generation)))
        self._heartbeat.start()
        try:
            worker = Worker(self._options, self._report_progress)
            profile = worker.warm_up()
            if self._options.rank == 0:
                self._send(Profile(self._generation, profile))
            self._send(self._hello(worker))
            self._serve(worker)
        except Exception as error:
            exit_code = _EXIT_CODES.get(type(error), ExitCode.INTERNAL)
            if exit_code is ExitCode.INTERNAL:
                log.error("rank fault", trace=traceback.format_exc())
                self._send(Fault(self._generation, f"{type(error).__name__}: {error}"))
            else:  # the error says it all
                self._send(Fault(self._generation, str(error)))
            return exit_code
        finally:
            self._heartbeat.stop()
            self._socket.close(linger=_LINGER_MS)
            self._context.term()
        return 0

    def _serve(self, worker: Worker) -> None:
        while True:
            message = self._backlog.popleft() if self._backlog else self._receive()
            if isinstance(message, Shutdown):
                return
            self._execute(worker, message)

    def _receive(self) -> FromRouter:
        message = decode_from_router(self._socket.recv())
        if message.generation != self._generation:
            raise FrameError(f"generation {message.generation} instead of {self._generation}")
        if isinstance(message, StepPlan):
            if message.step_id != self._next_step_id:
                raise FrameError(f"step {message.step_id} instead of {self._next_step_id}")
            self._next_step_id += 1
        return message

    def _run_interruptions(self, worker: Worker) -> float:
        """Between two layers of a step, which may interrupt another: run what was sent to interrupt it.

        Returns the seconds that took."""
        if not worker.can_interrupt:
            return 0.0
        started_s = time.monotonic()
        is_any = False
        while int(self._socket.getsockopt(zmq.EVENTS)) & zmq.POLLIN:
            message = self._receive()
            if isinstance(message, StepPlan) and message.is_interruption:
                self._execute(worker, message)
                is_any = True
            else:
                self._backlog.append(message)
        return time.monotonic() - started_s if is_any else 0.0

    def _execute(self, worker: Worker, plan: StepPlan) -> None:
        started_s = time.monotonic()
        idle_s = 0.0 if self._clock.is_step_running else started_s - self._clock.last_finished_s
        self._clock.step_started()
        output = worker.execute(plan, lambda: self._run_interruptions(worker))
        self._clock.step_finished()
        if self._options.rank == 0:
            self._send(
                StepResult(
                    self._generation,
                    plan.step_id,
                    output.sequences,
                    forward_s=output.forward_s,
                    sampling_s=output.sampling_s,
                    step_s=self._clock.last_finished_s - started_s - output.interrupted_s - output.prompts_s,
                    idle_s=idle_s,
                    prompts=output.prompts,
                )
            )

    def _hello(self, worker: Worker) -> Hello:
        return Hello(
            self._generation,
            protocol_version=PROTOCOL_VERSION,
            rank=self._options.rank,
            world_size=self._options.world_size,
            model_id=self._options.model_id,
            model_sha=self._options.model_sha or None,
            dtype=worker.dtype_name,
            device=worker.device_name,
            vocab_size=worker.vocab_size,
            max_length=worker.max_length,
            num_blocks=worker.num_blocks,
            block_size=self._options.block_size,
            num_host_blocks=worker.cache.num_host_blocks,
            block_bytes=worker.block_bytes,
            can_interrupt=worker.can_interrupt,
        )

    def _report_progress(self, phase: str, num_done: int, num_total: int) -> None:
        self._send(Progress(self._generation, phase, num_done, num_total))

    def _send(self, message: FromRank) -> None:
        self._socket.send(encode(message))


def _connect(context: zmq.Context[zmq.Socket[bytes]], options: ShardOptions, channel: str) -> zmq.Socket[bytes]:
    socket = context.socket(zmq.DEALER)
    identity = Identity(options.group, options.rank, options.generation, channel)
    socket.setsockopt(zmq.IDENTITY, identity.encode())
    socket.connect(options.endpoint)
    return socket


def _resident_bytes() -> int:
    """Memory of this process, from Linux's /proc (field 2 of statm, in pages)."""
    with open("/proc/self/statm", encoding="ascii") as statm:
        return int(statm.read().split()[1]) * 4096
