"""Thousands of replies that end at random: nothing is lost, nothing is counted twice, nothing grows.

The engine and a real rank, without HTTP in between, so that the books can be checked after every step.
`make soak` runs it with 10,000 requests.
"""

from __future__ import annotations

import asyncio
import collections
import ctypes
import gc
import logging
import os
import random

import psutil
import pytest
import structlog
from rich.progress import track

from bros_router.admission import AdmissionController
from bros_router.engine import EngineModel, Reply, StepEngine
from bros_router.kv.kv_manager import KVManager
from bros_router.metrics import Metrics
from bros_router.model_source import demo_model_path
from bros_router.rank_group import RankGroup
from bros_router.request import RequestClass, ValidRequest
from bros_router.scheduling.latency_model import LatencyModel
from bros_router.scheduling.policies.registry import PolicyOptions, make_policy
from bros_router.scheduling.scheduler import Scheduler
from bros_router.scheduling.sequence import SequenceState
from bros_router.scheduling.step_draft import SchedulerLimits
from bros_router.shard_client import ShardGroup
from bros_router.tokenizer import Tokenizer
from bros_shard.options import ShardOptions
from bros_shard.protocol import SamplingParams

NUM_REQUESTS = int(os.environ.get("BROS_SOAK_REQUESTS", "300"))
#: Until allocators have settled.
NUM_FIRST_REQUESTS = NUM_REQUESTS // 3
NUM_CLIENTS = 24
MAX_BATCH_TOKENS = 64
MAX_GROWTH_BYTES = 5 << 20


class CheckedScheduler(Scheduler):
    """The scheduler, with its books checked after every plan and every commit."""

    def __init__(self, kv: KVManager, model: LatencyModel) -> None:
        limits = SchedulerLimits(MAX_BATCH_TOKENS, max_num_sequences=12)
        super().__init__(make_policy("bros", model, limits, PolicyOptions()), kv, model, limits)
        self.checked_kv = kv
        self.num_checks = self.num_copied_out = self.num_copied_in = self.num_moved = 0

    def plan(self, now_s):
        plan = super().plan(now_s)
        self._check()
        if plan is not None:
            self.num_copied_out += len(plan.copies_out)
            self.num_copied_in += len(plan.copies_in)
            self.num_moved += len(plan.tail_moves)
        return plan

    def commit(self, result, now_s):
        outcomes = super().commit(result, now_s)
        self._check()
        return outcomes

    def _check(self) -> None:
        self.checked_kv.check_integrity()
        self.num_checks += 1


def state_of(reply: Reply) -> str:
    sequence = reply.sequence
    if sequence.state is SequenceState.WAITING:
        return "preempted" if sequence.output_token_ids else "queued"
    if sequence.num_in_flight_tokens:
        return "in flight"
    return "prefilling" if sequence.num_computed_tokens < sequence.num_prompt_tokens else "decoding"


class Clients:
    """Clients that send one request after the other and leave when they please."""

    def __init__(self, engine: StepEngine, vocab_size: int) -> None:
        self.ends: collections.Counter[str] = collections.Counter()
        self._engine = engine
        self._vocab_size = vocab_size
        self._random = random.Random(5)

    async def send(self, num_requests: int) -> None:
        """Run the given number of requests to their ends, `NUM_CLIENTS` at a time."""
        requests = iter(track(range(num_requests), description="requests"))
        await asyncio.gather(*(self._client(requests) for _ in range(NUM_CLIENTS)))

    async def touch_every_step_size(self, max_batch_tokens: int) -> None:
        """Run a step of every number of tokens: the CPU's matrix library keeps a compiled kernel for each."""
        for num_tokens in range(1, max_batch_tokens + 1):
            request = ValidRequest(str(num_tokens), (1,) * num_tokens, SamplingParams(), max_new_tokens=1)
            with self._engine.submit(request) as reply:
                assert len([event async for event in reply]) == 1

    async def _client(self, requests) -> None:
        for number in requests:
            with self._engine.submit(self._request(number)) as reply:
                if self._random.random() < 0.5:
                    await self._leave(reply)
                    continue
                events = [event async for event in reply]
                assert events[-1].finish is not None
                assert events[-1].finish.num_generated_tokens == len(events)
                self.ends["finished"] += 1

    async def _leave(self, reply: Reply) -> None:
        """Leave at once, in the middle of the prefill, or after a random number of tokens."""
        match self._random.randrange(3):
            case 1:
                while state_of(reply) == "queued" and not reply.is_complete:
                    await asyncio.sleep(0.001)
            case 2:
                num_tokens = self._random.randrange(1, 30)
                async for _ in reply:
                    num_tokens -= 1
                    if num_tokens == 0:
                        break
        self.ends["finished" if reply.is_complete else state_of(reply)] += 1

    def _request(self, number: int) -> ValidRequest:
        num_prompt_tokens = self._random.choice([1, 5, 20, 100, 300])
        return ValidRequest(
            request_id=str(number),
            prompt_token_ids=tuple(self._random.randrange(self._vocab_size) for _ in range(num_prompt_tokens)),
            sampling=SamplingParams(
                do_sample=number % 2 == 0, seed=number, repetition_penalty=self._random.choice([1.0, 1.2])
            ),
            max_new_tokens=self._random.randrange(1, 50),
            stop_sequences=self._random.choice([(), (" the",)]),
            request_class=self._random.choice(list(RequestClass)),
            ttft_s=self._random.choice([None, 0.05, 1.0]),
        )


def resident_bytes(pids: list[int]) -> int:
    """Memory of these processes after this one gave back what it could."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    return sum(psutil.Process(pid).memory_info().rss for pid in pids)


@pytest.fixture
def quiet_log():
    """No line for each of the thousands of requests that are dropped on purpose."""
    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(logging.WARNING))
    yield
    structlog.reset_defaults()


async def test_random_ends_lose_nothing(tmp_path, quiet_log):
    endpoint = f"ipc://{tmp_path}/shards"
    options = ShardOptions(
        endpoint=endpoint,
        rendezvous=f"file://{tmp_path}/rendezvous",
        model_path=str(demo_model_path()),
        model_id="demo",
        block_size=16,
        kv_slots_limit=1200,  # too few for twelve long sequences: some are preempted
        host_memory_bytes=1 << 20,
        max_batch_tokens=MAX_BATCH_TOKENS,
        num_threads=1,
    )
    async with RankGroup(ShardGroup(endpoint, 1), lambda _: [options], lambda rank, line: None) as ranks:
        shards = ranks.shards
        info = await ranks.start()
        hello = info.hello
        kv = KVManager(hello.num_blocks, hello.block_size, hello.num_host_blocks)
        latency_model = LatencyModel(info.profile.points)
        scheduler = CheckedScheduler(kv, latency_model)
        tokenizer = Tokenizer(demo_model_path() / "tokenizer.json")
        model = EngineModel(tokenizer, frozenset({0}), hello.vocab_size)
        admission = AdmissionController(latency_model, MAX_BATCH_TOKENS, kv.num_blocks * kv.block_size)
        engine = StepEngine(scheduler, kv, latency_model, admission, shards, model, Metrics())
        running = asyncio.create_task(engine.run())
        clients = Clients(engine, hello.vocab_size)

        await clients.touch_every_step_size(MAX_BATCH_TOKENS)
        await clients.send(NUM_FIRST_REQUESTS)
        pids = [os.getpid(), *ranks.pids]
        before_bytes = resident_bytes(pids)
        await clients.send(NUM_REQUESTS)
        await engine.drained()
        growth_bytes = resident_bytes(pids) - before_bytes

        print(f"\nends: {dict(clients.ends)}; checks: {scheduler.num_checks}; growth: {growth_bytes / 2**20:.1f} MiB")
        print(f"copied out: {scheduler.num_copied_out}, in: {scheduler.num_copied_in}; moved: {scheduler.num_moved}")
        assert not running.done()
        assert kv.num_free_blocks == kv.num_blocks
        assert sum(clients.ends.values()) == NUM_FIRST_REQUESTS + NUM_REQUESTS
        assert {"queued", "prefilling", "in flight", "finished"} <= set(clients.ends)
        assert growth_bytes < MAX_GROWTH_BYTES
        running.cancel()
        with pytest.raises(asyncio.CancelledError):
            await running
