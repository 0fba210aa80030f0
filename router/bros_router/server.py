"""The life of the server: listen, find the model, start the ranks, serve, restart them, drain."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import secrets
import signal
import time
from pathlib import Path
from socket import AF_INET6, socket
from typing import Final

import structlog
from aiohttp import web

from bros_router.adapter_folders import resolve_adapters
from bros_router.admission import AdmissionController, AdmissionPolicy
from bros_router.app import create_app, create_runner
from bros_router.breaker import Breaker
from bros_router.config import ServerConfig
from bros_router.engine import EngineModel, StepEngine
from bros_router.grammars.vetter import GuidedVocabulary
from bros_router.kv.block_hasher import BlockHasher
from bros_router.kv.kv_manager import KVManager, Preemption
from bros_router.logs import log_rank_line
from bros_router.metrics import Metrics
from bros_router.model_source import ModelFiles, resolve_model
from bros_router.progress import StartupProgress
from bros_router.rank_group import RankGroup
from bros_router.rank_options import rank_options
from bros_router.request import RequestClass
from bros_router.runtime_dir import RuntimeDir, runtime_dir
from bros_router.scheduling.batch_cap import CapControl
from bros_router.scheduling.latency_model import LatencyModel
from bros_router.scheduling.policies.bros import BrosOptions
from bros_router.scheduling.policies.registry import PolicyOptions, make_policy, preemption_of
from bros_router.scheduling.scheduler import Scheduler, StepMismatchError
from bros_router.scheduling.speculation import Speculation
from bros_router.scheduling.step_draft import SchedulerLimits
from bros_router.service import Phase, ServedModel, Service
from bros_router.shard_client import GroupInfo, ShardError, ShardGroup
from bros_router.startup_error import UsageError
from bros_router.tracing import exporting
from bros_shard.options import ShardOptions
from bros_shard.protocol import Hello, Progress

#: How long replies that just ended get to reach their clients.
_FLUSH_TIMEOUT_S: Final = 5.0

log = structlog.get_logger()


async def serve(config: ServerConfig, listener: socket) -> None:
    """Serve until SIGTERM or SIGINT, then let what was accepted finish.

    Args:
        listener: the bound socket, so that a port that is taken was found out before anything slow began.

    Raises:
        StartupError: the server cannot start.
    """
    server = Server(config)
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, server.request_stop)
    with exporting(config.trace), runtime_dir(config.runtime_base) as runtime:
        await server.run(listener, runtime)


class Server:
    """One server process. `run` is its whole life."""

    def __init__(self, config: ServerConfig) -> None:
        self._config = config
        self._url = ""
        self._service = Service()
        self._metrics = Metrics()
        self._progress = StartupProgress()
        self._engine: StepEngine | None = None
        self._drain_requested = asyncio.Event()
        self._stop_requested = asyncio.Event()

    def request_stop(self) -> None:
        """The first call begins to drain, the second ends at once."""
        (self._stop_requested if self._drain_requested.is_set() else self._drain_requested).set()

    async def run(self, listener: socket, runtime: RuntimeDir) -> None:
        """Listen from the start, so that health checks can watch the model load. Raises `StartupError`."""
        self._url = url_of(listener)
        app = create_app(self._config.api, self._service, self._metrics)
        runner = create_runner(app, shutdown_timeout_s=_FLUSH_TIMEOUT_S)
        await runner.setup()
        try:
            await web.SockSite(runner, listener).start()
            serving = asyncio.create_task(self._serve(runtime), name="serve")
            draining = asyncio.create_task(self._drain_requested.wait(), name="drain")
            await asyncio.wait([serving, draining], return_when=asyncio.FIRST_COMPLETED)
            if not serving.done():
                await self._drain()
            serving.cancel()
            draining.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await serving
        finally:
            self._progress.close()
            await runner.cleanup()

    async def _drain(self) -> None:
        """Accept nothing more and wait for what was accepted: at most the grace period, or until the second signal."""
        self._service.phase = Phase.DRAINING
        if self._engine is None:
            return
        self._engine.stop_accepting()
        timeout_s = self._config.http.graceful_termination_timeout_s
        log.info("draining", accepted_requests=self._engine.num_replies, timeout_s=timeout_s)
        waits = [
            asyncio.create_task(self._engine.drained(), name="drained"),
            asyncio.create_task(self._stop_requested.wait(), name="stop now"),
        ]
        await asyncio.wait(waits, timeout=timeout_s, return_when=asyncio.FIRST_COMPLETED)
        for wait in waits:
            wait.cancel()

    async def _serve(self, runtime: RuntimeDir) -> None:
        """Find the model, start the ranks, and run steps until cancelled. Raises `StartupError`."""
        files = await asyncio.to_thread(resolve_model, self._config.model, self._config.hub, self._progress.update)
        adapters = await asyncio.to_thread(
            resolve_adapters, self._config.model, self._config.hub, self._progress.update
        )
        self._enter(Phase.LOADING)
        endpoint = runtime.socket_endpoint("shards")
        shards = ShardGroup(
            endpoint,
            self._config.ranks.num_shard,
            on_progress=self._note_progress,
            on_drain=self._drain_requested.set,
            on_dropped_frame=self._metrics.frame_dropped,
        )

        guided_tokenizer = await asyncio.to_thread(_guided_tokenizer, self._config, files, runtime)
        options = rank_options(self._config, files, endpoint, guided_tokenizer, adapters)

        def make_options(generation: int) -> list[ShardOptions]:
            rendezvous = runtime.rendezvous(generation)
            return [
                dataclasses.replace(options, rank=rank, generation=generation, rendezvous=rendezvous)
                for rank in range(options.world_size)
            ]

        async with RankGroup(shards, make_options, log_rank_line) as ranks:
            try:
                info = await ranks.start()
            except ShardError as error:
                raise await ranks.startup_error(error) from None
            model = served_model(self._config, files, info.hello, guided_tokenizer, tuple(adapters))
            engine = make_engine(self._config, shards, model, info, self._metrics)
            self._service.model, self._service.engine, self._engine = model, engine, engine
            self._progress.close()
            self._enter(Phase.READY)
            self._announce(model, info)
            try:
                await self._run_steps(engine, ranks)
            finally:
                engine.fail_all("the server is shutting down")

    async def _run_steps(self, engine: StepEngine, ranks: RankGroup) -> None:
        """Run steps for ever, on new ranks whenever the old ones failed."""
        breaker = Breaker()
        while True:
            try:
                await engine.run()
            except (ShardError, StepMismatchError) as error:
                log.error("ranks failed", reason=str(error), accepted_requests=engine.num_replies)
            await self._restart(engine, ranks, breaker)

    async def _restart(self, engine: StepEngine, ranks: RankGroup, breaker: Breaker) -> None:
        """Replace the ranks; every accepted request goes on from the tokens its client has."""
        while True:
            breaker.note_failure(time.monotonic())
            if breaker.is_open:
                self._enter(Phase.FAILED)
                engine.fail_all("the model cannot be run at present")
            else:
                self._enter(Phase.RESTARTING)
            await asyncio.sleep(breaker.delay_s)
            try:
                await ranks.start()
            except ShardError as error:
                log.error("ranks cannot be restarted", reason=str(error))
                continue
            engine.restart(ranks.generation)
            breaker.note_recovery(time.monotonic())
            self._enter(Phase.READY)
            log.info("ranks restarted", generation=ranks.generation)
            return

    def _enter(self, phase: Phase) -> None:
        """Change the phase, unless the server is on its way out."""
        if self._service.phase is not Phase.DRAINING:
            self._service.phase = phase
            self._service.progress = 1.0 if phase is Phase.READY else 0.0

    def _note_progress(self, progress: Progress) -> None:
        if self._service.phase in (Phase.LOADING, Phase.WARMING):
            self._enter(Phase(progress.phase))
            self._service.progress = progress.num_done / max(1, progress.num_total)
            self._progress.update(progress.phase, progress.num_done, progress.num_total)

    def _announce(self, model: ServedModel, info: GroupInfo) -> None:
        """The budget that was found, and the one line that says where to send requests."""
        hello = info.hello
        kv_tokens = hello.num_blocks * hello.block_size
        self._metrics.set_max_batch_total_tokens(kv_tokens)
        log.info(
            "budget",
            kv_tokens=kv_tokens,
            kv_bytes_per_rank=hello.num_blocks * hello.block_bytes,
            max_total_tokens=model.max_total_tokens,
            max_input_tokens=model.max_input_tokens,
            max_batch_prefill_tokens=self._config.batch.max_batch_prefill_tokens,
        )
        log.info("ready", url=self._url, model=model.model_id, dtype=hello.dtype, ranks=hello.world_size)


def make_engine(
    config: ServerConfig, shards: ShardGroup, model: ServedModel, info: GroupInfo, metrics: Metrics
) -> StepEngine:
    """The scheduler with its policy, memory and model of time, and the engine that runs it."""
    hello, batch, scheduling = info.hello, config.batch, config.scheduling
    options = PolicyOptions(
        bros=BrosOptions(
            cap_control=CapControl(scheduling.batch_size_control),
            checkpoints=scheduling.kv_checkpoints == "background",
            be_max_wait_s=scheduling.be_max_wait_s,
            is_floor_hard=scheduling.be_floor == "hard",
        ),
        preemption=Preemption(scheduling.kv_preemption),
        static_be_requests=scheduling.static_be_requests,
        priority_preempts_when_full=scheduling.priority_preemption == "full",
    )
    kv = KVManager(
        hello.num_blocks, hello.block_size, hello.num_host_blocks, preemption_of(scheduling.scheduler, options)
    )
    limits = SchedulerLimits(batch.max_batch_prefill_tokens, batch.max_batch_size, hello.can_interrupt)
    latency_model = LatencyModel(info.profile.points)
    policy = make_policy(scheduling.scheduler, latency_model, limits, options)
    hasher = None if config.ranks.disable_prefix_caching else BlockHasher(hello.block_size, secrets.token_bytes(32))
    speculation = Speculation(batch.speculate) if batch.speculate else None
    scheduler = Scheduler(policy, kv, latency_model, limits, shards.generation, hasher, speculation)
    admission = AdmissionController(
        latency_model,
        limits.max_batch_tokens,
        kv.num_blocks * kv.block_size,
        AdmissionPolicy(scheduling.admission_policy),
        {RequestClass.RT: scheduling.max_queued_rt_tokens, RequestClass.BE: scheduling.max_queued_be_tokens},
    )
    engine_model = EngineModel(model.tokenizer, model.eos_token_ids, hello.vocab_size)
    return StepEngine(scheduler, kv, latency_model, admission, shards, engine_model, metrics)


def url_of(listener: socket) -> str:
    """Where to send requests: the address that was bound, or the loopback where that is every address."""
    host, port = listener.getsockname()[:2]
    if listener.family is AF_INET6:
        return f"http://[{'::1' if host == '::' else host}]:{port}"
    return f"http://{'127.0.0.1' if host == '0.0.0.0' else host}:{port}"


def _guided_tokenizer(config: ServerConfig, files: ModelFiles, runtime: RuntimeDir) -> Path | None:
    """Where the grammar helper and rank 0 find the tokenizer, which is written there.

    `None` where the operator wants no grammars, or nothing could end a reply that follows one.
    """
    if config.api.disable_grammar_support or not files.eos_token_ids:
        return None
    path = runtime.path / "tokenizer.json"
    files.tokenizer.save(path)
    return path


def served_model(
    config: ServerConfig,
    files: ModelFiles,
    hello: Hello,
    guided_tokenizer: Path | None = None,
    adapter_ids: tuple[str, ...] = (),
) -> ServedModel:
    """The model with its limits: those given, else as much as the model and the KV region allow, as TGI computes them.

    Raises:
        UsageError: a limit was given that the model or the KV region cannot hold.
    """
    kv_tokens = hello.num_blocks * hello.block_size
    most = min(hello.max_length, kv_tokens, files.max_length or hello.max_length)
    max_total_tokens = config.batch.max_total_tokens or most
    if max_total_tokens > min(hello.max_length, kv_tokens):
        raise UsageError(
            f"--max-total-tokens ({max_total_tokens}) is more than the model's length ({hello.max_length})"
            f" or the KV cache ({kv_tokens} tokens) allows: lower it, or raise --kv-cache-memory."
        )
    max_input_tokens = config.batch.max_input_tokens or max_total_tokens - 1
    if max_input_tokens >= max_total_tokens:
        raise UsageError(
            f"--max-input-tokens ({max_input_tokens}) must be less than the {max_total_tokens} tokens in total."
        )
    return ServedModel(
        model_id=files.model_id,
        model_sha=files.sha,
        pipeline_tag=files.pipeline_tag,
        tokenizer=files.tokenizer,
        chat_template=files.chat_template,
        vocab_size=hello.vocab_size,
        eos_token_ids=files.eos_token_ids,
        max_input_tokens=max_input_tokens,
        max_total_tokens=max_total_tokens,
        compute_type=config.http.compute_type or f"{hello.world_size}-{hello.device}",
        guided=None
        if guided_tokenizer is None
        else GuidedVocabulary(guided_tokenizer, hello.vocab_size, files.eos_token_ids),
        adapter_ids=adapter_ids,
    )
