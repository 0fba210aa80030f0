"""Guided replies on live servers: they match their grammars, and nobody beside them notices."""

import concurrent.futures
import http.client
import json
import os
import re
import urllib.error
import urllib.request
from datetime import date
from typing import Any

import jsonschema
import pytest
import regex
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

BLOCK_SIZE = 16
#: Longer than a chunk, so that prompts are computed in several steps.
PROMPT = "Return the value that the caller asked for, as JSON, and nothing else. " * 3
NUM_FREE = 8
NUM_GUIDED = 6
BE_PREEMPTIONS = 'bros_preemptions_total{class="be"}'
#: Each is eight schemas and four regular expressions.
NUM_EXAMPLES = int(os.environ.get("BROS_GUIDED_EXAMPLES", "3"))
#: As many as fit behind the prompt.
NUM_MORE_TOKENS = 150
#: Every example is many requests: one that fails is shown as it is.
PHASES = (Phase.explicit, Phase.reuse, Phase.generate)


def post(server, path: str, body: dict, **headers: str) -> tuple[int, dict]:
    request = urllib.request.Request(
        server.url + path, json.dumps(body).encode(), {"Content-Type": "application/json", **headers}
    )
    try:
        with urllib.request.urlopen(request, timeout=120) as reply:
            return reply.status, json.load(reply)
    except urllib.error.HTTPError as error:
        return error.code, json.load(error)


def body_of(grammar: dict | None, seed: int, num_tokens: int) -> dict:
    parameters = {"max_new_tokens": num_tokens, "details": True, "do_sample": True, "seed": seed, "temperature": 1.2}
    return {"inputs": f"{seed} {PROMPT}", "parameters": parameters | ({"grammar": grammar} if grammar else {})}


def generate(server, grammar: dict | None, seed: int, num_tokens: int = 48) -> dict:
    """A drawn reply with details; every second request is best-effort."""
    body = body_of(grammar, seed, num_tokens)
    status, reply = post(server, "/generate", body, **{"x-request-class": ("rt", "be")[seed % 2]})
    assert status == 200, reply
    return reply


def token_ids(reply: dict) -> list[int]:
    return [token["id"] for token in reply["details"]["tokens"]]


@pytest.fixture(scope="module", params=["1", "2"], ids=["1 rank", "2 ranks"])
def small_server(launch, request):
    """A region that a third of what a test sends at once fills."""
    flags = ("--dtype", "float32", "--block-size", str(BLOCK_SIZE), "--kv-slots-limit", str(40 * BLOCK_SIZE))
    flags += ("--max-total-tokens", "240", "--max-batch-prefill-tokens", "32", "--kv-host-memory", "8MiB")
    return launch(*flags, "--num-shard", request.param).wait_until_ready()


@pytest.fixture(scope="module")
def free_ids(small_server) -> list[list[int]]:
    """What requests without a grammar are answered when nobody else is there."""
    return [token_ids(generate(small_server, None, seed, 24)) for seed in range(NUM_FREE)]


def num_running(server) -> float:
    """Best-effort sequences that own memory."""
    return server.metric('bros_sequences{class="be",state="running"}')


LEAVES = st.one_of(
    st.builds(lambda n: {"type": "string", "maxLength": n}, st.integers(0, 8)),
    st.builds(lambda values: {"enum": values}, st.lists(st.sampled_from(["é", "a b", '"', 1, None, True]), min_size=1)),
    st.builds(
        lambda a, n: {"type": "integer", "minimum": a, "maximum": a + n}, st.integers(-99, 99), st.integers(0, 99)
    ),
    st.builds(lambda value: {"const": value}, st.sampled_from(["x", 3, False, None, [1, "two"]])),
    st.builds(
        lambda pattern: {"type": "string", "pattern": pattern}, st.sampled_from(["^[a-c]{2,5}$", "^[0-9]{3}-x?$"])
    ),
    st.sampled_from([{"type": "boolean"}, {"type": "null"}, {"type": "string", "format": "date"}]),
)


def objects(values: st.SearchStrategy[dict]) -> st.SearchStrategy[dict]:
    def build(properties: dict, required: set[str]) -> dict:
        return {"type": "object", "properties": properties, "required": sorted(required & properties.keys())}

    names = st.sampled_from(["name", "age", "é", "a b", "_x", "ns/1"])
    return st.builds(build, st.dictionaries(names, values, min_size=1, max_size=3), st.sets(names))


SCHEMAS = objects(
    st.recursive(
        LEAVES,
        lambda values: st.one_of(
            st.builds(lambda items, n: {"type": "array", "items": items, "maxItems": n}, values, st.integers(0, 3)),
            st.builds(lambda branches: {"anyOf": branches}, st.lists(values, min_size=1, max_size=3)),
            objects(values),
        ),
        max_leaves=5,
    )
)
REGEXES = st.recursive(
    st.sampled_from(["a", "[0-9]", "é", "[^x-z\\n]", "\\d{2}", "\\.", "b?", "[A-Z]{1,3}"]),
    lambda parts: st.one_of(
        st.builds("".join, st.lists(parts, min_size=2, max_size=4)),
        st.builds(lambda a, b: f"(?:{a}|{b})", parts, parts),
        st.builds(lambda a, n: f"(?:{a}){{{n},{n + 2}}}", parts, st.integers(0, 2)),
    ),
    max_leaves=6,
)


#: As jsonschema judges formats, but for the years of dates: a grammar has the year 0, and a 29th of February in each.
FORMATS = jsonschema.FormatChecker()


@FORMATS.checks("date", raises=ValueError)
def is_date(value: object) -> bool:
    if not isinstance(value, str):
        return True
    return re.fullmatch("[0-9]{4}-[0-9]{2}-[0-9]{2}", value) is not None and bool(
        date.fromisoformat(f"2000{value[4:]}")
    )


def matches(grammar: dict, text: str, *, is_partial: bool = False) -> bool:
    """As others judge it. A partial text, of a regular expression alone, is one that may become a match."""
    if grammar["type"] == "regex":
        return regex.fullmatch(grammar["value"], text, partial=is_partial) is not None
    schema = grammar["value"]
    jsonschema.validate(json.loads(text), schema, format_checker=FORMATS)
    return list(json.loads(text)) == [name for name in schema["properties"] if name in json.loads(text)]


@given(schemas=st.lists(SCHEMAS, min_size=8, max_size=8), expressions=st.lists(REGEXES, min_size=4, max_size=4))
@settings(max_examples=NUM_EXAMPLES, deadline=None, suppress_health_check=[*HealthCheck], phases=PHASES)
def test_guided_replies_match_and_free_ones_are_what_they_were(small_server, free_ids, schemas, expressions):
    grammars: list[dict[str, Any]] = [{"type": "json", "value": schema} for schema in schemas]
    grammars += [{"type": "regex", "value": expression} for expression in expressions]
    with concurrent.futures.ThreadPoolExecutor(len(grammars) + NUM_FREE) as threads:
        guided = [threads.submit(generate, small_server, grammar, seed) for seed, grammar in enumerate(grammars)]
        free = [threads.submit(generate, small_server, None, seed, 24) for seed in range(NUM_FREE)]
        assert [token_ids(reply.result()) for reply in free] == free_ids
    num_complete = 0
    for seed, (grammar, reply) in enumerate(zip(grammars, [reply.result() for reply in guided], strict=True)):
        text, reason = reply["generated_text"], reply["details"]["finish_reason"]
        if reason == "length":
            check_unfinished(small_server, grammar, seed, reply)
        else:
            assert reason == "eos_token"
            assert matches(grammar, text), (grammar, text)
            num_complete += 1
    assert num_complete >= len(grammars) // 4


def check_unfinished(server, grammar: dict, seed: int, reply: dict) -> None:
    """A reply that was cut off begins as one that matches: JSON, as the one with more tokens, if that ends."""
    text = reply["generated_text"]
    if grammar["type"] == "regex":
        assert matches(grammar, text, is_partial=True), (grammar, text)
        return
    longer = generate(server, grammar, seed, NUM_MORE_TOKENS)
    assert token_ids(longer)[: len(token_ids(reply))] == token_ids(reply)
    if longer["details"]["finish_reason"] == "eos_token":
        assert matches(grammar, longer["generated_text"]), (grammar, longer["generated_text"])


def test_hostile_grammars_end_alone(small_server):
    ranks = [rank.pid for rank in small_server.ranks]
    hostile = [
        {"type": "json", "value": {"properties": {f"{n}": {} for n in range(6000)}}},
        {"type": "json", "value": "[" * 100_000},
        {"type": "json", "value": {"properties": {"a": {"enum": [f"{n}" for n in range(20_000)]}}}},
        {"type": "regex", "value": "(" * 30_000},
        {"type": "regex", "value": "(?:a|" * 300 + "b" + ")" * 300},
    ]
    with concurrent.futures.ThreadPoolExecutor(2 * len(hostile)) as threads:
        refused = [threads.submit(post, small_server, "/generate", body_of(grammar, 1, 8)) for grammar in hostile]
        digits = {"type": "regex", "value": "[0-9]{3}"}
        served = [threads.submit(generate, small_server, digits, seed) for seed in range(len(hostile))]
        assert [reply.result()[0] for reply in refused] == [422] * len(hostile)
        assert all(re.fullmatch("[0-9]{3}", reply.result()["generated_text"]) for reply in served)
    assert [rank.pid for rank in small_server.ranks] == ranks
    assert small_server.get("/health") == ""


def test_best_effort_guided_replies_are_the_same_however_often_they_are_preempted(small_server, eventually):
    letters = {"type": "regex", "value": "[a-z]{60}"}
    seeds = range(1, 2 * NUM_GUIDED, 2)
    alone = [generate(small_server, letters, seed, 64) for seed in seeds]
    assert all(matches(letters, reply["generated_text"]) for reply in alone)
    num_preemptions = small_server.metric(BE_PREEMPTIONS)

    def beside_chats() -> list[dict]:
        with concurrent.futures.ThreadPoolExecutor(NUM_GUIDED + NUM_FREE) as threads:
            batch = [threads.submit(generate, small_server, letters, seed, 64) for seed in seeds]
            eventually(lambda: num_running(small_server) >= 2 or all(job.done() for job in batch), 60)
            while not all(job.done() for job in batch):
                chats = [threads.submit(generate, small_server, None, seed, 24) for seed in range(0, 2 * NUM_FREE, 2)]
                assert all(chat.result() for chat in chats)
            return [job.result() for job in batch]

    for _ in range(10):
        assert [*map(token_ids, beside_chats())] == [*map(token_ids, alone)]
        if small_server.metric(BE_PREEMPTIONS) > num_preemptions:
            return
    pytest.fail("none was preempted")


def test_a_guided_reply_goes_on_when_its_ranks_are_replaced(small_server):
    strings = {"type": "array", "items": {"type": "string"}, "minItems": 30}
    grammar = {"type": "json", "value": {"properties": {"a": strings}, "required": ["a"]}}
    expected = generate(small_server, grammar, 1, 100)
    assert len(token_ids(expected)) > 60
    body = body_of(grammar, 1, 100)
    connection = http.client.HTTPConnection("127.0.0.1", small_server.port, timeout=120)
    connection.request("POST", "/generate_stream", json.dumps(body), {"Content-Type": "application/json"})
    lines = (line for line in connection.getresponse() if line.startswith(b"data: "))
    events = [json.loads(next(lines).removeprefix(b"data: ")) for _ in range(20)]
    small_server.ranks[-1].kill()
    events += [json.loads(line.removeprefix(b"data: ")) for line in lines]
    assert [event["token"]["id"] for event in events] == token_ids(expected)
