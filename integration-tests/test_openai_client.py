"""OpenAI's own client, unmodified, against the live server: what its users rely on."""

import asyncio
import json

import jsonschema
import openai
import pytest

MESSAGES = [{"role": "user", "content": "What does str.strip do?"}]
GREEDY = {"model": "bros-demo", "max_tokens": 16, "temperature": 0}

TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "weather",
            "strict": True,
            "parameters": {
                "type": "object",
                "properties": {
                    "place": {"enum": ["Rio", "Bonn"]},
                    "days": {"type": "integer", "minimum": 0, "maximum": 9},
                },
                "required": ["place", "days"],
                "additionalProperties": False,
            },
        },
    },
    {
        "type": "function",
        "function": {
            "name": "clock",
            "strict": True,
            "parameters": {"type": "object", "properties": {}, "required": [], "additionalProperties": False},
        },
    },
]


def by_name(name: str) -> dict:
    """The schema of a tool's arguments."""
    return next(tool["function"]["parameters"] for tool in TOOLS if tool["function"]["name"] == name)


@pytest.fixture(scope="module")
def client(server) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{server.url}/v1", api_key="-", max_retries=0)


def test_chat(client):
    reply = client.chat.completions.create(messages=MESSAGES, **GREEDY)
    (choice,) = reply.choices
    assert choice.message.role == "assistant"
    assert choice.message.content
    assert choice.finish_reason in ("length", "stop")
    assert reply.usage.total_tokens == reply.usage.prompt_tokens + reply.usage.completion_tokens
    assert reply.id.startswith("chatcmpl-")
    again = client.chat.completions.create(messages=MESSAGES, **GREEDY)
    assert again.choices[0].message.content == choice.message.content
    assert again.id != reply.id


def test_streamed_chat_joins_to_the_plain_one(client):
    plain = client.chat.completions.create(messages=MESSAGES, **GREEDY).choices[0]
    stream = client.chat.completions.create(
        messages=MESSAGES, stream=True, stream_options={"include_usage": True}, **GREEDY
    )
    *chunks, last = list(stream)
    assert "".join(chunk.choices[0].delta.content for chunk in chunks) == plain.message.content
    assert [chunk.choices[0].delta.role for chunk in chunks] == ["assistant"] + [None] * (len(chunks) - 1)
    assert chunks[-1].choices[0].finish_reason == plain.finish_reason
    assert (last.choices, last.usage.completion_tokens) == ([], len(chunks))


def test_the_clients_own_accumulation_of_a_stream(client):
    plain = client.chat.completions.create(messages=MESSAGES, **GREEDY).choices[0].message.content
    # The helper raises where a reply ends by its length, so this one ends by a stop sequence.
    stop = plain[len(plain) // 2 :][:4]
    with client.chat.completions.stream(messages=MESSAGES, stop=stop, **GREEDY) as stream:
        stream.until_done()
        (choice,) = stream.get_final_completion().choices
    assert (choice.message.role, choice.message.content) == ("assistant", plain[: plain.index(stop)])
    assert choice.finish_reason == "stop"


def test_what_tgi_refuses_and_this_client_sends(client):
    reply = client.chat.completions.create(
        messages=MESSAGES,
        model="bros-demo",
        max_completion_tokens=4,
        stop="\n",
        top_p=1.0,
        n=1,
        seed=7,
        user="ann",
        logit_bias={},
        presence_penalty=0,
        frequency_penalty=0,
        service_tier="flex",
        parallel_tool_calls=True,
        response_format={"type": "text"},
        logprobs=True,
    )
    assert reply.usage.completion_tokens <= 4
    assert len(reply.choices[0].logprobs.content) == reply.usage.completion_tokens
    assert all(token.logprob <= 0 for token in reply.choices[0].logprobs.content)


def test_the_service_tier_is_the_class(client):
    for tier, request_class in (("flex", "be"), ("priority", "rt"), ("auto", "rt")):
        raw = client.chat.completions.with_raw_response.create(messages=MESSAGES, service_tier=tier, **GREEDY)
        assert raw.headers["x-request-class"] == request_class
        assert raw.parse().choices


def test_a_stop_sequence_is_cut(client):
    whole = client.chat.completions.create(messages=MESSAGES, **GREEDY).choices[0].message.content
    stop = whole[len(whole) // 2 :][:4]
    cut = client.chat.completions.create(messages=MESSAGES, stop=[stop], **GREEDY).choices[0]
    assert (cut.message.content, cut.finish_reason) == (whole[: whole.index(stop)], "stop")


def test_a_format_holds_the_reply(client):
    schema = TOOLS[0]["function"]["parameters"]
    named = {"type": "json_schema", "json_schema": {"name": "weather", "schema": schema, "strict": True}}
    reply = client.chat.completions.create(messages=MESSAGES, response_format=named, **GREEDY | {"max_tokens": 64})
    jsonschema.validate(json.loads(reply.choices[0].message.content), schema)
    with client.chat.completions.stream(messages=MESSAGES, response_format=named, **GREEDY | {"max_tokens": 64}) as s:
        assert s.get_final_completion().choices[0].message.content == reply.choices[0].message.content


@pytest.mark.parametrize("choice", ["required", {"type": "function", "function": {"name": "weather"}}])
def test_tools_are_called(client, choice):
    wanted = GREEDY | {"max_tokens": 64}
    reply = client.chat.completions.create(messages=MESSAGES, tools=TOOLS, tool_choice=choice, **wanted).choices[0]
    (call,) = reply.message.tool_calls
    assert (reply.finish_reason, reply.message.content) == ("tool_calls", None)
    jsonschema.validate(json.loads(call.function.arguments), by_name(call.function.name))
    with client.chat.completions.stream(messages=MESSAGES, tools=TOOLS, tool_choice=choice, **wanted) as stream:
        streamed = stream.get_final_completion().choices[0]
    (same,) = streamed.message.tool_calls
    assert same.function.name == call.function.name and same.id != call.id
    assert json.loads(same.function.arguments) == json.loads(call.function.arguments)
    assert streamed.finish_reason == "tool_calls"
    said = [*MESSAGES, reply.message.to_dict(), {"role": "tool", "tool_call_id": call.id, "content": "Sunny"}]
    assert client.chat.completions.create(messages=said, tools=TOOLS, tool_choice="none", **GREEDY).choices[0].message


def test_a_model_may_call_several_tools_or_none(client):
    wanted = GREEDY | {"max_tokens": 200, "temperature": 1.5}
    seen = set()
    for seed in range(8):
        reply = client.chat.completions.create(
            messages=MESSAGES, tools=TOOLS, parallel_tool_calls=True, seed=seed, **wanted
        ).choices[0]
        calls = reply.message.tool_calls or []
        seen.add(len(calls))
        assert bool(calls) != bool(reply.message.content)
        for call in calls if reply.finish_reason != "length" else calls[:-1]:
            jsonschema.validate(json.loads(call.function.arguments), by_name(call.function.name))
    assert len(seen) > 1


def test_completions_of_texts_and_tokens(client):
    reply = client.completions.create(prompt=["Return the", "Return a"], **GREEDY)
    assert [choice.index for choice in reply.choices] == [0, 1]
    assert all(choice.text for choice in reply.choices)
    stream = client.completions.create(prompt="Return the", stream=True, **GREEDY)
    assert "".join(chunk.choices[0].text for chunk in stream) == reply.choices[0].text
    assert client.completions.create(prompt=[5, 6, 7], **GREEDY).usage.prompt_tokens == 3


def test_errors_are_the_clients_own(client):
    """TGI's `error` is a text, which this client keeps as the body."""
    with pytest.raises(openai.UnprocessableEntityError) as caught:
        client.chat.completions.create(messages=MESSAGES, model="tgi", top_p=1.5)
    assert caught.value.body == "Input validation error: `top_p` must be > 0.0 and < 1.0"
    with pytest.raises(openai.UnprocessableEntityError) as caught:
        client.chat.completions.create(messages=MESSAGES, model="tgi", tools=TOOLS, tool_choice="sundial")
    assert caught.value.body == "Tool error: Tool with name sundial not found"
    with pytest.raises(openai.APIError, match="`top_p` must be > 0"):
        list(client.chat.completions.create(messages=MESSAGES, model="tgi", top_p=1.5, stream=True))


def test_many_at_once(server):
    async def talk() -> list[str]:
        async with openai.AsyncOpenAI(base_url=f"{server.url}/v1", api_key="-", max_retries=0) as client:
            chats = [
                client.chat.completions.create(messages=[{"role": "user", "content": f"Chat {n % 2}"}], **GREEDY)
                for n in range(8)
            ]
            return [reply.choices[0].message.content for reply in await asyncio.gather(*chats)]

    texts = asyncio.run(talk())
    assert len(set(texts[::2])) == len(set(texts[1::2])) == 1
