"""Completions over HTTP: every byte of the replies in both dialects, several prompts, and what is refused."""

import asyncio
import json
import re

import pytest

from bros_router.config import ApiConfig
from bros_router.request import FinishReason, GenerationError

PREFIX = "Input validation error: "
STRICT = ApiConfig(strict_tgi=True)
USAGE = '"usage":{"prompt_tokens":3,"completion_tokens":2,"total_tokens":5}'


async def post(server, **fields):
    return await server.client.post("/v1/completions", json={"prompt": "Hi"} | fields)


async def text_of(response) -> str:
    """The body with `ID` and `TIME` for what differs from one reply to the next."""
    text = re.sub(r'"id":"cmpl-[0-9a-f]{32}"', '"id":"ID"', await response.text())
    return re.sub(r'"created":1[0-9]{9},', '"created":TIME,', text)


def events(*bodies: str) -> str:
    return "".join(f"data: {body}\n\n" for body in bodies)


async def test_every_byte_of_a_reply(serve, reply_of):
    for config, reply_id, finish_reason in ((ApiConfig(), "ID", "stop"), (STRICT, "", "stop_sequence")):
        server = await serve(config)
        server.engine.script = reply_of("Hello", " you", reason=FinishReason.STOP_SEQUENCE)
        response = await post(server, model="gpt-4o")
        assert (response.status, response.headers["content-type"]) == (200, "application/json")
        assert await text_of(response) == (
            f'{{"object":"text_completion","id":"{reply_id}","created":TIME,"model":"acme/tiny",'
            '"system_fingerprint":"0.1.0-native","choices":[{"index":0,"text":"Hello you","logprobs":null,'
            f'"finish_reason":"{finish_reason}"}}],{USAGE}}}'
        )


async def test_every_byte_of_a_stream(serve, reply_of):
    server = await serve()
    server.engine.script = reply_of("Hé", "</s>", reason=FinishReason.EOS_TOKEN)
    text = await text_of(await post(server, stream=True, stream_options={"include_usage": True}))
    names = '"model":"acme/tiny","system_fingerprint":"0.1.0-native"'
    head = '{"object":"text_completion","id":"ID","created":TIME,'
    assert text == events(
        f'{head}"choices":[{{"index":0,"text":"Hé","logprobs":null,"finish_reason":null}}],{names}}}',
        f'{head}{names},"choices":[{{"index":0,"text":"","logprobs":null,"finish_reason":"stop"}}],{USAGE}}}',
        f'{head}{names},"choices":[],{USAGE}}}',
        "[DONE]",
    )


async def test_every_byte_of_tgis_stream(serve, reply_of):
    server = await serve(STRICT)
    server.engine.script = reply_of("Hé", "</s>", reason=FinishReason.EOS_TOKEN)
    text = await text_of(await post(server, stream=True, stream_options={"include_usage": True}))
    names = '"model":"acme/tiny","system_fingerprint":"0.1.0-native"'
    head = '{"object":"text_completion","id":"","created":TIME,'
    assert text == events(
        f'{head}"choices":[{{"index":0,"text":"Hé","logprobs":null,"finish_reason":""}}],{names}}}',
        f'{head}{names},"choices":[{{"index":0,"text":"</s>","logprobs":null,"finish_reason":"eos_token"}}],{USAGE}}}',
        "[DONE]",
    )


async def test_special_tokens_are_added_to_texts_and_not_to_tokens(serve, byte_level_tokenizer):
    server = await serve()
    ids = byte_level_tokenizer.encode("Hi").ids
    await post(server, prompt="Hi")
    assert server.engine.requests[-1].prompt_token_ids == tuple(ids)
    assert ids[0] == 0
    response = await post(server, prompt=ids[1:])
    assert response.headers["x-prompt-tokens"] == response.headers["x-compute-characters"] == "2"
    assert server.engine.requests[-1].prompt_token_ids == tuple(ids[1:])


# --- several prompts


async def test_each_prompt_is_a_request_of_its_own_and_all_are_one_reply(serve):
    server = await serve()
    response = await post(server, prompt=["a", "bc", "d"])
    reply = await response.json()
    assert [(choice["index"], choice["text"]) for choice in reply["choices"]] == [
        (0, "Hello world"),
        (1, "Hello world"),
        (2, "Hello world"),
    ]
    assert [len(request.prompt_token_ids) for request in server.engine.requests] == [2, 3, 2]
    assert reply["usage"] == {"prompt_tokens": 7, "completion_tokens": 6, "total_tokens": 13}
    assert response.headers["x-compute-characters"] == "4"
    assert response.headers["x-prompt-tokens"] == "7"
    assert response.headers["x-generated-tokens"] == "6"
    assert response.headers["x-inference-time"] == "750"
    assert "x-compute-time" not in response.headers
    assert "tgi_request_success 3.0" in await server.metric_lines()


class Scripts:
    """Scripts of an engine, one a request as they come: with one validation worker, in the order of the prompts."""

    def __init__(self, *scripts):
        self._scripts = iter(scripts)

    def __iter__(self):
        return iter(next(self._scripts))


async def test_tgis_choices_come_as_they_finish_and_ours_as_they_were_asked_for(serve, reply_of):
    for is_strict, expected in ((True, [1, 0]), (False, [0, 1])):
        server = await serve(ApiConfig(strict_tgi=is_strict, validation_workers=1))
        is_second_done = asyncio.Event()
        second = reply_of("second")

        def release(done=is_second_done, events=second):
            yield from events
            done.set()

        server.engine.script = Scripts([is_second_done, *reply_of("first")], release())
        choices = (await (await post(server, prompt=["a", "b"])).json())["choices"]
        assert [choice["index"] for choice in choices] == expected
        assert {choice["index"]: choice["text"] for choice in choices} == {0: "first", 1: "second"}


async def test_prompts_share_a_stream(serve, reply_of):
    server = await serve(ApiConfig(validation_workers=1))
    server.engine.script = Scripts(reply_of("a", "b"), reply_of("c", "d", "e"))
    response = await post(server, prompt=["x", "yz"], stream=True, stream_options={"include_usage": True})
    assert response.headers["x-compute-characters"] == "3"
    *frames, done, end = (await response.text()).split("\n\n")
    assert (done, end) == ("data: [DONE]", "")
    bodies = [json.loads(frame.removeprefix("data: ")) for frame in frames]
    assert len({body["id"] for body in bodies}) == 1
    *bodies, last = bodies
    texts = {0: "", 1: ""}
    for body in bodies:
        (choice,) = body["choices"]
        texts[choice["index"]] += choice["text"]
        assert (choice["finish_reason"] is None) is ("usage" not in body)
    assert texts == {0: "ab", 1: "cde"}
    assert (last["choices"], last["usage"]) == (
        [],
        {"prompt_tokens": 5, "completion_tokens": 5, "total_tokens": 10},
    )


async def test_a_prompt_that_fails_amid_a_stream_leaves_the_others_alone(serve, reply_of):
    server = await serve()
    server.engine.script = Scripts([GenerationError("no more")], reply_of("c", "d"))
    text = await (await post(server, prompt=["x", "y"], stream=True)).text()
    failure = '{"error":{"message":"Request failed during generation: no more","http_status_code":422}}'
    assert text.count(f"data: {failure}\n\n") == 1
    assert '"text":"c"' in text
    assert '"text":"d"' in text
    assert text.endswith("data: [DONE]\n\n")
    assert server.engine.num_running == 0


async def test_a_prompt_that_fails_without_a_stream_fails_the_request_and_ends_the_others(serve):
    server = await serve()
    server.engine.script = Scripts([asyncio.Event()], [GenerationError("no more")])
    response = await post(server, prompt=["x", "y"])
    assert (response.status, (await response.json())["error_type"]) == (424, "generation")
    assert server.engine.num_running == 0


async def test_each_prompt_takes_a_permit(serve):
    server = await serve(ApiConfig(max_concurrent_requests=1))
    assert (await post(server, prompt=["x", "y"])).status == 429
    assert (await post(server, prompt=["x"])).status == 200
    assert server.engine.num_running == 0


async def test_a_client_that_leaves_ends_every_prompt(serve, reply_of):
    server = await serve()
    server.engine.script = [*reply_of("Hello", "!")[:1], asyncio.Event()]
    body = b'{"prompt":["a","b","c"],"stream":true}'
    reader, writer = await asyncio.open_connection("127.0.0.1", server.client.port)
    writer.write(
        b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
        b"Content-Length: %d\r\n\r\n%s" % (len(body), body)
    )
    for _ in range(3):
        await reader.readuntil(b"Hello")
    assert server.engine.num_running == 3
    writer.close()

    async def until_all_ended():
        while server.engine.num_running:
            await asyncio.sleep(0)

    await asyncio.wait_for(until_all_ended(), 5)


# --- refusals


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("config", [ApiConfig(), STRICT])
@pytest.mark.parametrize(
    ("fields", "error", "error_type"),
    [
        (
            {"suffix": ""},
            "Suffix is not supported and can be achieved by preprocessing the prompt.",
            "suffix not supported",
        ),
        (
            {"prompt": ["a"] * 5},
            "Number of prompts exceeds the maximum allowed batch size of 4",
            "batch size exceeded",
        ),
        (
            {"prompt": ["a"] * 5, "suffix": "x"},
            "Suffix is not supported and can be achieved by preprocessing the prompt.",
            "suffix not supported",
        ),
    ],
)
async def test_what_is_told_by_the_status(serve, config, stream, fields, error, error_type):
    server = await serve(config)
    response = await post(server, stream=stream, **fields)
    assert (response.status, await response.json()) == (422, {"error": error, "error_type": error_type})
    assert 'tgi_request_failure{err="validation"} 1.0' in await server.metric_lines()
    assert server.engine.requests == []


async def test_a_long_list_of_tokens_is_one_prompt(serve):
    server = await serve()
    assert (await post(server, prompt=[5] * 40)).status == 200
    assert (await post(server, prompt=[[5]] * 5)).status == 422


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        ("", "`inputs` cannot be empty"),
        ([[]], "`inputs` cannot be empty"),
        ([300], "token ids must be < 300. Given: 300"),
        ([1, 2**32 - 1], "token ids must be < 300. Given: 4294967295"),
        ([5] * 61, "`inputs` must have less than 60 tokens. Given: 61"),
    ],
)
async def test_prompts_are_judged_as_those_of_tgis_own_routes(serve, prompt, message):
    server = await serve()
    response = await post(server, prompt=prompt)
    assert (response.status, await response.json()) == (422, {"error": PREFIX + message, "error_type": "validation"})
    stream = await post(server, prompt=prompt, stream=True)
    assert await stream.text() == events(
        f'{{"error":{{"message":"{PREFIX}{message}","http_status_code":422}}}}', "[DONE]"
    )


async def test_odd_texts_are_literal(serve, byte_level_tokenizer):
    server = await serve()
    await post(server, prompt="a\0b </s>")
    assert server.engine.requests[-1].prompt_token_ids == tuple(byte_level_tokenizer.encode("a\0b </s>").ids)
