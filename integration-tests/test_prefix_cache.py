"""Prompts that begin alike, on live servers: the same replies as without a cache, and less work."""

import itertools
import json
import random
import urllib.request
from functools import partial

import pytest

NUM_NEW_TOKENS = 12
BLOCK_SIZE = 16
CACHED = 'bros_prompt_tokens_cached_total{{class="{}"}}'


def generate(server, prompt: str, request_class: str, num_new_tokens: int = NUM_NEW_TOKENS) -> str:
    """Greedy text of exactly `num_new_tokens` tokens."""
    request = urllib.request.Request(
        f"{server.url}/generate",
        json.dumps({"inputs": prompt, "parameters": {"max_new_tokens": num_new_tokens, "ignore_eos": True}}).encode(),
        {"Content-Type": "application/json", "x-request-class": request_class},
    )
    with urllib.request.urlopen(request, timeout=120) as reply:
        return json.load(reply)["generated_text"]


def num_tokens(server, text: str) -> int:
    """Tokens of a text."""
    request = urllib.request.Request(
        f"{server.url}/tokenize", json.dumps({"inputs": text}).encode(), {"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(request, timeout=60) as reply:
        return len(json.load(reply))


@pytest.fixture(scope="module", params=["1", "2"], ids=["1 rank", "2 ranks"])
def small_server(launch, request):
    """40 blocks: a few of the prompts below at a time."""
    flags = ("--dtype", "float32", "--block-size", str(BLOCK_SIZE), "--kv-slots-limit", str(40 * BLOCK_SIZE))
    flags += ("--max-total-tokens", "320", "--kv-host-memory", "32MiB", "--num-shard", request.param)
    return launch(*flags).wait_until_ready()


@pytest.fixture(scope="module")
def plain_server(launch):
    return launch("--dtype", "float32", "--disable-prefix-caching").wait_until_ready()


def test_replies_are_the_same_with_cache_and_without_whoever_else_reads_it(small_server, plain_server, contend):
    generator = random.Random(1)
    names = ["value", "other", "count", "total", "index", "result", "number", "name"]

    def code(num_lines: int) -> str:
        return "".join(
            f"    {generator.choice(names)} = {generator.choice(names)} + {generator.randrange(10)}\n"
            for _ in range(num_lines)
        )

    prefixes = [f"def function_{number}(value, other):\n" + code(generator.randrange(2, 9)) for number in range(10)]
    prompts = [prefix + code(generator.randrange(1, 4)) for prefix, _ in itertools.product(prefixes, range(8))]
    generator.shuffle(prompts)

    def replies_of(server) -> list[str]:
        best_effort = [partial(generate, server, prompt, "be", 2 * NUM_NEW_TOKENS) for prompt in prompts[::2]]
        return contend(server, best_effort, [partial(generate, server, prompt, "rt") for prompt in prompts[1::2]])

    assert replies_of(small_server) == replies_of(plain_server)
    for request_class in ("rt", "be"):
        assert small_server.metric(CACHED.format(request_class)) > 0
        assert plain_server.metric(CACHED.format(request_class)) == 0
    assert small_server.metric('bros_preemptions_total{class="be"}') > 0


def test_what_was_generated_is_not_computed_again_as_part_of_the_next_prompt(small_server):
    prompt = "class Conversation:\n    def first(self, value):\n        return value\n"
    said = prompt + generate(small_server, prompt, "rt", 80)
    num_cached = small_server.metric(CACHED.format("rt"))
    generate(small_server, said + "    def second(self, value):\n", "rt")
    num_cached = small_server.metric(CACHED.format("rt")) - num_cached
    # The text may be cut into tokens a little differently than it was generated.
    assert num_tokens(small_server, prompt) < num_cached <= num_tokens(small_server, said)
    assert num_cached % BLOCK_SIZE == 0
