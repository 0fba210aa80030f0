"""The router's side of the protocol: plans out to the ranks of one tensor-parallel group, results back."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final

import structlog
import zmq
import zmq.asyncio

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
    decode_from_rank,
    encode,
)

#: A rank that sends nothing for this long, not even from its heartbeat thread, is lost.
SILENCE_LIMIT_S: Final = 15.0
#: Dropped frames are counted one by one and logged at most this often.
_LOG_PERIOD_S: Final = 1.0

log = structlog.get_logger()


class ShardError(Exception):
    """The group cannot go on: a rank died, faulted, fell silent or said what it must not. Not public text."""


@dataclass(frozen=True, slots=True)
class GroupInfo:
    """What the ranks of a group agreed on when they became ready."""

    hello: Hello
    profile: Profile


class _GenerationState:
    """What is known of one set of rank processes."""

    def __init__(self, world_size: int) -> None:
        self.failure: str | None = None
        self.hellos: dict[int, Hello] = {}
        self.profile: Profile | None = None
        self.last_heard_s = dict.fromkeys(range(world_size), time.monotonic())
        #: Results that are awaited, by step.
        self.due: dict[int, asyncio.Future[StepResult]] = {}
        self.ready: asyncio.Future[GroupInfo] = _quiet_future()

    @property
    def silence_s(self) -> float:
        """Time since the rank that has been silent for longest was heard of."""
        return time.monotonic() - min(self.last_heard_s.values())


class ShardGroup:
    """One tensor-parallel group, one failure unit: what befalls a rank befalls all of them.

    A group lives through several generations of rank processes. `start` begins one; from then on frames of any
    other are dropped, counted and logged, and so is every frame that is not a message or not the one due.
    """

    def __init__(
        self,
        endpoint: str,
        world_size: int,
        *,
        name: str = "g0",
        on_progress: Callable[[Progress], None] = lambda _: None,
        on_drain: Callable[[], None] = lambda: None,
        on_dropped_frame: Callable[[str], None] = lambda _: None,
    ) -> None:
        """Bind the group's socket.

        Args:
            endpoint: where the ranks connect, `ipc://` in a folder that only this user can enter.
            on_drain: called when a rank was asked to end from outside.
            on_dropped_frame: called with the reason of each dropped frame, one of a small fixed set.
        """
        self.generation = -1
        self._name = name
        self._world_size = world_size
        self._on_progress = on_progress
        self._on_drain = on_drain
        self._on_dropped_frame = on_dropped_frame
        self._last_log_s = 0.0
        self._context = zmq.asyncio.Context()
        self._socket = self._context.socket(zmq.ROUTER)
        # A plan must never vanish: with this, sending to a rank that is gone is an error.
        self._socket.setsockopt(zmq.ROUTER_MANDATORY, 1)
        # A restarted rank may reconnect under an identity that the socket still knows.
        self._socket.setsockopt(zmq.ROUTER_HANDOVER, 1)
        self._socket.bind(endpoint)
        self._state = _GenerationState(world_size)
        self._receiver = asyncio.create_task(self._receive_frames(), name="shard frames")

    def start(self) -> int:
        """Begin a new generation, which no rank has joined yet, and return its number."""
        self.generation += 1
        self._state = _GenerationState(self._world_size)
        return self.generation

    def fail(self, reason: str) -> None:
        """The generation is over: whoever waits for it gets `ShardError`. Only the first reason counts."""
        if self._state.failure is None:
            self._state.failure = reason
            futures: list[asyncio.Future[Any]] = [self._state.ready, *self._state.due.values()]
            for future in futures:
                if not future.done():
                    future.set_exception(ShardError(reason))

    @property
    def is_alive(self) -> bool:
        """Whether the ranks are ready, have not failed and have been heard of lately."""
        return self._state.ready.done() and self._state.failure is None and self._state.silence_s < SILENCE_LIMIT_S

    async def ready(self) -> GroupInfo:
        """Wait until every rank is ready.

        Raises:
            ShardError: the generation failed first, or its ranks disagree.
        """
        return await self._state.ready

    async def send(self, plan: StepPlan) -> asyncio.Future[StepResult]:
        """Send one plan to every rank. Returns the result to come, or `ShardError` if the generation fails first.

        Raises:
            ShardError: the generation has failed, or a rank is gone.
        """
        assert plan.generation == self.generation
        future: asyncio.Future[StepResult] = _quiet_future()
        self._state.due[plan.step_id] = future
        await self._broadcast(plan)
        return future

    async def shut_down(self) -> None:
        """Tell the ranks to end. Those that are gone already are no error."""
        try:
            await self._broadcast(Shutdown(self.generation))
        except ShardError:
            return

    async def close(self) -> None:
        """Stop receiving and release the socket."""
        self.fail("the router is closing")
        self._receiver.cancel()
        await asyncio.gather(self._receiver, return_exceptions=True)
        self._socket.close(linger=100)
        self._context.term()

    def check_silence(self) -> None:
        """Fail the generation if a rank has been silent for too long. Called once in a while."""
        if self._state.failure is None and self._state.ready.done() and self._state.silence_s >= SILENCE_LIMIT_S:
            self.fail(f"a rank has been silent for {SILENCE_LIMIT_S:g} s")

    async def _broadcast(self, message: FromRouter) -> None:
        if self._state.failure is not None:
            raise ShardError(self._state.failure)
        frame = encode(message)
        for rank in range(self._world_size):
            identity = Identity(self._name, rank, self.generation).encode()
            try:
                await self._socket.send_multipart([identity, frame])
            except zmq.ZMQError as error:
                self.fail(f"rank {rank} cannot be reached: {error}")
                raise ShardError(f"rank {rank} cannot be reached") from None

    async def _receive_frames(self) -> None:
        while True:
            frames = await self._socket.recv_multipart()
            try:
                if len(frames) != 2:
                    raise FrameError(f"{len(frames)} parts")
                identity = Identity.decode(frames[0])
                if (identity.group, identity.generation) != (self._name, self.generation):
                    self._drop("stale", f"generation {identity.generation}")
                    continue
                if identity.rank >= self._world_size:
                    raise FrameError(f"rank {identity.rank}")
                message = decode_from_rank(frames[1])
            except FrameError as error:
                self._drop("malformed", str(error))
                continue
            if message.generation != self.generation:
                self._drop("stale", f"generation {message.generation}")
                continue
            self._state.last_heard_s[identity.rank] = time.monotonic()
            self._handle(identity.rank, message)

    def _handle(self, rank: int, message: FromRank) -> None:
        match message:
            case StepResult():
                future = self._state.due.pop(message.step_id, None) if rank == 0 else None
                if future is None or future.done():
                    self._drop("unexpected", f"result of step {message.step_id} from rank {rank}")
                else:
                    future.set_result(message)
            case Heartbeat():
                pass  # that it came is what counts
            case Progress():
                if rank == 0:
                    self._on_progress(message)
            case Profile():
                self._state.profile = message
            case Hello():
                self._handle_hello(rank, message)
            case Drain():
                self._on_drain()
            case Fault():
                self.fail(f"rank {rank}: {message.reason}")

    def _handle_hello(self, rank: int, hello: Hello) -> None:
        if hello.protocol_version != PROTOCOL_VERSION or hello.rank != rank or hello.world_size != self._world_size:
            self.fail(f"rank {rank} does not belong to this group")
            return
        self._state.hellos[rank] = hello
        if len(self._state.hellos) < self._world_size or self._state.ready.done():
            return
        first = self._state.hellos[0]
        facts = {(h.model_id, h.model_sha, h.dtype, h.vocab_size, h.max_length) for h in self._state.hellos.values()}
        sizes = {(h.num_blocks, h.block_size, h.num_host_blocks) for h in self._state.hellos.values()}
        if len(facts) > 1 or len(sizes) > 1 or self._state.profile is None:
            self.fail("the ranks disagree about the model or the KV region")
            return
        self._state.ready.set_result(GroupInfo(first, self._state.profile))

    def _drop(self, kind: str, detail: str) -> None:
        self._on_dropped_frame(kind)
        now_s = time.monotonic()
        if now_s - self._last_log_s >= _LOG_PERIOD_S:
            self._last_log_s = now_s
            log.warning("frame dropped", kind=kind, detail=detail)


def _quiet_future() -> asyncio.Future[Any]:
    """A future whose exception may stay unread: a failure that nobody waits for is not an unhandled one."""
    future: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
    future.add_done_callback(lambda done: done.cancelled() or done.exception())
    return future
