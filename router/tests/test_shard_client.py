"""The router's end of the wire, against sockets that speak as ranks do, and as they must not."""

import asyncio
import time

import pytest
import zmq
import zmq.asyncio

from bros_router import shard_client
from bros_router.shard_client import ShardError, ShardGroup
from bros_shard.protocol import (
    PROTOCOL_VERSION,
    Drain,
    Fault,
    Heartbeat,
    Hello,
    Identity,
    Profile,
    Progress,
    SampledToken,
    SequenceResult,
    Shutdown,
    StepPlan,
    StepResult,
    decode_from_router,
    encode,
)


def hello(rank: int, *, generation: int = 0, world_size: int = 1, num_blocks: int = 10) -> Hello:
    return Hello(
        generation, PROTOCOL_VERSION, rank, world_size, "m", None, "float32", "cpu", 100, 64, num_blocks, 16, 0, 1, True
    )


def result(step_id: int, generation: int = 0) -> StepResult:
    return StepResult(generation, step_id, [SequenceResult(1, [SampledToken(2, -0.5)])], 0.0, 0.0, 0.0, 0.0)


class FakeRank:
    """A socket under a rank's identity."""

    def __init__(self, endpoint: str, identity: bytes) -> None:
        self.socket = zmq.asyncio.Context.instance().socket(zmq.DEALER)
        self.socket.setsockopt(zmq.IDENTITY, identity)
        self.socket.setsockopt(zmq.LINGER, 0)
        self.socket.connect(endpoint)

    async def say(self, *messages) -> None:
        for message in messages:
            await self.socket.send(message if isinstance(message, bytes) else encode(message))

    async def hear(self):
        return decode_from_router(await asyncio.wait_for(self.socket.recv(), 10))


@pytest.fixture
async def make_group(tmp_path):
    opened = []

    def make(world_size=1, **callbacks):
        endpoint = f"ipc://{tmp_path}/shards"
        group = ShardGroup(endpoint, world_size, **callbacks)
        group.start()
        opened.append(group)

        def rank(number=0, *, generation=0, channel="steps", identity=None):
            fake = FakeRank(endpoint, identity or Identity("g0", number, generation, channel).encode())
            opened.append(fake.socket)
            return fake

        return group, rank

    yield make
    for each in opened:
        closing = each.close()
        if asyncio.iscoroutine(closing):
            await closing


async def until(condition) -> None:
    deadline_s = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < deadline_s, "it never came true"
        await asyncio.sleep(0.005)


async def test_group_is_ready_when_every_rank_is(make_group):
    group, rank = make_group(world_size=2)
    await rank(0).say(Profile(0, []), hello(0, world_size=2))
    waiting = asyncio.create_task(group.ready())
    await asyncio.wait([waiting], timeout=0.05)
    assert not waiting.done()
    await rank(1).say(hello(1, world_size=2))
    assert (await waiting).hello.rank == 0
    assert group.is_alive


async def test_ranks_that_disagree_are_refused(make_group):
    group, rank = make_group(world_size=2)
    await rank(0).say(Profile(0, []), hello(0, world_size=2, num_blocks=10))
    await rank(1).say(hello(1, world_size=2, num_blocks=11))
    with pytest.raises(ShardError, match="disagree"):
        await group.ready()


async def test_plan_reaches_every_rank_and_the_result_comes_back(make_group):
    group, rank = make_group(world_size=2)
    ranks = [rank(0), rank(1)]
    await ranks[0].say(Profile(0, []), hello(0, world_size=2))
    await ranks[1].say(hello(1, world_size=2))
    await group.ready()
    future = await group.send(StepPlan(0, 0))
    assert [await r.hear() for r in ranks] == [StepPlan(0, 0)] * 2
    await ranks[0].say(result(0))
    assert await future == result(0)
    await group.shut_down()
    assert [await r.hear() for r in ranks] == [Shutdown(0)] * 2


async def test_results_of_two_steps_in_flight_are_told_apart(make_group):
    group, rank = make_group()
    only = rank()
    await only.say(Profile(0, []), hello(0))
    await group.ready()
    first = await group.send(StepPlan(0, 0))
    second = await group.send(StepPlan(0, 1))
    await only.say(result(0), result(1))
    assert (await second).step_id == 1
    assert (await first).step_id == 0


async def test_frames_that_are_not_due_are_dropped_counted_and_harmless(make_group):
    dropped = []
    group, rank = make_group(on_dropped_frame=dropped.append)
    only = rank()
    await only.say(Profile(0, []), hello(0))
    await group.ready()
    future = await group.send(StepPlan(0, 0))
    await only.say(
        b"\xc1",  # not MessagePack
        encode(StepPlan(0, 0)),  # not a rank's to say
        result(7),  # not sent
        result(0, generation=5),  # of a generation that is not this one
        bytes(40_000_000),  # too large
    )
    await rank(generation=3).say(Drain(3))
    await rank(4).say(hello(4))
    await rank(identity=b"intruder").say(hello(0))
    await until(lambda: len(dropped) == 8)
    assert sorted(dropped) == ["malformed"] * 5 + ["stale"] * 2 + ["unexpected"]
    await only.say(result(0), result(0))  # the second is a replay
    assert await future == result(0)
    await until(lambda: dropped.count("unexpected") == 2)
    assert group.is_alive


async def test_fault_ends_the_generation_for_whoever_waits(make_group):
    group, rank = make_group()
    only = rank()
    await only.say(Profile(0, []), hello(0))
    await group.ready()
    future = await group.send(StepPlan(0, 0))
    await only.say(Fault(0, "RuntimeError: out of tune"))
    with pytest.raises(ShardError, match="out of tune"):
        await future
    assert not group.is_alive
    with pytest.raises(ShardError):
        await group.send(StepPlan(0, 1))


async def test_plan_to_a_rank_that_never_came_is_an_error_not_a_silent_loss(make_group):
    group, _ = make_group()
    with pytest.raises(ShardError, match="cannot be reached"):
        await group.send(StepPlan(0, 0))


async def test_next_generation_hears_nothing_of_the_last(make_group):
    dropped = []
    group, rank = make_group(on_dropped_frame=dropped.append)
    old = rank(generation=0)
    await old.say(Profile(0, []), hello(0))
    await group.ready()
    group.fail("killed")
    assert group.start() == 1
    await old.say(hello(0))
    await until(lambda: dropped == ["stale"])
    await rank(generation=1).say(Profile(1, []), hello(0, generation=1))
    assert (await group.ready()).hello.generation == 1


async def test_heartbeats_keep_a_group_alive_and_silence_ends_it(make_group, monkeypatch):
    monkeypatch.setattr(shard_client, "SILENCE_LIMIT_S", 0.3)
    group, rank = make_group()
    await rank().say(Profile(0, []), hello(0))
    await group.ready()
    heart = rank(channel="heartbeat")
    beats_until_s = time.monotonic() + 0.6
    while time.monotonic() < beats_until_s:
        await heart.say(Heartbeat(0, 0, 0.0, False, 1))
        await asyncio.sleep(0.05)
        group.check_silence()
        assert group.is_alive
    await until(lambda: not group.is_alive)
    group.check_silence()
    with pytest.raises(ShardError, match="silent"):
        await group.send(StepPlan(0, 0))


async def test_progress_and_drain_are_passed_on(make_group):
    progress, drains = [], []
    _, rank = make_group(on_progress=progress.append, on_drain=lambda: drains.append(1))
    await rank().say(Progress(0, "loading", 1, 2), Drain(0))
    await until(lambda: drains)
    assert progress == [Progress(0, "loading", 1, 2)]
