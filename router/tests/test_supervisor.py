"""Real child processes: started together, watched, killed, and gone when their launcher is."""

import asyncio
import os
import select
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from bros_router.supervisor import RankExit, RankProcesses, rank_environment
from bros_shard.options import ShardOptions

#: Stands in for a rank: says who it is, then does what its group is named after.
RANK = """
import os, signal, sys, threading
from bros_shard.lifeline import die_with_parent
from bros_shard.options import ShardOptions
die_with_parent()
options = ShardOptions.from_argv(sys.argv[1:])
print(f"rank {options.rank} of {options.world_size}", flush=True)
match options.group:
    case "waits": signal.pause()
    case "fails": sys.exit(7)
    case "talks":
        sys.stderr.write("to stderr\\r\\nno newline at the end")
        sys.stderr.flush()
    case "babbles": sys.stdout.write("x" * 100_000 + "\\nend\\n")
    case "has-child":
        child = os.fork()
        if child: print(child, flush=True)
        signal.pause()
    case "obeys":
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
        print("ready", flush=True)
        while True: signal.pause()
"""

#: A launcher of two waiting ranks; it prints their process ids and then nothing more.
LAUNCHER = f"""
import asyncio, sys
from bros_router.supervisor import RankProcesses
from bros_shard.options import ShardOptions

async def main():
    options = [ShardOptions(endpoint="", rendezvous="", model_path="", model_id="", rank=rank, group="waits")
               for rank in range(2)]
    started = asyncio.Semaphore(0)
    program = [sys.executable, "-c", {RANK!r}]
    async with RankProcesses(options, num_cores=2, on_line=lambda *_: started.release(), program=program) as ranks:
        for _ in range(2): await started.acquire()
        print(*ranks.pids, flush=True)
        await asyncio.Event().wait()

asyncio.run(main())
"""


def rank_of_group(group: str = "g0", rank: int = 0, world_size: int = 1, num_threads: int = 0) -> ShardOptions:
    return ShardOptions(
        endpoint="",
        rendezvous="",
        model_path="",
        model_id="",
        group=group,
        rank=rank,
        world_size=world_size,
        num_threads=num_threads,
    )


class Group:
    """Ranks that run `RANK`, and the lines that they wrote."""

    def __init__(self, behaviours: list[str]) -> None:
        self.lines: asyncio.Queue[tuple[int, str]] = asyncio.Queue()
        options = [rank_of_group(group, rank, len(behaviours)) for rank, group in enumerate(behaviours)]
        self.processes = RankProcesses(
            options,
            num_cores=2,
            on_line=lambda rank, line: self.lines.put_nowait((rank, line)),
            program=[sys.executable, "-c", RANK],
        )

    async def next_line(self) -> tuple[int, str]:
        return await asyncio.wait_for(self.lines.get(), timeout=30)

    async def next_exit(self) -> RankExit:
        return await asyncio.wait_for(self.processes.exits.get(), timeout=30)

    def all_lines(self) -> list[tuple[int, str]]:
        return [self.lines.get_nowait() for _ in range(self.lines.qsize())]


def wait_until_gone(pid: int, timeout_s: float = 30.0) -> None:
    try:
        pidfd = os.pidfd_open(pid)
    except ProcessLookupError:
        return
    try:
        assert select.select([pidfd], [], [], timeout_s)[0], f"process {pid} still runs"
    finally:
        os.close(pidfd)


async def test_every_rank_is_told_its_number_and_heard():
    group = Group(["fails", "fails", "fails"])
    async with group.processes:
        exits = [await group.next_exit() for _ in range(3)]
    assert sorted(exits, key=lambda rank_exit: rank_exit.rank) == [RankExit(rank, 7) for rank in range(3)]
    assert sorted(group.all_lines()) == [(rank, f"rank {rank} of 3") for rank in range(3)]


async def test_killed_rank_is_reported_while_the_others_run_on():
    group = Group(["waits", "waits", "waits"])
    async with group.processes as processes:
        for _ in range(3):
            await group.next_line()
        victim = processes.pids[1]
        os.kill(victim, signal.SIGKILL)
        assert await group.next_exit() == RankExit(rank=1, status=-signal.SIGKILL)
        assert await processes.wait_any_exit(timeout_s=0.0) == [RankExit(rank=1, status=-signal.SIGKILL)]
        assert len(processes.pids) == 2
        assert victim not in processes.pids


async def test_leaving_the_context_kills_and_reaps_everyone():
    group = Group(["waits", "waits"])
    async with group.processes as processes:
        pids = processes.pids
    for pid in pids:
        with pytest.raises(ProcessLookupError):  # reaped, not even a zombie
            os.kill(pid, 0)
    assert {await group.next_exit() for _ in range(2)} == {RankExit(rank, -signal.SIGKILL) for rank in (0, 1)}


async def test_stop_waits_for_ranks_that_end_by_themselves_and_kills_the_others():
    group = Group(["obeys", "waits"])
    async with group.processes as processes:
        heard = {await group.next_line() for _ in range(3)}
        assert (0, "ready") in heard
        os.kill(processes.pids[0], signal.SIGTERM)
        await processes.stop(grace_s=1.0)
        assert processes.pids == []
    assert {await group.next_exit() for _ in range(2)} == {RankExit(0, 0), RankExit(1, -signal.SIGKILL)}


async def test_last_words_arrive_before_the_exit_and_in_full():
    group = Group(["talks"])
    async with group.processes:
        await group.next_exit()
    assert group.all_lines() == [(0, "rank 0 of 1"), (0, "to stderr"), (0, "no newline at the end")]


async def test_endless_line_is_cut():
    group = Group(["babbles"])
    async with group.processes:
        await group.next_exit()
    lines = [line for _, line in group.all_lines()]
    assert lines[-1] == "end"
    assert all(len(line) <= 16384 for line in lines)


async def test_children_of_a_rank_die_with_it():
    group = Group(["has-child"])
    async with group.processes as processes:
        await group.next_line()
        _, grandchild = await group.next_line()
        os.kill(processes.pids[0], signal.SIGKILL)
        await group.next_exit()
        wait_until_gone(int(grandchild))


async def test_ranks_are_out_of_reach_of_the_terminals_interrupt():
    group = Group(["waits"])
    async with group.processes as processes:
        assert os.getpgid(processes.pids[0]) != os.getpgid(0)


async def test_program_that_cannot_be_started_leaves_nothing_behind():
    processes = RankProcesses([rank_of_group()], num_cores=1, on_line=lambda *_: None, program=["/nonexistent"])
    with pytest.raises(FileNotFoundError):
        await processes.__aenter__()
    assert processes.pids == []


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSEGV])
def test_ranks_die_with_a_launcher_that_had_no_time_to_clean_up(number):
    with subprocess.Popen([sys.executable, "-c", LAUNCHER], stdout=subprocess.PIPE, text=True) as launcher:
        assert launcher.stdout is not None
        pids = [int(pid) for pid in launcher.stdout.readline().split()]
        assert len(pids) == 2
        launcher.send_signal(number)
        assert launcher.wait(timeout=30) == -number
    for pid in pids:
        wait_until_gone(pid)


def test_environment_keeps_ranks_on_this_machine_and_the_secrets_away(monkeypatch):
    for name in ("API_KEY", "HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "HF_API_TOKEN", "NGROK_AUTHTOKEN"):
        monkeypatch.setenv(name, "a secret")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "2,3")
    monkeypatch.setenv("GLIBC_TUNABLES", "glibc.rtld.optional_static_tls=2000")
    environment = rank_environment(rank_of_group(world_size=3), num_cores=8)
    assert "a secret" not in environment.values()
    expected = {
        "OMP_NUM_THREADS": "2",
        "MKL_NUM_THREADS": "2",
        "GLOO_SOCKET_IFNAME": "lo",
        "NCCL_SOCKET_IFNAME": "lo",
        "HF_HUB_OFFLINE": "1",
        "PYTHONSAFEPATH": "1",
        "CUDA_VISIBLE_DEVICES": "2,3",
        "GLIBC_TUNABLES": "glibc.rtld.optional_static_tls=2000:glibc.malloc.hugetlb=1",
        "PATH": os.environ["PATH"],
        "BROS_PARENT_PID": str(os.getpid()),
    }
    assert {name: environment[name] for name in expected} == expected


@pytest.mark.parametrize(
    ("num_threads", "world_size", "num_cores", "expected"),
    [(0, 1, 8, "8"), (0, 4, 8, "2"), (0, 4, 2, "1"), (3, 4, 8, "3")],
)
def test_threads_of_a_rank(num_threads, world_size, num_cores, expected):
    options = rank_of_group(world_size=world_size, num_threads=num_threads)
    assert rank_environment(options, num_cores)["OMP_NUM_THREADS"] == expected


def test_exit_reads_as_a_sentence():
    assert str(RankExit(0, 4)) == "rank 0 ended with status 4"
    assert str(RankExit(2, -9)) == "rank 2 was killed by signal 9 (Killed)"
    assert str(RankExit(2, -40)) == "rank 2 was killed by signal 40 (Real-time signal 6)"


def test_shard_package_is_importable_without_the_working_directory():
    """The ranks run with PYTHONSAFEPATH, so the package must be installed, not merely lie in the checkout."""
    command = [sys.executable, "-P", "-c", "import bros_shard.options"]
    assert subprocess.run(command, cwd=Path("/"), timeout=60).returncode == 0
