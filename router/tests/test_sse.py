"""Streams: every byte of them, what keeps them alive, and what ends them."""

import asyncio
import itertools
import socket

import pytest

from bros_router.api.call import Timeouts
from bros_router.config import ApiConfig
from bros_router.request import FinishReason, GenerationError, ServiceUnavailableError

REQUEST = (
    b"POST /generate_stream HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
    b'Content-Length: 14\r\n\r\n{"inputs":"x"}'
)


async def test_every_byte_of_a_stream(serve, reply_of):
    server = await serve()
    server.engine.script = reply_of("Hé", "", "</s>", reason=FinishReason.EOS_TOKEN)
    body = {"inputs": "xx", "parameters": {"details": True, "do_sample": True, "seed": 7}}
    response = await server.client.post("/generate_stream", json=body)
    assert response.status == 200
    assert (
        await response.read()
        == (
            'data: {"index":1,"token":{"id":10,"text":"Hé","logprob":-0.5,"special":false},'
            '"generated_text":null,"details":null}\n\n'
            'data: {"index":2,"token":{"id":11,"text":"","logprob":-0.5,"special":false},'
            '"generated_text":null,"details":null}\n\n'
            'data: {"index":3,"token":{"id":1,"text":"</s>","logprob":-0.125,"special":true},'
            '"generated_text":"Hé","details":'
            '{"finish_reason":"eos_token","generated_tokens":3,"seed":7,"input_length":3}}\n\n'
        ).encode()
    )


async def test_details_are_null_where_not_asked_for(serve):
    server = await serve()
    text = await (await server.client.post("/generate_stream", json={"inputs": "x"})).text()
    assert text.endswith('"generated_text":"Hello world","details":null}\n\n')


async def test_line_ends_in_text_do_not_end_the_line(serve, reply_of):
    server = await serve()
    server.engine.script = reply_of("a\nb\r\n\n", "\u2028")
    text = await (await server.client.post("/generate_stream", json={"inputs": "x"})).text()
    assert text.count("\n") == 4
    assert '"text":"a\\nb\\r\\n\\n"' in text


async def test_headers_of_a_stream(serve):
    server = await serve()
    response = await server.client.post("/generate_stream", json={"inputs": "hé🙂"})
    headers = {name.lower(): value for name, value in response.headers.items()}
    del headers["date"]
    assert headers == {
        "content-type": "text/event-stream",
        "cache-control": "no-cache",
        "x-accel-buffering": "no",
        "x-compute-type": "1-cpu",
        "x-compute-characters": "3",
        "x-request-class": "rt",
        "access-control-allow-origin": "*",
        "vary": "origin, access-control-request-method, access-control-request-headers",
        "transfer-encoding": "chunked",
    }


@pytest.mark.parametrize(
    ("error", "event"),
    [
        (
            GenerationError("no more"),
            b'{"error":"Request failed during generation: no more","error_type":"generation"}',
        ),
        (None, b'{"error":"Incomplete generation stream","error_type":"incomplete_generation_stream"}'),
        (RuntimeError("/secret"), b'{"error":"Internal server error","error_type":"internal"}'),
    ],
)
async def test_failures_amid_a_stream_are_its_last_event(serve, reply_of, error, event):
    server = await serve()
    first = reply_of("Hello", "!")[0]
    server.engine.script = [first] if error is None else [first, error]
    response = await server.client.post("/generate_stream", json={"inputs": "x"})
    assert response.status == 200
    first_event, last_event, end = (await response.read()).split(b"\n\n")
    assert first_event.startswith(b'data: {"index":1,')
    assert (last_event, end) == (b"data: " + event, b"")
    assert server.engine.num_running == 0


async def test_the_head_of_a_stream_waits_for_admission(serve):
    """The headers say on which terms the request was accepted; those of a refusal say none."""
    server = await serve()
    headers = {"x-slo-ttft-ms": "400"}
    accepted = await server.client.post("/generate_stream", json={"inputs": "x"}, headers=headers)
    refused = await server.client.post("/generate_stream", json={"inputs": ""}, headers=headers)
    for response in (accepted, refused):
        assert (response.status, response.headers["x-request-class"]) == (200, "rt")
        assert (response.headers["content-type"], response.headers["x-compute-type"]) == ("text/event-stream", "1-cpu")
    assert accepted.headers["x-slo-ttft-ms"] == "400"
    assert "x-slo-ttft-ms" not in refused.headers


@pytest.mark.parametrize("path", ["/generate_stream", "/"])
async def test_refusals_come_within_the_stream(serve, path):
    server = await serve()
    response = await server.client.post(path, json={"inputs": "", "stream": True})
    assert (response.status, response.headers["content-type"]) == (200, "text/event-stream")
    assert await response.read() == (
        b'data: {"error":"Input validation error: `inputs` cannot be empty","error_type":"validation"}\n\n'
    )
    server.engine.refusal = ServiceUnavailableError()
    response = await server.client.post(path, json={"inputs": "x", "stream": True})
    assert await response.read() == b'data: {"error":"The model is restarting","error_type":"healthcheck"}\n\n'


async def test_the_head_does_not_wait_for_the_first_token(serve):
    server = await serve()
    server.engine.script = [asyncio.Event()]
    head = await server.exchange(REQUEST, end=b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 200 OK\r\n")


async def test_silence_is_filled_with_comments(serve, reply_of):
    server = await serve(timeouts=Timeouts(keep_alive_s=0.01))
    go_on = asyncio.Event()
    first, last = reply_of("Hello", "!")
    server.engine.script = [first, go_on, last]
    reader, writer = await asyncio.open_connection("127.0.0.1", server.client.port)
    writer.write(REQUEST)
    await reader.readuntil(b'"details":null}\n\n\r\n')
    for _ in range(3):
        assert await reader.readuntil(b"3\r\n:\n\n\r\n") == b"3\r\n:\n\n\r\n"
    go_on.set()
    rest = await reader.readuntil(b"0\r\n\r\n")
    assert b'data: {"index":2,' in rest
    writer.close()


async def test_a_client_that_leaves_ends_its_generation(serve, reply_of, caplog):
    server = await serve(ApiConfig(max_concurrent_requests=1))
    server.engine.script = [reply_of("Hello", "!")[0], asyncio.Event()]
    await server.exchange(REQUEST, end=b"\n\n")
    await asyncio.wait_for(server.engine.ended.wait(), 5)
    assert server.engine.num_running == 0
    server.engine.script = reply_of("Hello")
    response = await server.client.post("/generate_stream", json={"inputs": "x"})
    assert b"error" not in await response.read()
    assert caplog.records == []


async def test_a_client_that_does_not_read_is_given_up(serve, reply_of, caplog):
    server = await serve(timeouts=Timeouts(write_s=0.05))
    server.engine.script = itertools.repeat(reply_of("x" * 100_000, "!")[0])
    with socket.socket() as client:
        client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        client.setblocking(False)
        loop = asyncio.get_running_loop()
        await loop.sock_connect(client, ("127.0.0.1", server.client.port))
        await loop.sock_sendall(client, REQUEST)
        await asyncio.wait_for(server.engine.ended.wait(), 10)
    assert server.engine.num_running == 0
    assert caplog.records == []


async def test_streams_do_not_wait_for_each_other(serve, reply_of):
    """One that is stuck behind its reader leaves the others alone."""
    server = await serve()
    stuck = itertools.repeat(reply_of("x" * 100_000, "!")[0])
    server.engine.script = stuck
    with socket.socket() as client:
        client.setblocking(False)
        loop = asyncio.get_running_loop()
        await loop.sock_connect(client, ("127.0.0.1", server.client.port))
        await loop.sock_sendall(client, REQUEST)
        await server.engine.started.wait()
        server.engine.script = reply_of("Hello")
        response = await server.client.post("/generate_stream", json={"inputs": "x"})
        assert b'"generated_text":"Hello"' in await response.read()
        assert server.engine.num_running == 1


async def test_old_clients_get_a_stream_that_ends_with_the_connection(serve):
    server = await serve()
    answer = await server.exchange(REQUEST.replace(b"HTTP/1.1", b"HTTP/1.0"))
    head, _, body = answer.partition(b"\r\n\r\n")
    assert b"chunked" not in head.lower()
    assert body.startswith(b'data: {"index":1,')
    assert body.endswith(b'"details":null}\n\n')
