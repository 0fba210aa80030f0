"""Chats over HTTP: every byte of the replies in both dialects, and what goes wrong before and amid them."""

import asyncio
import json
import re

import pytest

from bros_router.chat_templates.source import ChatTemplate
from bros_router.config import ApiConfig
from bros_router.request import FinishReason, GenerationError, RequestClass

PATH = "/v1/chat/completions"
HI = [{"role": "user", "content": "Hi"}]
PREFIX = "Input validation error: "
STRICT = ApiConfig(strict_tgi=True)
#: Written out but for what differs from one reply to the next.
HEAD = '"id":"ID","created":TIME,"model":"acme/tiny","system_fingerprint":"0.1.0-native"'
TGI_HEAD = HEAD.replace("ID", "")


async def post(server, path=PATH, headers=None, **fields):
    return await server.client.post(path, json={"messages": HI} | fields, headers=headers)


async def text_of(response) -> str:
    """The body with `ID` and `TIME` for what differs from one reply to the next."""
    text = re.sub(r'"id":"chatcmpl-[0-9a-f]{32}"', '"id":"ID"', await response.text())
    return re.sub(r'"created":1[0-9]{9},', '"created":TIME,', text)


def events(*bodies: str) -> str:
    return "".join(f"data: {body}\n\n" for body in bodies)


# --- whole replies


async def test_every_byte_of_a_reply(serve, reply_of):
    server = await serve()
    server.engine.script = reply_of("Hello", "</s>", reason=FinishReason.EOS_TOKEN)
    response = await post(server)
    assert (response.status, response.headers["content-type"]) == (200, "application/json")
    assert await text_of(response) == (
        f'{{"object":"chat.completion",{HEAD},"choices":[{{"index":0,"message":{{"role":"assistant",'
        '"content":"Hello"},"logprobs":null,"finish_reason":"stop"}],'
        '"usage":{"prompt_tokens":20,"completion_tokens":2,"total_tokens":22}}'
    )


@pytest.mark.parametrize("config", [ApiConfig(), STRICT])
async def test_logprobs_are_those_of_the_tokens(serve, reply_of, config):
    server = await serve(config)
    server.engine.script = reply_of("Hé", "</s>")
    reply = await text_of(await post(server, logprobs=True))
    assert (
        '"logprobs":{"content":[{"token":"Hé","logprob":-0.5,"top_logprobs":[]},'
        '{"token":"</s>","logprob":-0.125,"top_logprobs":[]}]},"finish_reason":"length"}]'
    ) in reply


@pytest.mark.parametrize(
    ("reason", "openai", "tgi"),
    [
        (FinishReason.LENGTH, "length", "length"),
        (FinishReason.EOS_TOKEN, "stop", "stop"),
        (FinishReason.STOP_SEQUENCE, "stop", "stop_sequence"),
    ],
)
async def test_finish_reasons(serve, reply_of, reason, openai, tgi):
    for config, expected in ((ApiConfig(), openai), (STRICT, tgi)):
        server = await serve(config)
        server.engine.script = reply_of("Hello", reason=reason)
        assert (await (await post(server)).json())["choices"][0]["finish_reason"] == expected
        stream = await (await post(server, stream=True)).text()
        assert f'"finish_reason":"{expected}"}}],"usage":null}}' in stream


async def test_tgis_ids_are_empty_and_ours_are_unique_and_the_engines(serve):
    server = await serve()
    ids = [(await (await post(server)).json())["id"] for _ in range(2)]
    assert ids == [f"chatcmpl-{request.request_id}" for request in server.engine.requests]
    assert len(set(ids)) == 2
    strict = await serve(STRICT)
    assert (await (await post(strict)).json())["id"] == ""


@pytest.mark.parametrize(
    ("model", "shown"), [(None, "acme/tiny"), ("tgi", "acme/tiny"), ("gpt-4o", "gpt-4o"), ("acme/tiny", "acme/tiny")]
)
async def test_the_model_is_told_as_it_was_asked_for(serve, model, shown):
    server = await serve()
    assert (await (await post(server, model=model)).json())["model"] == shown
    assert f'"model":"{shown}"' in await (await post(server, model=model, stream=True)).text()


async def test_headers_of_a_reply(serve):
    server = await serve()
    headers = (await post(server, headers={"x-request-class": "be"})).headers
    assert headers["x-compute-type"] == "1-cpu"
    assert headers["x-compute-characters"] == str(len("user: Hi\nassistant: "))
    assert headers["x-request-class"] == "be"
    assert headers["x-prompt-tokens"] == "20"
    assert headers["x-generated-tokens"] == "2"
    assert headers["x-inference-time"] == "250"
    assert {"x-compute-time", "x-total-time", "x-validation-time", "x-queue-time", "x-time-per-token"} <= {*headers}


# --- streams


async def test_every_byte_of_a_stream(serve, reply_of):
    server = await serve()
    server.engine.script = reply_of("Hé", "", "</s>", reason=FinishReason.EOS_TOKEN)
    response = await post(server, stream=True, stream_options={"include_usage": True})
    assert response.status == 200
    assert response.headers["content-type"] == "text/event-stream"
    assert response.headers["x-accel-buffering"] == "no"
    assert response.headers["x-compute-characters"] == "20"
    chunk = f'{{"object":"chat.completion.chunk",{HEAD},"choices":['
    assert await text_of(response) == events(
        f'{chunk}{{"index":0,"delta":{{"role":"assistant","content":"Hé"}},"logprobs":null,'
        '"finish_reason":null}],"usage":null}',
        f'{chunk}{{"index":0,"delta":{{"content":""}},"logprobs":null,"finish_reason":null}}],"usage":null}}',
        f'{chunk}{{"index":0,"delta":{{"content":""}},"logprobs":null,"finish_reason":"stop"}}],"usage":null}}',
        f'{chunk}],"usage":{{"prompt_tokens":20,"completion_tokens":3,"total_tokens":23}}}}',
        "[DONE]",
    )


async def test_every_byte_of_tgis_stream(serve, reply_of):
    server = await serve(STRICT)
    server.engine.script = reply_of("Hé", "</s>", reason=FinishReason.EOS_TOKEN)
    chunk = (
        f'{{"object":"chat.completion.chunk",{TGI_HEAD},"choices":[{{"index":0,"delta":{{"role":"assistant","content"'
    )
    assert await text_of(await post(server, stream=True)) == events(
        f'{chunk}:"Hé"}},"logprobs":null,"finish_reason":null}}],"usage":null}}',
        f'{chunk}:""}},"logprobs":null,"finish_reason":"stop"}}],"usage":null}}',
        "[DONE]",
    )


async def test_logprobs_of_a_stream_are_those_of_each_token(serve, reply_of):
    server = await serve()
    server.engine.script = reply_of("a", "b")
    text = await (await post(server, stream=True, logprobs=True)).text()
    assert text.count('"logprobs":{"content":[{"token":"a","logprob":-0.5,"top_logprobs":[]}]}') == 1
    assert text.count('"logprobs":{"content":[{"token":"b","logprob":-0.5,"top_logprobs":[]}]}') == 1


async def test_an_error_amid_a_stream_is_an_event_and_the_stream_is_done(serve, reply_of):
    server = await serve()
    server.engine.script = [reply_of("Hello", "!")[0], GenerationError("the model gave no valid token")]
    text = await text_of(await post(server, stream=True))
    assert text.endswith(
        events(
            '{"error":{"message":"Request failed during generation: the model gave no valid token",'
            '"http_status_code":422}}',
            "[DONE]",
        )
    )
    assert text.count("data: ") == 3


async def test_events_that_end_too_early_are_told(serve, reply_of):
    server = await serve()
    server.engine.script = reply_of("Hello", "!")[:1]
    assert (await (await post(server, stream=True)).text()).endswith(
        events('{"error":{"message":"Incomplete generation stream","http_status_code":422}}', "[DONE]")
    )
    assert (await post(server)).status == 500


async def test_what_validation_refuses_is_an_event_of_a_stream_and_a_status_without_one(serve):
    server = await serve()
    fields = {"top_p": 1.5}
    message = f"{PREFIX}`top_p` must be > 0.0 and < 1.0"
    plain = await post(server, **fields)
    assert (plain.status, await plain.json()) == (422, {"error": message, "error_type": "validation"})
    stream = await post(server, stream=True, **fields)
    assert (stream.status, await stream.text()) == (
        200,
        events(f'{{"error":{{"message":"{message}","http_status_code":422}}}}', "[DONE]"),
    )


async def test_an_overload_is_an_event_of_a_stream_and_says_when_to_come_again(serve):
    server = await serve(ApiConfig(max_concurrent_requests=0))
    plain = await post(server)
    assert (plain.status, plain.headers["retry-after"]) == (429, "1")
    stream = await post(server, stream=True)
    assert (stream.status, stream.headers["retry-after"]) == (200, "1")
    assert await stream.text() == events('{"error":{"message":"Model is overloaded","http_status_code":422}}', "[DONE]")


async def test_a_client_that_leaves_ends_its_generation(serve, reply_of):
    server = await serve()
    server.engine.script = [*reply_of("Hello", "!")[:1], asyncio.Event()]
    body = json.dumps({"messages": HI, "stream": True}).encode()
    reader, writer = await asyncio.open_connection("127.0.0.1", server.client.port)
    head = f"POST {PATH} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
    writer.write(head.encode() + body)
    await reader.readuntil(b"Hello")
    writer.close()
    await asyncio.wait_for(server.engine.ended.wait(), 5)
    assert server.engine.num_running == 0


# --- the request that the engine gets


async def submitted(server, headers=None, **fields):
    response = await post(server, headers=headers, **fields)
    assert response.status == 200, await response.text()
    return server.engine.requests[-1]


async def prompt_of(server, tokenizer, **fields) -> str:
    request = await submitted(server, **fields)
    return tokenizer._tokenizer.decode(list(request.prompt_token_ids), skip_special_tokens=False)


async def test_the_prompt_is_what_the_template_makes_and_no_token_is_added(serve, byte_level_tokenizer):
    server = await serve()
    assert await prompt_of(server, byte_level_tokenizer) == "user: Hi\nassistant: "
    messages = [*HI, {"role": "assistant", "content": "Well, "}]
    assert await prompt_of(server, byte_level_tokenizer, messages=messages) == "user: Hi\nassistant: Well,"
    assert (
        await prompt_of(server, byte_level_tokenizer, messages=messages, continue_final_message=False)
        == "user: Hi\nassistant: Well, \nassistant: "
    )
    assert await prompt_of(server, byte_level_tokenizer, add_generation_prompt=False) == "user: Hi\n"


async def test_clients_may_give_variables_to_the_template_but_not_its_messages(serve, byte_level_tokenizer):
    template = ChatTemplate("{{ bos_token }}{{ mode }}{{ messages | length }}{{ tools }}", {"bos_token": "<s>"})
    server = await serve(chat_template=template)
    variables = {"mode": "short", "messages": "none", "tools": "all"}
    assert await prompt_of(server, byte_level_tokenizer, chat_template_kwargs=variables) == "<s>short1None"
    strict = await serve(STRICT, chat_template=template)
    assert await prompt_of(strict, byte_level_tokenizer, chat_template_kwargs=variables) == "<s>1None"


async def test_stop_sequences_are_cut_unless_tgis_are_asked_for(serve):
    for config, cuts in ((ApiConfig(), True), (STRICT, False)):
        request = await submitted(await serve(config), stop=["a", "b"])
        assert (request.stop_sequences, request.cuts_stop_sequences) == (("a", "b"), cuts)
    assert (await submitted(await serve(), stop="a")).stop_sequences == ("a",)


@pytest.mark.parametrize(
    ("fields", "headers", "expected"),
    [
        ({}, {}, "rt"),
        ({"service_tier": "auto"}, {}, "rt"),
        ({"service_tier": "flex"}, {}, "be"),
        ({"service_tier": "flex"}, {"x-request-class": "rt"}, "rt"),
        ({"service_tier": "batch"}, {"x-slo-ttft-ms": "400"}, "rt"),
    ],
)
@pytest.mark.parametrize("path", [PATH, "/v1/completions"])
async def test_the_class_is_the_headers_else_the_service_tiers(serve, path, fields, headers, expected):
    server = await serve()
    response = await post(server, path, headers, prompt="x", **fields)
    assert response.headers["x-request-class"] == expected
    assert server.engine.requests[-1].request_class is RequestClass(expected)
    strict = await serve(STRICT)
    if not headers:
        assert (await post(strict, path, prompt="x", **fields)).headers["x-request-class"] == "rt"


async def test_the_service_tier_goes_before_the_operators_default(serve):
    server = await serve(ApiConfig(default_class="be"))
    assert (await submitted(server)).request_class is RequestClass.BE
    assert (await submitted(server, service_tier="auto")).request_class is RequestClass.BE
    assert (await submitted(server, service_tier="priority")).request_class is RequestClass.RT


@pytest.mark.parametrize("path", [PATH, "/v1/completions"])
async def test_targets_and_deadlines_reach_the_engine(serve, path):
    server = await serve()
    headers = {"x-slo-ttft-ms": "400", "x-slo-tpot-ms": "50", "x-request-deadline-ms": "1500"}
    response = await post(server, path, headers, prompt="x")
    request = server.engine.requests[-1]
    assert (request.ttft_s, request.tpot_s, request.deadline_s) == (0.4, 0.05, 1.5)
    assert (response.headers["x-slo-ttft-ms"], response.headers["x-slo-tpot-ms"]) == ("400", "50")
    refused = await post(server, path, {"x-request-class": "vip"}, prompt="x", stream=True)
    assert (refused.status, (await refused.json())["error_type"]) == (422, "validation")


# --- what is told by the status, streams included


@pytest.mark.parametrize("stream", [False, True])
async def test_a_model_without_a_template_serves_no_chats(serve, stream):
    server = await serve(chat_template=None)
    response = await post(server, stream=stream)
    assert response.status == 422
    assert await response.read() == b'{"error":"Template error: template not found","error_type":"template_error"}'


@pytest.mark.parametrize("stream", [False, True])
async def test_a_template_that_refuses_is_counted_as_such(serve, stream):
    server = await serve(chat_template=ChatTemplate("{{ raise_exception('Only one message!') }}", {}))
    response = await post(server, stream=stream)
    assert response.status == 422
    assert await response.read() == b'{"error":"Template error: Only one message!","error_type":"template_error"}'
    lines = await server.metric_lines()
    assert "tgi_request_count 1.0" in lines
    assert 'tgi_request_failure{err="template"} 1.0' in lines
    assert 'bros_requests_total{class="rt",outcome="template"} 1.0' in lines


async def test_top_logprobs_are_judged_as_top_n_tokens_are(serve):
    server = await serve()
    response = await post(server, logprobs=True, top_logprobs=9)
    assert (await response.json())["error"] == f"{PREFIX}`top_n_tokens` must be >= 0 and <= 5. Given: 9"


async def test_a_reply_is_counted_once(serve):
    server = await serve()
    await (await post(server)).read()
    await (await post(server, stream=True)).read()
    lines = await server.metric_lines()
    assert "tgi_request_count 2.0" in lines
    assert "tgi_request_success 2.0" in lines
    assert 'bros_requests_total{class="rt",outcome="success"} 2.0' in lines


async def test_an_empty_prompt_is_told(serve):
    server = await serve(chat_template=ChatTemplate("", {}))
    assert (await (await post(server)).json())["error"] == f"{PREFIX}`inputs` cannot be empty"


# --- /chat_tokenize


async def test_chat_tokenize_tells_the_prompt_and_its_tokens(serve, byte_level_tokenizer):
    server = await serve(ApiConfig(max_concurrent_requests=0))
    response = await post(server, "/chat_tokenize")
    reply = await response.json()
    assert list(reply) == ["tokenize_response", "templated_text"]
    assert reply["templated_text"] == "user: Hi\nassistant: "
    ids = byte_level_tokenizer.encode("user: Hi\nassistant: ", add_special_tokens=False).ids
    assert [token["id"] for token in reply["tokenize_response"]] == ids
    assert reply["tokenize_response"][0] | {"id": 0} == {"id": 0, "text": "u", "start": 0, "stop": 1}
    assert not [line for line in await server.metric_lines() if line.startswith("tgi_request_count")]


async def test_chat_tokenize_refuses_what_chats_are_refused(serve):
    server = await serve(chat_template=None)
    response = await post(server, "/chat_tokenize")
    assert (response.status, (await response.json())["error_type"]) == (422, "template_error")
    response = await post(server, "/chat_tokenize", logit_bias=[1])
    assert (response.status, (await response.json())["error_type"]) == (422, "validation")
