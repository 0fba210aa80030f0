"""The processes of one tensor-parallel group: started together, watched, and never left behind."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Final

from bros_router.child_environment import child_environment
from bros_shard.options import ShardOptions

#: A step's temporaries are megabytes, and glibc would unmap them each time: the page faults cost 5 % of a decode step
#: of 32 sequences (docs/performance.md).
_KEPT_HEAP_BYTES: Final = str(1 << 30)
#: Asks for huge pages where the system gives them to those who ask.
_HUGE_PAGES: Final = "glibc.malloc.hugetlb=1"
_READ_BYTES: Final = 65536
#: Longer lines are cut: a rank must not fill the launcher's memory.
_MAX_LINE_BYTES: Final = 16384

OnLine = Callable[[int, str], None]


@dataclass(frozen=True, slots=True)
class RankExit:
    """A rank's process ended."""

    rank: int
    #: Exit status, or the negative number of the signal that killed it.
    status: int

    def __str__(self) -> str:
        if self.status < 0:
            return f"rank {self.rank} was killed by signal {-self.status} ({signal.strsignal(-self.status)})"
        return f"rank {self.rank} ended with status {self.status}"


class RankProcesses:
    """The processes of one group in one generation, as a context: leaving it kills and reaps what still runs.

        async with RankProcesses(options, num_cores=8, on_line=log_line) as processes:
            exit = await processes.exits.get()

    The kernel kills the ranks when the *thread* that started them ends, so enter it in the main thread.
    """

    def __init__(
        self,
        options: Sequence[ShardOptions],
        *,
        num_cores: int,
        on_line: OnLine,
        program: Sequence[str] = (sys.executable, "-m", "bros_shard"),
    ) -> None:
        """
        Args:
            num_cores: cores that all ranks together may keep busy.
            on_line: called as `on_line(rank, line)` with every line that a rank writes, stdout and stderr alike.
            program: what a rank runs; its options follow.
        """
        self.exits: asyncio.Queue[RankExit] = asyncio.Queue()
        self._options = options
        self._num_cores = num_cores
        self._on_line = on_line
        self._program = program
        self._processes: list[_RankProcess] = []

    async def start(self) -> None:
        """Start every rank. Raises `OSError` where a process cannot be started."""
        try:
            for options in self._options:
                command = [*self._program, *options.to_argv()]
                environment = rank_environment(options, self._num_cores)
                self._processes.append(
                    _RankProcess(options.rank, command, environment, self._on_line, self.exits.put_nowait)
                )
        except BaseException:
            await self.stop(grace_s=0.0)
            raise

    async def __aenter__(self) -> RankProcesses:
        await self.start()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.stop(grace_s=0.0)

    @property
    def pids(self) -> list[int]:
        """Process ids by rank, of those that still run."""
        return [process.pid for process in self._processes if not process.exited.done()]

    async def wait_any_exit(self, timeout_s: float) -> list[RankExit]:
        """Wait until a rank has ended, at most `timeout_s`. Returns those that have, in order of rank."""
        await asyncio.wait(
            [process.exited for process in self._processes],
            timeout=timeout_s,
            return_when=asyncio.FIRST_COMPLETED,
        )
        return [process.exited.result() for process in self._processes if process.exited.done()]

    async def stop(self, grace_s: float) -> None:
        """Wait until every rank has ended, at most `grace_s` for those that were told to; then kill the others.

        Returns when all are reaped. Their exits are in `exits` like any other.
        """
        running = [process for process in self._processes if not process.exited.done()]
        if running and grace_s > 0:
            await asyncio.wait([process.exited for process in running], timeout=grace_s)
        for process in running:
            process.kill()
        if running:
            await asyncio.wait([process.exited for process in running])


def rank_environment(options: ShardOptions, num_cores: int) -> dict[str, str]:
    """The environment of a rank: nothing of torch.distributed listens beyond this machine, the threads of all ranks
    together are as many as there are cores, and the heap is not handed back to the kernel between steps and lies in
    huge pages: weights are read faster by a fifth.
    """
    num_threads = str(options.num_threads or max(1, num_cores // options.world_size))
    inherited = child_environment()
    return inherited | {
        "OMP_NUM_THREADS": num_threads,
        "MKL_NUM_THREADS": num_threads,
        "GLOO_SOCKET_IFNAME": "lo",
        "NCCL_SOCKET_IFNAME": "lo",
        "GLIBC_TUNABLES": ":".join(filter(None, (inherited.get("GLIBC_TUNABLES"), _HUGE_PAGES))),
        "MALLOC_MMAP_THRESHOLD_": _KEPT_HEAP_BYTES,
        "MALLOC_TRIM_THRESHOLD_": _KEPT_HEAP_BYTES,
    }


class _RankProcess:
    """One rank: its process, what it writes, and its end."""

    def __init__(
        self,
        rank: int,
        command: list[str],
        environment: dict[str, str],
        on_line: OnLine,
        on_exit: Callable[[RankExit], None],
    ) -> None:
        self._rank = rank
        self._on_exit = on_exit
        # A session of its own: Ctrl-C on the terminal reaches the launcher alone.
        self._process = subprocess.Popen(
            command,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        self.pid = self._process.pid
        self._loop = asyncio.get_running_loop()
        self.exited: asyncio.Future[RankExit] = self._loop.create_future()
        assert self._process.stdout is not None
        try:
            self._pidfd = os.pidfd_open(self.pid)
        except OSError:
            self._process.kill()
            self._process.wait()
            raise
        self._output = _LineReader(self._process.stdout.fileno(), lambda line: on_line(rank, line))
        self._loop.add_reader(self._pidfd, self._reap)

    def kill(self) -> None:
        """SIGKILL, to the rank and whatever it started."""
        if not self.exited.done():
            os.killpg(self.pid, signal.SIGKILL)

    def _reap(self) -> None:
        self._loop.remove_reader(self._pidfd)
        os.close(self._pidfd)
        # Until the rank is reaped its id is its own, so this cannot hit a stranger.
        os.killpg(self.pid, signal.SIGKILL)
        status = self._process.wait()
        self._output.finish()
        assert self._process.stdout is not None
        self._process.stdout.close()
        rank_exit = RankExit(self._rank, status)
        self.exited.set_result(rank_exit)
        self._on_exit(rank_exit)


class _LineReader:
    """Turns the bytes of a pipe into lines as they come."""

    def __init__(self, descriptor: int, on_line: Callable[[str], None]) -> None:
        self._descriptor = descriptor
        self._on_line = on_line
        self._buffer = b""
        self._loop = asyncio.get_running_loop()
        os.set_blocking(descriptor, False)
        self._loop.add_reader(descriptor, self._read)

    def finish(self) -> None:
        """Take what is left in the pipe of a process that ended."""
        while self._read():
            pass
        self._loop.remove_reader(self._descriptor)
        if self._buffer:
            self._emit(self._buffer)

    def _read(self) -> bool:
        try:
            data = os.read(self._descriptor, _READ_BYTES)
        except BlockingIOError:
            return False
        if not data:
            self._loop.remove_reader(self._descriptor)
            return False
        *lines, self._buffer = (self._buffer + data).split(b"\n")
        for line in lines:
            self._emit(line)
        if len(self._buffer) > _MAX_LINE_BYTES:
            self._emit(self._buffer)
            self._buffer = b""
        return True

    def _emit(self, line: bytes) -> None:
        self._on_line(line[:_MAX_LINE_BYTES].decode(errors="replace").rstrip("\r"))
