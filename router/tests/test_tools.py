"""Tools of chats: what the model is told, what holds its reply, and how both kinds of server tell its calls."""

import json
import random
from collections.abc import Iterator, Sequence
from typing import Any

import pytest

from bros_router.api.tool_call_reader import ToolCallReader
from bros_router.api.tool_reply import Calls
from bros_router.api.tools import DEFAULT_TOOL_PROMPT
from bros_router.chat_templates.source import ChatTemplate
from bros_router.config import ApiConfig
from bros_router.request import FinishReason, TokenEvent
from bros_shard.grammar_compiler import GrammarCompiler

STRICT = ApiConfig(strict_tgi=True)
MESSAGES = [{"role": "user", "content": "Hi"}]
WEATHER = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "Of a place",
        "parameters": {
            "type": "object",
            "properties": {"place": {"$ref": "#/$defs/Place"}, "days": {"type": "integer"}},
            "required": ["place"],
            "$defs": {"Place": {"enum": ["Köln", "Rio"]}},
        },
    },
}
CLOCK = {"type": "function", "function": {"name": "clock", "parameters": {"type": "object"}}}
NO_TOOL = {"type": "function", "function": {"name": "no_tool"}}
TOLD_BY_TGI = (
    '{"type":"function","function":{"description":"Of a place","name":"weather","arguments":"'
    + json.dumps(WEATHER["function"]["parameters"], ensure_ascii=False, separators=(",", ":")).replace('"', '\\"')
    + '"}}'
)


async def post(server, path: str = "/v1/chat/completions", **fields: Any) -> Any:
    body = {"messages": MESSAGES, "tools": [WEATHER, CLOCK]} | fields
    return await server.client.post(path, json=body)


async def prompt_of(server, **fields: Any) -> str:
    return (await (await post(server, "/chat_tokenize", **fields)).json())["templated_text"]


# --- what the model is told


@pytest.mark.parametrize("config", [ApiConfig(), STRICT])
async def test_a_template_without_tools_has_them_added_to_the_last_message(serve, config):
    server = await serve(config)
    told = f"user: Hi\n---\n[{TOLD_BY_TGI}]\n{DEFAULT_TOOL_PROMPT}\nassistant: "
    assert await prompt_of(server, tools=[WEATHER], tool_choice="weather") == told
    assert await prompt_of(server, tools=[WEATHER], tool_choice="required", tool_prompt="") == told
    brief = await prompt_of(server, tools=[WEATHER], tool_choice="required", tool_prompt="Do!")
    assert brief == f"user: Hi\n---\n[{TOLD_BY_TGI}]\nDo!\nassistant: "
    may_decline = await prompt_of(server, tools=[WEATHER], tool_prompt="Do!")
    assert '"Open ended response with no specific tool selected","name":"no_tool"' in may_decline
    assert await prompt_of(server, tool_choice="none") == "user: Hi\nassistant: "
    assert await prompt_of(server, tools=[], tool_choice="required") == "user: Hi\nassistant: "


async def test_a_template_with_tools_is_given_them(serve):
    template = ChatTemplate("{{ tools | tojson }} {{ messages[-1].content }}", {})
    prompt = await prompt_of(await serve(chat_template=template), tools=[WEATHER], tool_choice="required")
    tools, _, rest = prompt.partition(" Hi")
    function = WEATHER["function"]
    assert json.loads(tools) == [{"type": "function", "function": function}]
    assert rest == f"\n---\n{DEFAULT_TOOL_PROMPT}"
    prompt = await prompt_of(await serve(STRICT, chat_template=template), tools=[WEATHER], tool_choice="required")
    assert json.loads(prompt.partition(" Hi")[0]) == [json.loads(TOLD_BY_TGI)]


async def test_calls_of_earlier_replies_reach_templates_that_know_them(serve):
    template = ChatTemplate("{% for m in messages %}{{ m | tojson }}{{ m.tool_calls and '' }}\n{% endfor %}", {})
    calls = [{"id": "c1", "type": "function", "function": {"name": "weather", "arguments": '{"place":"Rio"}'}}]
    messages = [
        *MESSAGES,
        {"role": "assistant", "content": None, "tool_calls": calls},
        {"role": "tool", "tool_call_id": "c1", "content": "Sunny"},
    ]
    lines = (await prompt_of(await serve(chat_template=template), messages=messages, tools=None)).split("\n")
    called = {"role": "assistant", "content": "", "tool_calls": [calls[0] | {"function": {"name": "weather"}}]}
    called["tool_calls"][0]["function"]["arguments"] = {"place": "Rio"}
    assert json.loads(lines[1]) == called
    assert json.loads(lines[2]) == {"role": "tool", "content": "Sunny", "tool_call_id": "c1"}
    lines = (await prompt_of(await serve(STRICT, chat_template=template), messages=messages, tools=None)).split("\n")
    assert json.loads(json.loads(lines[1])["content"])[0]["id"] == "c1"
    assert json.loads(lines[2]) == {"role": "tool", "content": "Sunny"}


# --- what holds its reply


def call(name: str, **arguments: Any) -> str:
    return json.dumps({"function": {"_name": name} | arguments}, ensure_ascii=False)


IN_RIO, TIME, NOTHING = call("weather", place="Rio"), call("clock"), call("no_tool")


@pytest.mark.parametrize(
    ("fields", "accepted", "refused"),
    [
        ({}, [IN_RIO, TIME, NOTHING, call("weather", place="Köln", days=3)], [IN_RIO + TIME, "Hi", "{}"]),
        ({"tool_choice": None}, [IN_RIO, NOTHING], []),
        ({"tool_choice": "auto"}, [IN_RIO, NOTHING], []),
        ({"tool_choice": "required"}, [IN_RIO, TIME], [NOTHING, call("weather"), call("weather", place="Bonn")]),
        ({"tool_choice": "clock"}, [TIME], [IN_RIO, NOTHING, call("clock", zone="UTC")]),
        ({"tool_choice": {"type": "function", "function": {"name": "weather"}}}, [IN_RIO], [TIME, NOTHING]),
        ({"tool_choice": {"function": {"name": "weather"}}}, [IN_RIO], [TIME]),
        ({"parallel_tool_calls": True}, [IN_RIO, IN_RIO + TIME + IN_RIO, NOTHING], [NOTHING + TIME, TIME + NOTHING]),
    ],
)
async def test_a_grammar_holds_the_reply_to_the_tools_in_play(
    serve, byte_level_tokenizer, guided_vocabulary, fields, accepted, refused
):
    server = await serve(guided=guided_vocabulary, max_input_tokens=4000, max_total_tokens=5000)
    await post(server, **fields)
    grammar = server.engine.requests[0].grammar
    compiler = GrammarCompiler(guided_vocabulary.tokenizer, 300, guided_vocabulary.eos_token_ids)
    for text in [*accepted, *refused]:
        matcher = compiler.compile(grammar)
        token_ids = byte_level_tokenizer.encode(text, add_special_tokens=False).ids
        is_match = matcher.try_consume_tokens(token_ids) == len(token_ids) and matcher.is_accepting()
        assert is_match == (text in accepted), text


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("config", "fields", "message"),
    [
        (ApiConfig(), {"tool_choice": "sundial"}, "Tool with name sundial not found"),
        (STRICT, {"tool_choice": {"function": {"name": "x"}}}, "Tool with name x not found"),
        (ApiConfig(), {"response_format": {"type": "json_object"}}, "Grammar and tools are mutually exclusive"),
        (STRICT, {"response_format": {"type": "regex", "value": "a"}}, "Grammar and tools are mutually exclusive"),
        (
            STRICT,
            {"tools": [], "response_format": {"type": "regex", "value": "a"}},
            "Grammar and tools are mutually exclusive",
        ),
    ],
)
async def test_tools_that_cannot_be_are_told_before_anything_is_rendered(serve, config, fields, message, stream):
    server = await serve(config, chat_template=None)
    response = await post(server, stream=stream, **fields)
    assert response.status == 422
    assert await response.json() == {"error": f"Tool error: {message}", "error_type": "tool_error"}


async def test_tgi_wants_to_know_the_arguments(serve):
    server = await serve(STRICT)
    response = await post(server, tools=[NO_TOOL])
    assert (await response.text()).endswith("Object missing required field `arguments`")
    assert (await post(server, "/chat_tokenize", tools=[{}])).status == 422


# --- how calls are told


class Turns:
    """One script after another."""

    def __init__(self, *scripts: Sequence[TokenEvent]) -> None:
        self._scripts = [*scripts]

    def __iter__(self) -> Iterator[TokenEvent]:
        return iter(self._scripts.pop(0))


TOKENS = ('{"', "function", '": {"_', 'name": "', "weather", '", "', "place", '": "R', 'io"}', "}", "</s>")


@pytest.fixture
def chat(serve, guided_vocabulary, reply_of):
    """`await chat(config, *turns, **fields)`: the response of a server whose model says these tokens."""

    async def ask(config: ApiConfig, *turns: Sequence[str], reason=FinishReason.EOS_TOKEN, **fields: Any) -> Any:
        server = await serve(config, guided=guided_vocabulary, max_input_tokens=4000, max_total_tokens=5000)
        server.engine.script = Turns(*(reply_of(*turn, reason=reason) for turn in turns))
        return await post(server, **fields)

    return ask


async def chunks_of(response: Any) -> list[dict]:
    *frames, done, end = (await response.text()).split("\n\n")
    assert (done, end) == ("data: [DONE]", "")
    return [json.loads(frame.removeprefix("data: ")) for frame in frames]


async def test_a_whole_reply_for_openais_clients(chat):
    choice = (await (await chat(ApiConfig(), TOKENS)).json())["choices"][0]
    (told,) = choice["message"].pop("tool_calls")
    assert choice["message"] == {"role": "assistant", "content": None}
    assert told.pop("id").startswith("call_")
    function = {"description": None, "name": "weather", "arguments": '{"place":"Rio"}'}
    assert told == {"type": "function", "function": function}
    assert choice["finish_reason"] == "tool_calls"


async def test_several_calls_have_ids_of_their_own(chat):
    choice = (await (await chat(ApiConfig(), (IN_RIO, TIME, "</s>"), parallel_tool_calls=True)).json())["choices"][0]
    calls = choice["message"]["tool_calls"]
    assert [one["function"]["name"] for one in calls] == ["weather", "clock"]
    assert [one["function"]["arguments"] for one in calls] == ['{"place":"Rio"}', "{}"]
    assert len({one["id"] for one in calls}) == 2


async def test_a_whole_reply_of_tgi(chat):
    text = await (await chat(STRICT, TOKENS)).text()
    assert (
        '"choices":[{"index":0,"message":{"role":"assistant","tool_calls":[{"id":"0","type":"function","function":'
        '{"description":null,"name":"weather","arguments":"{\\"place\\":\\"Rio\\"}"}}]},"logprobs":null,'
        '"finish_reason":"stop"}]' in text
    )


async def test_a_stream_for_openais_clients(chat):
    response = await chat(ApiConfig(), (*TOKENS[:-1], TIME, "</s>"), stream=True, parallel_tool_calls=True)
    choices = [chunk["choices"][0] for chunk in await chunks_of(response)]
    assert [choice["delta"].get("role") for choice in choices] == ["assistant"] + [None] * (len(choices) - 1)
    deltas = [delta for choice in choices for delta in choice["delta"].get("tool_calls", ())]
    heads = [delta for delta in deltas if "id" in delta]
    assert [(head["index"], head["type"], head["function"]["name"]) for head in heads] == [
        (0, "function", "weather"),
        (1, "function", "clock"),
    ]
    for index, arguments in enumerate([{"place": "Rio"}, {}]):
        text = "".join(delta["function"]["arguments"] for delta in deltas if delta["index"] == index)
        assert json.loads(text) == arguments
    assert [choice["finish_reason"] for choice in choices] == [None] * (len(choices) - 1) + ["tool_calls"]


async def test_a_stream_of_tgi_has_no_end(chat):
    earlier = {"role": "assistant", "tool_calls": [{"id": "4", "type": "function", "function": CLOCK["function"]}]}
    messages = [*MESSAGES, earlier, {"role": "tool", "content": "noon"}]
    response = await chat(STRICT, TOKENS, stream=True, messages=messages, stream_options={"include_usage": True})
    *chunks, usage = await chunks_of(response)
    calls = [chunk["choices"][0]["delta"]["tool_calls"][0] for chunk in chunks]
    assert {one["id"] for one in calls} == {"5"}
    assert [one["function"]["name"] for one in calls] == ["weather", None, None, None]
    assert "".join(one["function"]["arguments"] for one in calls) == '{ "place": "Rio"}'
    assert {chunk["choices"][0]["finish_reason"] for chunk in chunks} == {None}
    assert usage["usage"]["completion_tokens"] == len(TOKENS)


DECLINED = ('{"function": ', '{"_name": "no_tool"', "}}", "</s>")


@pytest.mark.parametrize("config", [ApiConfig(), STRICT])
async def test_a_model_that_declines_is_asked_again_without_tools(chat, config):
    reply = await (await chat(config, DECLINED, ("Hel", "lo", "</s>"))).json()
    assert reply["choices"][0]["message"] == {"role": "assistant", "content": "Hello"}
    assert reply["choices"][0]["finish_reason"] == "stop"
    assert reply["usage"]["completion_tokens"] == (4 if config is STRICT else 3)
    response = await chat(config, DECLINED, ("Hel", "lo", "</s>"), stream=True)
    choices = [chunk["choices"][0] for chunk in await chunks_of(response)]
    assert "".join(choice["delta"]["content"] for choice in choices) == "Hello"
    assert choices[-1]["finish_reason"] == "stop"


async def test_each_of_several_choices_calls_or_declines_for_itself(chat):
    turns = TOKENS, DECLINED, ("Hel", "lo", "</s>")
    reply = await (await chat(ApiConfig(), *turns, n=2)).json()
    called, said = reply["choices"]
    assert (called["index"], called["finish_reason"]) == (0, "tool_calls")
    assert [one["function"]["name"] for one in called["message"]["tool_calls"]] == ["weather"]
    assert (said["index"], said["message"]) == (1, {"role": "assistant", "content": "Hello"})
    assert reply["usage"]["completion_tokens"] == len(TOKENS) + 3
    response = await chat(ApiConfig(), *turns, n=2, stream=True, stream_options={"include_usage": True})
    *chunks, usage = await chunks_of(response)
    choices = [chunk["choices"][0] for chunk in chunks]
    assert "".join(c["delta"].get("content", "") for c in choices if c["index"] == 1) == "Hello"
    assert [c["finish_reason"] for c in choices if c["finish_reason"]] == ["tool_calls", "stop"]
    assert any("tool_calls" in c["delta"] for c in choices if c["index"] == 0)
    assert usage["usage"]["completion_tokens"] == len(TOKENS) + 3


async def test_a_reply_that_was_cut_off(chat):
    cut = TOKENS[:8]
    reason = FinishReason.LENGTH
    choice = (await (await chat(ApiConfig(), cut, reason=reason)).json())["choices"][0]
    assert choice["message"]["tool_calls"][0]["function"]["arguments"] == '{ "place": "R'
    assert choice["finish_reason"] == "length"
    choice = (await (await chat(ApiConfig(), TOKENS[:3], reason=reason)).json())["choices"][0]
    assert (choice["message"], choice["finish_reason"]) == ({"role": "assistant", "content": ""}, "length")
    response = await chat(STRICT, cut, reason=reason)
    assert response.status == 422
    assert (await response.json())["error"].startswith("Tool error: Failed to parse generated text: ")
    for config in (ApiConfig(), STRICT):
        choices = [c["choices"][0] for c in await chunks_of(await chat(config, cut, reason=reason, stream=True))]
        assert choices[-1]["finish_reason"] == "length"
    assert await chunks_of(await chat(STRICT, TOKENS[:3], reason=reason, stream=True)) == []
    assert len(await chunks_of(await chat(ApiConfig(), TOKENS[:3], reason=reason, stream=True))) == 1


def test_calls_are_found_however_the_text_is_cut():
    generator = random.Random(5)
    arguments = [{"a": 'b"}{\\', "c": [{}, {"d": "]"}]}, {}, {"é": "\n", "n": None}]
    for spacing in [(",", ":"), (", ", ": ")]:
        calls = [{"function": {"_name": f"f {n}"} | one} for n, one in enumerate(arguments)]
        text = "".join(json.dumps(one, separators=spacing) for one in calls)
        whole = Calls.read(text)
        assert [(name, json.loads(one)) for name, one in whole.calls] == [
            (f"f {n}", one) for n, one in enumerate(arguments)
        ]
        assert whole.is_complete
        for _ in range(200):
            cuts = sorted(generator.choices(range(len(text) + 1), k=generator.randrange(12)))
            reader, joined = ToolCallReader(), [""] * len(arguments)
            for start, end in zip([0, *cuts], [*cuts, len(text)], strict=True):
                for piece in reader.feed(text[start:end]):
                    joined[piece.index] += piece.arguments
            assert [json.loads(one) for one in joined] == arguments
            assert reader.is_complete
        assert not Calls.read(text[:-3]).is_complete
