"""Grammars in their helper process: what they become, and what the hostile ones are answered."""

import asyncio
import json
from collections.abc import AsyncIterator

import pytest

from bros_router.grammars.protocol import GrammarSource, Refused, RegexSource, SchemaSource, SchemaTextSource, Vetted
from bros_router.grammars.schema import closed
from bros_router.grammars.vetter import GrammarVetter, GuidedVocabulary

INTEGER = {"type": "object", "properties": {"n": {"type": "integer"}}}


@pytest.fixture
async def vetter() -> AsyncIterator[GrammarVetter]:
    vetter = GrammarVetter()
    yield vetter
    await vetter.close()


def nested(depth: int) -> dict:
    schema: dict = {"type": "string"}
    for _ in range(depth):
        schema = {"properties": {"a": schema}}
    return schema


def doubling(depth: int) -> dict:
    """As many ways to be read as 2 ** depth."""
    branches = {f"d{n}": {"anyOf": [{"$ref": f"#/$defs/d{n + 1}"}] * 2} for n in range(depth)}
    return {"properties": {"a": {"$ref": "#/$defs/d0"}}, "$defs": branches | {f"d{depth}": {"type": "string"}}}


async def test_good_grammars_pass_and_are_remembered(vetter, guided_vocabulary):
    for source in (
        SchemaSource(INTEGER),
        SchemaTextSource(json.dumps(INTEGER)),
        SchemaSource({"type": "array", "items": {"type": "null"}}, needs_properties=False),
        SchemaSource({"properties": {"tree": {"$ref": "#"}}}),
        SchemaSource(doubling(30)),
        RegexSource("(a+)+b"),
        RegexSource(r"^\d{4}-\w*$"),
    ):
        first = await vetter.vet(source, guided_vocabulary)
        assert isinstance(first, Vetted), (source, first)
        assert await vetter.vet(source, guided_vocabulary) is first


@pytest.mark.parametrize(
    ("source", "rule", "reason"),
    [
        (SchemaTextSource("{"), "invalid", "Input data was truncated"),
        (SchemaTextSource("5"), "invalid", "5 is not of type 'object', 'boolean'"),
        (SchemaSource({"type": "object"}), "invalid", "Grammar must have a 'properties' field"),
        (SchemaSource({"properties": 5}), "invalid", "5 is not of type 'object'"),
        (
            SchemaSource({"properties": {"a": {"type": "strin"}}}),
            "invalid",
            "'strin' is not valid under any of the given schemas",
        ),
        (SchemaSource({"properties": {"a": {"not": {}}}}), "uncompilable", 'Unimplemented keys: ["not"]'),
        (
            SchemaSource({"properties": {"a": {"$ref": "http://127.0.0.1/schema"}}}),
            "uncompilable",
            "Resource 'http://127.0.0.1/schema' is not present in a registry and retrieving it failed: "
            "Default retriever does not fetch resources",
        ),
        (
            SchemaSource({"properties": {"a": {"const": 1}}, "required": ["b"], "additionalProperties": False}),
            "uncompilable",
            "Unsatisfiable schema: required property 'b' is unsatisfiable",
        ),
        (SchemaSource({"properties": {"a": {"pattern": "\ud800"}}}), "invalid", "it is not Unicode"),
        # Deep, wide, long.
        (SchemaTextSource("[" * 100_000), "invalid", None),
        (SchemaSource(nested(120)), None, None),
        (SchemaTextSource(json.dumps(nested(400))), None, None),
        (SchemaSource({"properties": {f"k{n}": {"type": "string"} for n in range(2000)}}), "uncompilable", None),
        (
            SchemaSource({"properties": {"a": {"enum": [str(n) for n in range(10_000)]}}}),
            "uncompilable",
            "it is longer than 65536 bytes",
        ),
        (RegexSource("a(?=b)"), "invalid", None),
        (RegexSource("(" * 30_000), "invalid", None),
        (RegexSource("(a)\\1"), "invalid", None),
        (RegexSource("[^\\x{0}-\\x{10FFFF}]"), "invalid", None),
        (RegexSource("x" * 100_000), "invalid", "it is longer than 65536 bytes"),
    ],
)
async def test_a_grammar_that_cannot_be_is_told_why_and_the_next_one_passes(
    vetter, guided_vocabulary, source: GrammarSource, rule: str | None, reason: str | None
):
    reply = await vetter.vet(source, guided_vocabulary)
    assert isinstance(reply, Refused)
    assert rule in (None, reply.rule)
    assert reason in (None, reply.reason)
    assert len(reply.reason) <= 1000
    assert isinstance(await vetter.vet(RegexSource("a"), guided_vocabulary), Vetted)


async def test_a_grammar_that_takes_too_long_fails_alone(vetter, guided_vocabulary):
    """One that would keep the helper busy for several seconds."""
    slow = SchemaSource({"properties": {f"{n}": {} for n in range(6000)}})
    sources = (RegexSource("a"), slow, RegexSource("b"))
    replies = await asyncio.gather(*(vetter.vet(source, guided_vocabulary) for source in sources))
    assert [type(reply) for reply in replies] == [Vetted, Refused, Vetted]
    assert replies[1] == Refused("uncompilable", "it takes too long")
    assert await vetter.vet(slow, guided_vocabulary) is replies[1]


async def test_a_tokenizer_that_cannot_be_guided_allows_no_grammar(vetter, tmp_path):
    path = tmp_path / "tokenizer.json"
    path.write_text('{"model": {"type": "WordLevel", "vocab": {"a": 0, "</s>": 1}, "unk_token": "a"}}')
    reply = await vetter.vet(RegexSource("a"), GuidedVocabulary(path, 2, {1}))
    assert reply == Refused("unsupported")


def test_objects_are_closed_where_that_is_what_the_schema_means():
    inner = {"properties": {"x": {}}}
    shut = {"properties": {"x": {}}, "type": "object", "additionalProperties": False}
    assert closed(inner) == shut
    assert closed({"anyOf": [inner, {"type": "null"}]}) == {"anyOf": [shut, {"type": "null"}]}
    assert closed({"$defs": {"d": inner}, "items": inner}) == {"$defs": {"d": shut}, "items": shut}
    assert closed({"type": "array", "items": inner})["items"] == shut
    for open_one in (
        inner | {"type": "object", "additionalProperties": {"type": "string"}},
        inner | {"type": "object", "patternProperties": {"^s_": {}}},
        inner | {"type": "object", "required": ["y"]},
        {"allOf": [inner, {"properties": {"y": {}}}]},
        {"$defs": {"d": inner}, "properties": {"y": {}}, "$ref": "#/$defs/d"},
    ):
        assert closed(open_one) == open_one
