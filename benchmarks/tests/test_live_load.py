"""The load generator against servers whose true behaviour is known, because they are ours."""

import asyncio
import json
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass, field

import pytest
from aiohttp import web
from aiohttp.test_utils import TestServer

from bros_benchmarks.evaluation.live_load import LoadGenerator
from bros_router.request import RequestClass
from bros_router.simulation.record import Ending
from bros_router.simulation.workload import ClosedLoop, Lengths, TraceRequest, Uniform, Workload

FIVE_TOKENS = Lengths("test", Uniform(5, 5), Uniform(2, 2), 100)


@dataclass
class Arrival:
    """A request as the server saw it. Both sides read the same clock, `time.perf_counter`."""

    arrived_s: float
    headers: dict[str, str]
    inputs: str
    parameters: dict[str, object]
    written_s: list[float] = field(default_factory=list)

    @property
    def request_class(self) -> str:
        return self.headers["x-request-class"]


Behaviour = Callable[["Server", Arrival, web.StreamResponse], Awaitable[None]]


@dataclass
class Server:
    """Answers `/generate_stream` as `behave` says, and remembers everything."""

    behave: Behaviour
    url: str = ""
    arrivals: list[Arrival] = field(default_factory=list)
    num_running: int = 0
    peak: int = 0

    async def handle(self, request: web.Request) -> web.StreamResponse:
        body = await request.json()
        arrival = Arrival(time.perf_counter(), dict(request.headers), body["inputs"], body["parameters"])
        self.arrivals.append(arrival)
        self.num_running += 1
        self.peak = max(self.peak, self.num_running)
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
        try:
            await response.prepare(request)
            await self.behave(self, arrival, response)
        finally:
            self.num_running -= 1
        return response


StartServer = Callable[[Behaviour], Awaitable[Server]]


@pytest.fixture
async def start() -> AsyncIterator[StartServer]:
    running: list[TestServer] = []

    async def start_server(behave: Behaviour) -> Server:
        server = Server(behave)
        app = web.Application()
        app.router.add_post("/generate_stream", server.handle)
        test_server = TestServer(app)
        await test_server.start_server()
        running.append(test_server)
        server.url = str(test_server.make_url("")).rstrip("/")
        return server

    yield start_server
    for test_server in running:
        await test_server.close()


async def write_token(arrival: Arrival, response: web.StreamResponse) -> None:
    arrival.written_s.append(time.perf_counter())
    event = {"index": len(arrival.written_s), "token": {"id": 5, "text": ' "error_type": data:', "logprob": -1.0}}
    await response.write(b"data:" + json.dumps(event).encode() + b"\n\n")


async def answer(server: Server, arrival: Arrival, response: web.StreamResponse) -> None:
    for _ in range(int(str(arrival.parameters["max_new_tokens"]))):
        await write_token(arrival, response)


def rt(arrival_s: float, **how: float) -> TraceRequest:
    return TraceRequest(arrival_s, RequestClass.RT, 5, 3, **how)


async def test_a_stalled_server_delays_no_request_and_every_latency_counts_from_the_intended_time(
    start: StartServer,
) -> None:
    """The server answers nobody until all have arrived: a generator that waited for replies would wait for ever."""
    trace = tuple(rt(0.02 * index) for index in range(8))
    all_here = asyncio.Event()

    async def stall(server: Server, arrival: Arrival, response: web.StreamResponse) -> None:
        if len(server.arrivals) == len(trace):
            all_here.set()
        await all_here.wait()
        await answer(server, arrival, response)

    server = await start(stall)
    generator = LoadGenerator(server.url, Workload(trace, (), duration_s=0.2, warm_up_s=0.0, drain_s=20.0))
    load = await generator.run()
    assert [record.ending for record in load.records] == [Ending.FINISHED] * len(trace)
    assert [record.offered_s for record in load.records] == [request.arrival_s for request in trace]
    released_s = max(arrival.arrived_s for arrival in server.arrivals) - generator.start_s
    for record in load.records:
        assert record.ttft_s is not None
        assert record.ttft_s >= released_s - record.offered_s  # all of the stall


async def test_a_token_is_seen_after_the_server_wrote_it_and_before_it_wrote_the_next_one(start: StartServer) -> None:
    """The server writes a token only when the client's record holds the one before."""

    async def step_by_step(server: Server, arrival: Arrival, response: web.StreamResponse) -> None:
        for index in range(3):
            while len(generator.records[0].token_s) < index:
                await asyncio.sleep(0)
            await write_token(arrival, response)

    server = await start(step_by_step)
    generator = LoadGenerator(server.url, Workload((rt(0.0),), (), duration_s=0.0, warm_up_s=0.0, drain_s=20.0))
    load = await generator.run()
    [record], [arrival] = load.records, server.arrivals
    written_s = [time_s - generator.start_s for time_s in arrival.written_s]
    moments = [moment for pair in zip(written_s, record.token_s, strict=True) for moment in pair]
    assert moments == sorted(moments)
    assert record.sent_s is not None and 0.0 <= record.sent_s <= arrival.arrived_s - generator.start_s


async def test_a_late_generator_keeps_the_intended_times_and_says_how_late_it_was(start: StartServer) -> None:
    """Something blocks the generator's own loop while requests are due."""
    server = await start(answer)
    blocked: list[float] = []

    def block_once(now_s: float) -> None:
        if now_s >= 0 and not blocked:
            time.sleep(0.3)
            blocked.extend((now_s, time.perf_counter() - generator.start_s))

    trace = tuple(rt(0.02 * index) for index in range(40))
    workload = Workload(trace, (), duration_s=0.8, warm_up_s=0.0, drain_s=20.0)
    generator = LoadGenerator(server.url, workload, on_progress=block_once)
    load = await generator.run()
    assert [record.offered_s for record in load.records] == [request.arrival_s for request in trace]
    start_s, stop_s = blocked
    late = [record for record in load.records if start_s < record.offered_s < stop_s]
    assert late
    for record in late:
        assert record.sent_s is not None and record.sent_s >= stop_s
        assert record.ttft_s is not None and record.ttft_s >= stop_s - record.offered_s
    largest_s = load.lateness_s(100)
    assert largest_s is not None and largest_s >= stop_s - late[0].offered_s


async def test_the_request_is_what_the_trace_says(start: StartServer) -> None:
    server = await start(answer)
    trace = (rt(0.0, ttft_s=0.25, tpot_s=0.0125), TraceRequest(0.01, RequestClass.RT, 40, 7))
    await LoadGenerator(server.url, Workload(trace, (), duration_s=0.1, warm_up_s=0.0)).run()
    first, second = server.arrivals
    assert first.headers["x-slo-ttft-ms"] == "250"
    assert first.headers["x-slo-tpot-ms"] == "12.5"
    assert first.request_class == second.request_class == "rt"
    assert "x-slo-ttft-ms" not in second.headers
    assert [len(arrival.inputs.split()) for arrival in (first, second)] == [5, 40]
    assert second.parameters == {"max_new_tokens": 7, "ignore_eos": True, "do_sample": False}


async def test_prompts_depend_on_the_seed_alone(start: StartServer) -> None:
    server = await start(answer)
    workload = Workload((rt(0.0), rt(0.03)), (), duration_s=0.1, warm_up_s=0.0)
    for seed in (1, 1, 2):
        await LoadGenerator(server.url, workload, seed).run()
    prompts = [arrival.inputs for arrival in server.arrivals]
    assert prompts[:2] == prompts[2:4]
    assert len(set(prompts)) == 4


@pytest.mark.parametrize(
    ("reply", "ending", "error_type"),
    [
        (b'data: {"error":"Model is overloaded","error_type":"overloaded"}\n\n', Ending.REJECTED, "overloaded"),
        (b'data: {"error":"no","error_type":"slo_infeasible"}\n\n', Ending.REJECTED, "slo_infeasible"),
        (b'data: {"error":"broken","error_type":"generation"}\n\n', Ending.FAILED, "generation"),
        (b"", Ending.FAILED, "incomplete"),
        (b":\n\n", Ending.FAILED, "incomplete"),
    ],
)
async def test_what_is_not_a_whole_reply_is_recorded_as_what_it_is(
    start: StartServer, reply: bytes, ending: Ending, error_type: str
) -> None:
    async def behave(server: Server, arrival: Arrival, response: web.StreamResponse) -> None:
        await response.write(reply)

    server = await start(behave)
    load = await LoadGenerator(server.url, Workload((rt(0.0),), (), duration_s=0.0, warm_up_s=0.0)).run()
    [record] = load.records
    assert (record.ending, record.error_type, list(record.token_s)) == (ending, error_type, [])


async def test_a_real_status_counts_as_well_as_an_event(start: StartServer) -> None:
    server = TestServer(web.Application())

    async def refuse(request: web.Request) -> web.Response:
        return web.json_response({"error": "Model is overloaded", "error_type": "overloaded"}, status=429)

    server.app.router.add_post("/generate_stream", refuse)
    async with server:
        url = str(server.make_url("")).rstrip("/")
        load = await LoadGenerator(url, Workload((rt(0.0),), (), duration_s=0.0, warm_up_s=0.0)).run()
    assert [record.ending for record in load.records] == [Ending.REJECTED]


async def test_a_reply_that_breaks_off_keeps_its_tokens_and_counts_as_failed(start: StartServer) -> None:
    async def behave(server: Server, arrival: Arrival, response: web.StreamResponse) -> None:
        await write_token(arrival, response)
        await write_token(arrival, response)

    server = await start(behave)
    load = await LoadGenerator(server.url, Workload((rt(0.0),), (), duration_s=0.0, warm_up_s=0.0)).run()
    [record] = load.records
    assert (record.ending, record.error_type, len(record.token_s)) == (Ending.FAILED, "incomplete", 2)


async def test_nobody_there_is_a_failure_of_every_request() -> None:
    workload = Workload((rt(0.0), rt(0.01)), (), duration_s=0.0, warm_up_s=0.0)
    load = await LoadGenerator("http://127.0.0.1:9", workload).run()
    assert [record.ending for record in load.records] == [Ending.FAILED] * 2
    assert {record.error_type for record in load.records} == {"ClientConnectorError"}


async def test_a_closed_loop_keeps_exactly_its_number_in_the_system(start: StartServer) -> None:
    async def behave(server: Server, arrival: Arrival, response: web.StreamResponse) -> None:
        await asyncio.sleep(0.01)
        await answer(server, arrival, response)

    server = await start(behave)
    workload = Workload((), ClosedLoop(4, FIVE_TOKENS), duration_s=0.3, warm_up_s=0.0)
    load = await LoadGenerator(server.url, workload).run()
    assert server.peak == 4
    assert len(load.records) > 8
    endings = [record.ending for record in load.records]
    assert endings.count(Ending.UNFINISHED) <= 4
    assert set(endings) <= {Ending.FINISHED, Ending.UNFINISHED}
    assert {arrival.request_class for arrival in server.arrivals} == {"be"}


async def test_a_grouped_closed_loop_starts_the_next_group_when_the_last_of_this_one_has_ended(
    start: StartServer,
) -> None:
    running_at_arrival: list[int] = []

    async def behave(server: Server, arrival: Arrival, response: web.StreamResponse) -> None:
        running_at_arrival.append(server.num_running)
        group = 3 * ((len(running_at_arrival) + 2) // 3)
        while len(running_at_arrival) < group:
            await asyncio.sleep(0)  # the whole group is here before anybody leaves
        await answer(server, arrival, response)

    server = await start(behave)
    workload = Workload((), ClosedLoop(3, FIVE_TOKENS, is_grouped=True), duration_s=0.3, warm_up_s=0.0)
    await LoadGenerator(server.url, workload).run()
    whole = running_at_arrival[: len(running_at_arrival) // 3 * 3]
    assert whole and whole == [1, 2, 3] * (len(whole) // 3)


async def test_best_effort_work_goes_on_until_the_last_real_time_request_has_ended(start: StartServer) -> None:
    late = asyncio.Event()

    async def behave(server: Server, arrival: Arrival, response: web.StreamResponse) -> None:
        if arrival.request_class == "rt":
            await late.wait()
        elif len(server.arrivals) > 20:  # well after the window, since each best-effort request takes 50 ms
            late.set()
        else:
            await asyncio.sleep(0.05)
        await answer(server, arrival, response)

    server = await start(behave)
    workload = Workload((rt(0.0),), ClosedLoop(1, FIVE_TOKENS), duration_s=0.1, warm_up_s=0.0, drain_s=30.0)
    load = await LoadGenerator(server.url, workload).run()
    assert [record.ending for record in load.records if record.is_rt] == [Ending.FINISHED]
    assert late.is_set()


async def test_what_has_not_ended_at_the_end_is_unfinished(start: StartServer) -> None:
    async def behave(server: Server, arrival: Arrival, response: web.StreamResponse) -> None:
        await write_token(arrival, response)
        await asyncio.Event().wait()

    server = await start(behave)
    dump = tuple(TraceRequest(0.0, RequestClass.BE, 5, 3) for _ in range(3))
    load = await LoadGenerator(server.url, Workload((rt(0.0),), dump, 0.1, warm_up_s=0.0, drain_s=0.2)).run()
    assert [(record.ending, len(record.token_s)) for record in load.records] == [(Ending.UNFINISHED, 1)] * 4
