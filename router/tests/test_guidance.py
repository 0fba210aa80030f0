"""Grammars on the way in: what the routes take, in which words they refuse, and what the engine is given."""

import json
from typing import Any

import pytest

from bros_router.config import ApiConfig

PREFIX = "Input validation error: "
SCHEMA: dict[str, Any] = {"type": "object", "properties": {"n": {"type": "integer"}}, "required": ["n"]}
MESSAGES = [{"role": "user", "content": "Hi"}]


async def grammar_of(server, path: str, **fields: Any) -> str | None:
    """What the engine is to guide by."""
    response = await server.client.post(path, json=fields)
    assert response.status == 200, await response.text()
    return server.engine.requests[-1].grammar


async def refusal(server, path: str, **fields: Any) -> str:
    response = await server.client.post(path, json=fields)
    assert response.status == 422
    return (await response.json())["error"].removeprefix(PREFIX)


async def test_every_form_of_a_schema_is_one_grammar(serve, guided_vocabulary):
    server = await serve(guided=guided_vocabulary)
    strict = await serve(ApiConfig(strict_tgi=True), guided=guided_vocabulary)
    forms = [
        {"type": "json", "value": SCHEMA},
        {"type": "json", "value": json.dumps(SCHEMA)},
        {"type": "json_object", "value": SCHEMA},
        {"type": "json_schema", "value": {"name": "n", "schema": SCHEMA, "strict": True}},
        {"type": "json_schema", "value": {"schema": SCHEMA}},
    ]
    grammars = [await grammar_of(server, "/generate", inputs="a", parameters={"grammar": form}) for form in forms]
    for one in (server, strict):
        for form in forms:
            grammars.append(await grammar_of(one, "/v1/chat/completions", messages=MESSAGES, response_format=form))
    openai = {"type": "json_schema", "json_schema": {"name": "n", "schema": SCHEMA, "strict": True}}
    grammars.append(await grammar_of(server, "/v1/chat/completions", messages=MESSAGES, response_format=openai))
    assert len(set(grammars)) == 1
    assert json.loads(grammars[0] or "")["grammars"][0]["json_schema"]["required"] == ["n"]


async def test_formats_of_openai(serve, guided_vocabulary):
    server = await serve(guided=guided_vocabulary)
    chat = "/v1/chat/completions"
    assert await grammar_of(server, chat, messages=MESSAGES, response_format={"type": "text"}) is None
    assert await grammar_of(server, chat, messages=MESSAGES, response_format={"type": "json_object"})
    array = {"type": "json_schema", "json_schema": {"name": "a", "schema": {"type": "array"}}}
    assert await grammar_of(server, chat, messages=MESSAGES, response_format=array)
    regex = {"type": "regex", "value": "[a-z]+"}
    assert await grammar_of(server, chat, messages=MESSAGES, response_format=regex)


@pytest.mark.parametrize(
    ("grammar", "message"),
    [
        ({"type": "json", "value": 5}, "grammar is not supported"),
        ({"type": "json", "value": [SCHEMA]}, "grammar is not supported"),
        ({"type": "json_object", "value": None}, "grammar is not supported"),
        ({"type": "json", "value": "{"}, "grammar is not valid: Input data was truncated"),
        ({"type": "json", "value": {"type": "object"}}, "grammar is not valid: Grammar must have a 'properties' field"),
        (
            {"type": "json_schema", "value": {"schema": {"properties": []}}},
            "grammar is not valid: [] is not of type 'object'",
        ),
        (
            {"type": "json", "value": {"properties": {"a": {"uniqueItems": True, "type": "array"}}}},
            'cannot compile regex from schema: Unimplemented keys: ["uniqueItems"]',
        ),
    ],
)
async def test_bad_grammars_are_refused_in_tgis_words(serve, guided_vocabulary, grammar, message):
    server = await serve(guided=guided_vocabulary)
    assert await refusal(server, "/generate", inputs="a", parameters={"grammar": grammar}) == message
    assert server.engine.requests == []


async def test_grammars_are_judged_last(serve, guided_vocabulary):
    server = await serve(guided=guided_vocabulary)
    bad = {"type": "json", "value": 5}
    assert "`top_k`" in await refusal(server, "/generate", inputs="a", parameters={"grammar": bad, "top_k": 0})
    assert "60 tokens" in await refusal(server, "/generate", inputs="a" * 61, parameters={"grammar": bad})


async def test_a_grammar_says_itself_where_the_reply_ends(serve, guided_vocabulary):
    server = await serve(guided=guided_vocabulary)
    parameters = {"grammar": {"type": "regex", "value": "a"}, "ignore_eos": True}
    assert (await refusal(server, "/generate", inputs="a", parameters=parameters)).startswith("`ignore_eos` cannot")


@pytest.mark.parametrize(
    ("grammar", "reason"),
    [
        ({"type": "regex"}, "parameters.grammar: Object missing required field `value`"),
        ({"type": "regex", "value": 5}, "parameters.grammar.value: Expected `str`, got `int`"),
        ({"value": "a"}, "parameters.grammar: Object missing required field `type`"),
        ({"type": "lark", "value": "a"}, "parameters.grammar.type: Invalid value 'lark'"),
        ({"type": "json_schema", "value": SCHEMA}, "parameters.grammar.value: Object missing required field `schema`"),
    ],
)
async def test_grammars_of_another_shape(serve, grammar, reason):
    response = await (await serve()).client.post("/generate", json={"inputs": "a", "parameters": {"grammar": grammar}})
    assert response.status == 422
    assert await response.text() == f"Failed to deserialize the JSON body into the target type: {reason}"


async def test_a_server_without_grammars_refuses_them(serve):
    server = await serve(guided=None)
    grammar = {"type": "regex", "value": "a"}
    assert await refusal(server, "/generate", inputs="a", parameters={"grammar": grammar}) == "grammar is not supported"
