"""Servers that guess: the same replies as one that does not, in fewer steps, whatever else happens to them."""

import concurrent.futures
import itertools
import json
import random
import urllib.request

import pytest

BLOCK_SIZE = 16
ACCEPTED = 'bros_speculative_tokens_total{outcome="accepted"}'
REJECTED = 'bros_speculative_tokens_total{outcome="rejected"}'
#: What changes logits needs to know which tokens came before a guess.
WISHES = (
    {},
    {"do_sample": True, "seed": 7, "temperature": 0.7, "top_p": 0.9},
    {"repetition_penalty": 1.05, "top_n_tokens": 3},
    {"do_sample": True, "seed": 8, "temperature": 0.5, "frequency_penalty": 0.2},
    {"watermark": True},
    {"stop": ["return"]},
)


def generate(server, prompt: str, request_class: str, parameters: dict) -> dict:
    """A reply with its details, without what is not the same twice."""
    body = {"inputs": prompt, "parameters": {"max_new_tokens": 60, "details": True} | parameters}
    request = urllib.request.Request(
        f"{server.url}/generate",
        json.dumps(body).encode(),
        {"Content-Type": "application/json", "x-request-class": request_class},
    )
    with urllib.request.urlopen(request, timeout=120) as reply:
        answer = json.load(reply)
    for token in [*answer["details"]["tokens"], *itertools.chain(*answer["details"].get("top_tokens", []))]:
        token["logprob"] = round(token["logprob"], 3)
    return answer


@pytest.fixture(scope="module", params=["1", "2"], ids=["1 rank", "2 ranks"])
def guessing_server(launch, request):
    """40 blocks: a few of the prompts below at a time."""
    flags = ("--dtype", "float32", "--block-size", str(BLOCK_SIZE), "--kv-slots-limit", str(40 * BLOCK_SIZE))
    flags += ("--max-total-tokens", "320", "--kv-host-memory", "32MiB", "--speculate", "4")
    return launch(*flags, "--num-shard", request.param).wait_until_ready()


def code(generator: random.Random, num_lines: int) -> str:
    names = ["value", "other", "count"]
    return "".join(f"    self.{name} = {name}\n" for name in (generator.choice(names) for _ in range(num_lines)))


def test_replies_are_the_same_with_guesses_and_without(server, guessing_server):
    generator = random.Random(2)
    prompts = [f"def function_{number}(self, value, other, count):\n" + code(generator, 8) for number in range(24)]
    wishes = [WISHES[number % len(WISHES)] for number in range(len(prompts))]
    classes = [("rt", "be")[number // len(WISHES) % 2] for number in range(len(prompts))]
    with concurrent.futures.ThreadPoolExecutor(12) as threads:
        expected = [*threads.map(generate, itertools.repeat(server), prompts, classes, wishes)]
        assert [*threads.map(generate, itertools.repeat(guessing_server), prompts, classes, wishes)] == expected
    # How many are allowed beside others depends on how long steps take on this machine.
    assert guessing_server.metric(ACCEPTED) > 0
    assert guessing_server.metric(REJECTED) > 0
    assert guessing_server.metric("tgi_request_skipped_tokens_sum") == guessing_server.metric(ACCEPTED)
    assert server.metric(ACCEPTED) == 0


def test_a_text_that_repeats_itself_takes_fewer_steps(guessing_server):
    prompt = "a = 1\nb = 2\nc = 3\n" * 6
    steps = 'tgi_batch_inference_count{method="decode"}'
    num_steps, num_accepted = guessing_server.metric(steps), guessing_server.metric(ACCEPTED)
    reply = generate(guessing_server, prompt, "rt", {"max_new_tokens": 120, "ignore_eos": True})
    assert len(reply["details"]["tokens"]) == 120
    assert guessing_server.metric(steps) - num_steps < 80
    assert guessing_server.metric(ACCEPTED) - num_accepted > 12


def test_guided_replies_are_not_guessed(guessing_server):
    num_guesses = guessing_server.metric(ACCEPTED) + guessing_server.metric(REJECTED)
    grammar = {"type": "regex", "value": "(ab){12}"}
    reply = generate(guessing_server, "ab" * 20, "rt", {"grammar": grammar})
    assert reply["generated_text"] == "ab" * 12
    assert guessing_server.metric(ACCEPTED) + guessing_server.metric(REJECTED) == num_guesses
