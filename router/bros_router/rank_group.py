"""One tensor-parallel group as a whole: its processes and its socket, started and replaced together."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable, Sequence
from types import TracebackType
from typing import Final, TypeAlias

from bros_router.shard_client import GroupInfo, ShardError, ShardGroup
from bros_router.startup_error import CheckpointError, RankDiedError, StartupError, UsageError
from bros_router.supervisor import OnLine, RankProcesses
from bros_shard.exit_codes import ExitCode
from bros_shard.options import ShardOptions

#: How long ranks get to leave by themselves after `Shutdown` before they are killed.
_SHUTDOWN_GRACE_S: Final = 5.0
#: A rank tells its fault first and ends right after: how long to wait for its exit status.
_EXIT_STATUS_WAIT_S: Final = 5.0
_SILENCE_CHECK_PERIOD_S: Final = 1.0

#: From a generation to the options of its ranks, in order of rank.
MakeOptions: TypeAlias = Callable[[int], Sequence[ShardOptions]]

_ERRORS: Final[dict[int, type[StartupError]]] = {
    ExitCode.USAGE: UsageError,
    ExitCode.BAD_CHECKPOINT: CheckpointError,
}


class RankGroup:
    """Starts the ranks of one group, watches them, and replaces all of them where one fails.

    A context: leaving it ends the ranks and closes the socket.
    """

    def __init__(self, shards: ShardGroup, make_options: MakeOptions, on_line: OnLine) -> None:
        """`make_options(generation)` gives the options of every rank; `on_line` gets every line that a rank writes."""
        self.shards = shards
        self._make_options = make_options
        self._on_line = on_line
        self._processes: RankProcesses | None = None
        self._watchers: list[asyncio.Task[None]] = []

    async def __aenter__(self) -> RankGroup:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.shards.shut_down()
        await self._stop(_SHUTDOWN_GRACE_S)
        await self.shards.close()

    @property
    def pids(self) -> list[int]:
        """Process ids of the ranks that run."""
        return self._processes.pids if self._processes is not None else []

    @property
    def generation(self) -> int:
        """Which set of processes this is, from 0."""
        return self.shards.generation

    async def start(self) -> GroupInfo:
        """Replace whatever ranks there are by new ones, and wait until these are ready.

        Raises:
            ShardError: a rank failed before all were ready. `startup_error` says why.
        """
        await self._stop(grace_s=0.0)
        options = self._make_options(self.shards.start())
        self._processes = RankProcesses(options, num_cores=len(os.sched_getaffinity(0)), on_line=self._on_line)
        await self._processes.start()
        self._watchers = [
            asyncio.create_task(self._watch_exits(self._processes), name="rank exits"),
            asyncio.create_task(self._watch_silence(), name="rank silence"),
        ]
        return await self.shards.ready()

    async def startup_error(self, error: ShardError) -> StartupError:
        """What a failed start means for the operator, judged by the exit status of the rank that ended first."""
        assert self._processes is not None
        exits = await self._processes.wait_any_exit(_EXIT_STATUS_WAIT_S)
        kinds = [_ERRORS[rank_exit.status] for rank_exit in exits if rank_exit.status in _ERRORS]
        return (kinds[0] if kinds else RankDiedError)(str(error))

    async def _watch_exits(self, processes: RankProcesses) -> None:
        """Fail the generation as soon as a rank ends."""
        self.shards.fail(str(await processes.exits.get()))

    async def _watch_silence(self) -> None:
        """Fail the generation once a rank has fallen silent."""
        while True:
            await asyncio.sleep(_SILENCE_CHECK_PERIOD_S)
            self.shards.check_silence()

    async def _stop(self, grace_s: float) -> None:
        for watcher in self._watchers:
            watcher.cancel()
        await asyncio.gather(*self._watchers, return_exceptions=True)
        if self._processes is not None:
            await self._processes.stop(grace_s)
        self._watchers, self._processes = [], None
