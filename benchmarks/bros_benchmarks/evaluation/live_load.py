"""An open-loop load generator: sends a `Workload` to a server over HTTP and records what each request got.

A real-time request is sent at the time its trace says, whatever became of earlier ones, and its latency counts from
that time. Where the generator itself is late, the delay is therefore in the figures, and reported beside them.
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import random
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Final

import aiohttp

from bros_benchmarks.client import ReplyError, encode_body, open_session, stream_tokens
from bros_benchmarks.prompts import random_prompt
from bros_router.request import RequestClass
from bros_router.simulation.record import Ending, RequestRecord, percentile
from bros_router.simulation.workload import ClosedLoop, TraceRequest, Workload

#: From the start of the generator to the start of the trace: time to make the first prompts.
_LEAD_S: Final = 0.2
#: A best-effort client that was refused waits this long before it sends its next request.
_BACK_OFF_S: Final = 1.0
#: How often it is looked whether the run has ended.
_POLL_S: Final = 0.1


@dataclass(slots=True)
class SentRecord(RequestRecord):
    """A request over HTTP."""

    #: When the last byte of its headers left; `None`: it was not sent. Seconds from the start of the trace.
    sent_s: float | None = None
    #: The server's `error_type`, or the kind of failure; empty: none.
    error_type: str = ""


@dataclass(frozen=True, slots=True)
class LiveLoad:
    """What a workload got."""

    #: In the order in which they were offered.
    records: list[SentRecord]
    #: When the run ended, in seconds from the start of the trace.
    end_s: float
    #: When the trace started, by `time.perf_counter`.
    start_s: float

    def lateness_s(self, percent: float) -> float | None:
        """A percentile, over the real-time requests, of the time from when each was due to when it left."""
        delays = [record.sent_s - record.offered_s for record in self.records if record.is_rt and record.sent_s]
        return percentile(delays, percent)


class LoadGenerator:
    """Sends one workload to one server."""

    def __init__(
        self, url: str, workload: Workload, seed: int = 0, on_progress: Callable[[float], None] | None = None
    ) -> None:
        """`seed` chooses the words of the prompts; `on_progress` gets the trace's time ten times a second."""
        self._url = url
        self._workload = workload
        self._prompts = random.Random(f"{seed}/prompts")
        self._on_progress = on_progress or (lambda now_s: None)
        #: What was sent so far.
        self.records: list[SentRecord] = []
        #: When the trace starts, by `time.perf_counter`.
        self.start_s = 0.0

    async def run(self) -> LiveLoad:
        """Send everything, and wait until the workload has ended. What has not ended by then is cut off."""
        rt_bodies = [self._body(request) for request in self._workload.rt]
        with _no_garbage_collection():
            async with open_session(self._tracing()) as session:
                self.start_s = time.perf_counter() + _LEAD_S
                await self._run(session, rt_bodies)
                end_s = self._now_s()
        return LiveLoad(sorted(self.records, key=lambda record: record.offered_s), end_s, self.start_s)

    async def _run(self, session: aiohttp.ClientSession, rt_bodies: list[bytes]) -> None:
        """Real-time requests decide when the run ends; best-effort ones keep the server busy until then."""
        workload = self._workload
        rt = asyncio.ensure_future(self._send_trace(session, workload.rt, rt_bodies))
        be = asyncio.ensure_future(self._send_be(session, workload.be))
        try:
            while (now_s := self._now_s()) < (workload.stop_s if rt.done() else workload.end_s):
                self._on_progress(now_s)
                for task in (rt, be):
                    if task.done():
                        task.result()  # raises what was a fault of ours
                await asyncio.sleep(_POLL_S)
        finally:
            rt.cancel()
            be.cancel()
            await asyncio.gather(rt, be, return_exceptions=True)

    async def _send_trace(
        self, session: aiohttp.ClientSession, requests: Sequence[TraceRequest], bodies: Sequence[bytes]
    ) -> None:
        """Each at its own time: none waits for another."""
        await asyncio.gather(*(self._send_at_its_time(session, *pair) for pair in zip(requests, bodies, strict=True)))

    async def _send_at_its_time(self, session: aiohttp.ClientSession, request: TraceRequest, body: bytes) -> None:
        await asyncio.sleep(request.arrival_s - self._now_s())
        await self._send(session, SentRecord(request, request.arrival_s), body)

    async def _send_be(self, session: aiohttp.ClientSession, be: ClosedLoop | tuple[TraceRequest, ...]) -> None:
        """A trace, or clients that each send the next request when their last one, or everybody's, has ended."""
        if not isinstance(be, ClosedLoop):
            await self._send_trace(session, be, [self._body(request) for request in be])
            return
        draws = be.draws()
        await asyncio.sleep(-self._now_s())
        while be.is_grouped:
            await asyncio.gather(*(self._send_next(session, draws) for _ in range(be.num_requests)))
        await asyncio.gather(*(self._send_for_ever(session, draws) for _ in range(be.num_requests)))

    async def _send_for_ever(self, session: aiohttp.ClientSession, draws: Iterator[tuple[int, int]]) -> None:
        while True:
            await self._send_next(session, draws)

    async def _send_next(self, session: aiohttp.ClientSession, draws: Iterator[tuple[int, int]]) -> None:
        now_s = self._now_s()
        request = TraceRequest(now_s, RequestClass.BE, *next(draws))
        record = SentRecord(request, now_s)
        await self._send(session, record, self._body(request))
        if record.ending is not Ending.FINISHED:
            await asyncio.sleep(_BACK_OFF_S)

    async def _send(self, session: aiohttp.ClientSession, record: SentRecord, body: bytes) -> None:
        """Send one request and write down how it went, whatever happens."""
        self.records.append(record)
        try:
            await stream_tokens(
                session,
                self._url,
                body,
                lambda: record.token_s.append(self._now_s()),
                _headers(record.request),
                trace_context=record,
            )
        except ReplyError as error:
            record.ending = Ending.REJECTED if error.is_overload else Ending.FAILED
            record.error_type = error.error_type or str(error.status)
        except (aiohttp.ClientError, OSError) as error:
            record.ending, record.error_type = Ending.FAILED, type(error).__name__
        else:
            is_whole = len(record.token_s) == record.request.num_output_tokens
            record.ending = Ending.FINISHED if is_whole else Ending.FAILED
            record.error_type = "" if is_whole else "incomplete"

    def _body(self, request: TraceRequest) -> bytes:
        return encode_body(random_prompt(request.num_prompt_tokens, self._prompts), request.num_output_tokens)

    def _now_s(self) -> float:
        """Seconds from the start of the trace; negative before it."""
        return time.perf_counter() - self.start_s

    def _tracing(self) -> aiohttp.TraceConfig:
        """Notes when a request really leaves: connecting to a busy server takes time too."""

        async def note(
            session: aiohttp.ClientSession, context: SimpleNamespace, _: aiohttp.TraceRequestHeadersSentParams
        ) -> None:
            context.trace_request_ctx.sent_s = self._now_s()

        config = aiohttp.TraceConfig()
        config.on_request_headers_sent.append(note)
        return config


def _headers(request: TraceRequest) -> dict[str, str]:
    headers = {"x-request-class": request.request_class.value}
    if request.ttft_s is not None:
        headers["x-slo-ttft-ms"] = f"{1000 * request.ttft_s:.10g}"
    if request.tpot_s is not None:
        headers["x-slo-tpot-ms"] = f"{1000 * request.tpot_s:.10g}"
    return headers


@contextlib.contextmanager
def _no_garbage_collection() -> Iterator[None]:
    """A collection in mid-run would delay every request that is due."""
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()
