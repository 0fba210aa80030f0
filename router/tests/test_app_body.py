"""Request bodies on the wire: type, size, time and framing, each refused in TGI's words."""

import asyncio
import gzip

import pytest
from structlog.testing import capture_logs

from bros_router.api.call import Timeouts
from bros_router.config import ApiConfig

JSON = {"content-type": "application/json"}
UNTYPED = "Expected request with `Content-Type: application/json`"
TOO_LARGE = "Failed to buffer the request body: length limit exceeded"
HEAD = b"POST /generate HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
TGI_ROUTES = ["/", "/generate", "/generate_stream", "/tokenize"]
BODY_ROUTES = [*TGI_ROUTES, "/v1/chat/completions", "/v1/completions", "/chat_tokenize"]


async def told(response) -> tuple[int, str, str]:
    return response.status, response.headers["content-type"], await response.text()


def plain(status: int, text: str) -> tuple[int, str, str]:
    return status, "text/plain; charset=utf-8", text


@pytest.mark.parametrize(
    "content_type", ["application/json", "Application/JSON; charset=latin-1", "application/vnd.acme+json"]
)
async def test_json_by_any_name_is_read(serve, content_type):
    server = await serve()
    response = await server.client.post("/generate", data=b'{"inputs":"x"}', headers={"content-type": content_type})
    assert response.status == 200


@pytest.mark.parametrize(
    "content_type", ["text/plain", "application/jsonx", "text/json", "json", "multipart/form-data"]
)
@pytest.mark.parametrize("path", BODY_ROUTES)
async def test_another_type_is_415(serve, path, content_type):
    server = await serve()
    response = await server.client.post(path, data=b'{"inputs":"x"}', headers={"content-type": content_type})
    assert await told(response) == plain(415, UNTYPED)


async def test_no_type_is_415(serve):
    server = await serve()
    response = await server.client.post("/generate", data=b'{"inputs":"x"}', skip_auto_headers=["content-type"])
    assert await told(response) == plain(415, UNTYPED)


@pytest.mark.parametrize("path", TGI_ROUTES)
async def test_what_is_wrong_with_a_body_is_plain_text_with_a_real_status(serve, path):
    server = await serve()
    syntax = await server.client.post(path, data=b'{"inputs":', headers=JSON)
    assert await told(syntax) == plain(400, "Failed to parse the request body as JSON: Input data was truncated")
    shape = await server.client.post(path, data=b'{"inputs":1}', headers=JSON)
    reason = "inputs: Expected `str`, got `int`"
    assert await told(shape) == plain(422, f"Failed to deserialize the JSON body into the target type: {reason}")
    assert not [line for line in await server.metric_lines() if line.startswith("tgi_request_count")]


async def chunks(size: int):
    for _ in range(10):
        yield b" " * (size // 10)


@pytest.mark.parametrize("path", BODY_ROUTES)
async def test_a_body_beyond_the_limit_is_413(serve, path):
    server = await serve(ApiConfig(payload_limit=1000))
    declared = await server.client.post(path, data=b" " * 1001, headers=JSON)
    assert await told(declared) == plain(413, TOO_LARGE)
    undeclared = await server.client.post(path, data=chunks(2000), headers=JSON)
    assert await told(undeclared) == plain(413, TOO_LARGE)


async def test_a_body_at_the_limit_is_read(serve):
    server = await serve(ApiConfig(payload_limit=1000))
    body = b'{"inputs":"x"}'.ljust(1000)
    assert (await server.client.post("/generate", data=body, headers=JSON)).status == 200


async def test_the_declared_size_is_enough_to_refuse(serve):
    """Nothing of the body was sent, and nothing of it is waited for."""
    server = await serve(ApiConfig(payload_limit=1000))
    answer = await server.exchange(HEAD + b"Content-Length: 9999999\r\n\r\n", end=TOO_LARGE.encode())
    assert answer.startswith(b"HTTP/1.1 413 ")


async def test_the_type_is_judged_before_size_and_syntax(serve):
    server = await serve(ApiConfig(payload_limit=10))
    response = await server.client.post("/generate", data=b"{" * 100, headers={"content-type": "text/plain"})
    assert await told(response) == plain(415, UNTYPED)


@pytest.mark.parametrize("encoding", ["gzip", "deflate", "br", "zstd"])
async def test_compressed_bodies_are_refused_unread(serve, encoding):
    server = await serve()
    bomb = gzip.compress(b" " * 10_000_000)
    response = await server.client.post("/generate", data=bomb, headers=JSON | {"content-encoding": encoding})
    assert await told(response) == plain(415, "Expected request without `Content-Encoding`")


async def test_a_body_that_does_not_arrive_is_408(serve):
    server = await serve(timeouts=Timeouts(body_s=0.05))
    answer = await server.exchange(HEAD + b"Content-Length: 14\r\n\r\n{", end=b"}")
    head, _, body = answer.partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 408 ")
    assert b"\r\nConnection: close" in head
    assert body == b'{"error":"Request body was not received in time","error_type":"timeout"}'


async def test_what_is_not_http_is_400_and_no_news(serve, caplog):
    server = await serve()
    assert b" 400 " in await server.exchange(b"BREW /generate HTTP/1.1\r\n\r\n", end=b"\r\n")
    assert b" 400 " in await server.exchange(HEAD + b"Transfer-Encoding: chunked\r\n\r\nmany", end=b"\r\n")
    assert caplog.records == []


async def test_framing_that_breaks_amid_a_body_is_a_body_that_does_not_arrive(serve):
    server = await serve(timeouts=Timeouts(body_s=0.05))
    reader, writer = await asyncio.open_connection("127.0.0.1", server.client.port)
    writer.write(HEAD + b"Transfer-Encoding: chunked\r\nExpect: 100-continue\r\n\r\n1\r\n{\r\n")
    assert await reader.readuntil(b"\r\n\r\n") == b"HTTP/1.1 100 Continue\r\n\r\n"
    writer.write(b"many\r\n")
    assert b" 408 " in await reader.readline()
    writer.close()


@pytest.mark.parametrize("framing", [b"Content-Length: 14\r\n\r\n{", b"Transfer-Encoding: chunked\r\n\r\n5\r\n{"])
async def test_a_client_that_leaves_amid_its_body_leaves_nothing_behind(serve, caplog, framing):
    server = await serve(ApiConfig(max_concurrent_requests=1))
    with capture_logs() as logs:
        for _ in range(3):
            _, writer = await asyncio.open_connection("127.0.0.1", server.client.port)
            writer.write(HEAD + framing)
            await writer.drain()
            writer.close()
        assert (await server.client.post("/generate", json={"inputs": "x"})).status == 200
    assert (logs, caplog.records) == ([], [])
