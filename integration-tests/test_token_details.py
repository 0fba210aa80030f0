"""What live servers tell of tokens, against a forward pass of `transformers`: with one rank and with two, with a prefix
cache, prompts in chunks and too little memory for all."""

import json
import math
import random
import statistics
import urllib.error
import urllib.request
from functools import partial

import openai
import pytest
import torch
from huggingface_hub import InferenceClient
from transformers import AutoModelForCausalLM, WatermarkingConfig

from bros_router.model_source import demo_model_path

BLOCK_SIZE = 16
TOLERANCE = 1e-3


@pytest.fixture(scope="module")
def model():
    return AutoModelForCausalLM.from_pretrained(demo_model_path(), dtype=torch.float32)


@pytest.fixture(scope="module", params=["1", "2"], ids=["1 rank", "2 ranks"])
def small_server(launch, request):
    """40 blocks: a few of the prompts below at a time, each in several chunks."""
    flags = ("--dtype", "float32", "--block-size", str(BLOCK_SIZE), "--kv-slots-limit", str(40 * BLOCK_SIZE))
    flags += ("--max-total-tokens", "320", "--kv-host-memory", "32MiB", "--max-batch-prefill-tokens", "48")
    flags += ("--enable-prefill-logprobs", "--max-best-of", "4", "--num-shard", request.param)
    return launch(*flags).wait_until_ready()


def post(server, path: str, body: dict, **headers: str) -> dict:
    request = urllib.request.Request(
        server.url + path, json.dumps(body).encode(), {"Content-Type": "application/json"} | headers
    )
    with urllib.request.urlopen(request, timeout=120) as reply:
        return json.load(reply)


def details(server, prompt: str, request_class: str = "rt", **parameters) -> dict:
    """The details of 24 tokens."""
    parameters = {"max_new_tokens": 24, "ignore_eos": True, "details": True} | parameters
    body = {"inputs": prompt, "parameters": parameters}
    return post(server, "/generate", body, **{"x-request-class": request_class})["details"]


def expected_logprobs(model, token_ids: list[int]) -> torch.Tensor:
    """Log-softmax at each position but the first, (len(token_ids) - 1, vocab_size)."""
    with torch.inference_mode():
        return model(torch.tensor([token_ids])).logits[0, :-1].log_softmax(-1)


def code(generator: random.Random, num_lines: int) -> str:
    names = ["value", "other", "count", "total", "index", "result", "number", "name"]
    return "".join(
        f"    {generator.choice(names)} = {generator.choice(names)} + {generator.randrange(10)}\n"
        for _ in range(num_lines)
    )


def check_likely_tokens(listed: list[dict], row: torch.Tensor, count: int) -> None:
    values = row.topk(count).values
    assert len(listed) >= count
    assert [token["logprob"] for token in listed[:count]] == pytest.approx(values.tolist(), abs=TOLERANCE)
    for token in listed:
        assert token["logprob"] == pytest.approx(float(row[token["id"]]), abs=TOLERANCE)


def test_prompts_and_likely_tokens_are_those_of_a_forward_pass(small_server, model, contend):
    generator = random.Random(1)
    prefixes = [f"def function_{number}(value, other):\n" + code(generator, 8) for number in range(3)]
    prompts = [generator.choice(prefixes) + code(generator, generator.randrange(1, 5)) for _ in range(24)]

    def ask(number: int) -> dict:
        # Every third neither asks for anything nor is kept from what the cache holds.
        wishes = {} if number % 3 == 0 else {"decoder_input_details": number % 3 == 1, "top_n_tokens": 5}
        return details(small_server, prompts[number], ("rt", "be")[number % 2], **wishes)

    calls = [partial(ask, number) for number in range(24)]
    replies = contend(small_server, calls[1::2], calls[::2])
    assert small_server.metric('bros_preemptions_total{class="be"}') > 0
    assert small_server.metric('bros_prompt_tokens_cached_total{class="rt"}') > 0
    for number, reply in zip((*range(1, 24, 2), *range(0, 24, 2)), replies, strict=True):
        prompt = post(small_server, "/tokenize", {"inputs": prompts[number]})
        token_ids = [token["id"] for token in (*prompt, *reply["tokens"])]
        expected = expected_logprobs(model, token_ids)
        assert [token["id"] for token in reply["tokens"]] == expected[len(prompt) - 1 :].argmax(-1).tolist()
        for token, row in zip(reply["tokens"], expected[len(prompt) - 1 :], strict=True):
            assert token["logprob"] == pytest.approx(float(row[token["id"]]), abs=TOLERANCE)
        if number % 3 == 0:
            assert "top_tokens" not in reply
        else:
            for listed, row in zip(reply["top_tokens"], expected[len(prompt) - 1 :], strict=True):
                check_likely_tokens(listed, row, 5)
        if number % 3 == 1:
            assert [token["id"] for token in reply["prefill"]] == token_ids[: len(prompt)]
            assert reply["prefill"][0]["logprob"] is None
            told = [token["logprob"] for token in reply["prefill"][1:]]
            values = expected[: len(prompt) - 1].gather(1, torch.tensor(token_ids)[1 : len(prompt), None])[:, 0]
            assert told == pytest.approx(values.tolist(), abs=TOLERANCE)
        else:
            assert reply["prefill"] == []


def test_the_best_of_several_is_one_of_them_and_its_seed_gives_it_again(small_server):
    best = details(small_server, "def f(", best_of=4, do_sample=True, max_new_tokens=12)
    sequences = [best, *best["best_of_sequences"]]
    means = [statistics.fmean(token["logprob"] for token in sequence["tokens"]) for sequence in sequences]
    assert max(means) == means[0]
    assert len({sequence["seed"] for sequence in sequences}) == 4
    for sequence in sequences:
        again = details(small_server, "def f(", do_sample=True, seed=sequence["seed"], max_new_tokens=12)
        assert [token["id"] for token in again["tokens"]] == [token["id"] for token in sequence["tokens"]]


def test_marked_text_is_that_of_transformers(small_server, model):
    prompt = "Return the"
    token_ids = [token["id"] for token in post(small_server, "/tokenize", {"inputs": prompt})]
    mark = WatermarkingConfig(greenlist_ratio=0.5, bias=2.0, hashing_key=15485863, seeding_scheme="lefthash")
    expected = model.generate(
        torch.tensor([token_ids]),
        attention_mask=torch.ones(1, len(token_ids), dtype=torch.int64),
        watermarking_config=mark,
        do_sample=False,
        max_new_tokens=24,
        eos_token_id=-1,  # none ends it
        pad_token_id=0,
    )[0, len(token_ids) :]
    marked = details(small_server, prompt, watermark=True)
    assert [token["id"] for token in marked["tokens"]] == expected.tolist()
    assert marked["tokens"] != details(small_server, prompt)["tokens"]


# --- clients


@pytest.fixture(scope="module")
def client(small_server) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{small_server.url}/v1", api_key="-", max_retries=0)


CHAT = {"model": "m", "messages": [{"role": "user", "content": "What does str.strip do?"}], "max_tokens": 8}


def test_openais_client_asks_for_choices_and_likely_tokens(client):
    plain = client.chat.completions.create(**CHAT, seed=5, n=3, logprobs=True, top_logprobs=2)
    assert [choice.index for choice in plain.choices] == [0, 1, 2]
    assert all(len(item.top_logprobs) >= 2 for choice in plain.choices for item in choice.logprobs.content)
    assert plain.usage.completion_tokens == sum(len(choice.logprobs.content) for choice in plain.choices)
    texts = ["", "", ""]
    for chunk in client.chat.completions.create(**CHAT, seed=5, n=3, stream=True):
        (choice,) = chunk.choices
        texts[choice.index] += choice.delta.content
    assert texts == [choice.message.content for choice in plain.choices]
    for index, text in enumerate(texts):
        assert client.chat.completions.create(**CHAT, seed=5 + index).choices[0].message.content == text


def test_choices_go_on_unchanged_where_a_rank_is_replaced(client, small_server):
    wishes = {"seed": 3, "n": 2, "presence_penalty": 1.5, "logit_bias": {7: -5}, "logprobs": 2, "max_tokens": 100}

    def stream():
        return client.completions.create(model="m", prompt="def f(", stream=True, **wishes)

    def tokens_of(chunks) -> list[list[str]]:
        tokens: list[list[str]] = [[], []]
        for chunk in chunks:
            (choice,) = chunk.choices
            tokens[choice.index] += choice.logprobs.tokens
        return tokens

    undisturbed = tokens_of(stream())
    disturbed = iter(stream())
    first = [next(disturbed) for _ in range(8)]
    small_server.ranks[-1].kill()
    assert tokens_of([*first, *disturbed]) == undisturbed


def test_openais_client_asks_how_likely_a_prompt_is(client, small_server, model):
    prompt = "def strip(self):"
    reply = client.completions.create(model="m", prompt=prompt, max_tokens=4, temperature=0, logprobs=2, echo=True)
    (choice,) = reply.choices
    token_ids = [token["id"] for token in post(small_server, "/tokenize", {"inputs": prompt})]
    expected = expected_logprobs(model, token_ids)
    told = choice.logprobs
    assert (told.token_logprobs[0], told.top_logprobs[0]) == (None, None)
    values = expected.gather(1, torch.tensor(token_ids)[1:, None])[:, 0].tolist()
    assert told.token_logprobs[1 : len(token_ids)] == pytest.approx(values, abs=TOLERANCE)
    for tops, row in zip(told.top_logprobs[1:], expected, strict=False):
        assert max(tops.values()) == pytest.approx(float(row.max()), abs=TOLERANCE)
    assert choice.text.startswith(prompt)
    assert len(told.tokens) == len(told.text_offset) == len(token_ids) + reply.usage.completion_tokens
    for token, offset in zip(told.tokens, told.text_offset, strict=True):
        assert choice.text.startswith(token, offset) or token.startswith("<")


def test_openais_client_biases_tokens_and_penalises_what_was_said(client, small_server):
    ids = [post(small_server, "/tokenize", {"inputs": letter})[-1]["id"] for letter in "xy"]
    greedy = {"model": "m", "prompt": "f(x, y", "temperature": 0, "logprobs": 2}
    assert client.completions.create(**greedy, logit_bias={ids[0]: 100}, max_tokens=12).choices[0].text == "x" * 12
    # Of these two, the one that was said is less likely by what was asked for; that the prompt says both is nothing.
    bias = dict.fromkeys(ids, 100)
    plain = client.completions.create(**greedy, logit_bias=bias, max_tokens=2).choices[0].logprobs
    less = client.completions.create(**greedy, logit_bias=bias, max_tokens=2, presence_penalty=1.5).choices[0].logprobs
    (said, _), (other,) = plain.tokens, {"x", "y"} - {plain.tokens[0]}
    gaps = [told.top_logprobs[1][said] - told.top_logprobs[1][other] for told in (plain, less)]
    assert gaps[0] - gaps[1] == pytest.approx(1.5, abs=TOLERANCE)


def test_hub_client_asks_for_details(small_server):
    hub = InferenceClient(base_url=small_server.url)
    output = hub.text_generation(
        "Return the",
        max_new_tokens=6,
        details=True,
        do_sample=True,
        best_of=2,
        top_n_tokens=2,
        decoder_input_details=True,
        watermark=True,
    )
    assert len(output.details.best_of_sequences) == 1
    assert [token.logprob is None for token in output.details.prefill] == [True, False]
    assert all(len(tops) >= 2 for tops in output.details.top_tokens)
    events = [*hub.text_generation("Return the", max_new_tokens=3, stream=True, details=True, top_n_tokens=2)]
    assert all(len(event.top_tokens) >= 2 for event in events)


@pytest.mark.parametrize(
    ("path", "body", "message"),
    [
        (
            "/generate",
            {"inputs": "x", "parameters": {"best_of": 5}},
            "`best_of` must be > 0 and <= 4. Given: 5",
        ),
        (
            "/generate",
            {"inputs": "x", "parameters": {"best_of": 2}},
            "you must use sampling when `best_of` is > 1",
        ),
        (
            "/generate",
            {"inputs": "x", "parameters": {"top_n_tokens": 2**31}},
            "`top_n_tokens` must be >= 0 and <= 5. Given: 2147483648",
        ),
        ("/v1/completions", {"prompt": "x", "n": 2**31}, "`n` must be > 0 and <= 4. Given: 2147483648"),
        (
            "/v1/completions",
            {"prompt": "x", "logit_bias": {"4000000000": 1}},
            "`logit_bias` must name token ids < VOCABULARY. Given: 4000000000",
        ),
    ],
)
def test_what_is_out_of_range_is_told_and_harms_nobody(small_server, model, path, body, message):
    with pytest.raises(urllib.error.HTTPError) as caught:
        post(small_server, path, body)
    expected = message.replace("VOCABULARY", str(model.config.vocab_size))
    assert json.load(caught.value)["error"] == f"Input validation error: {expected}"
    assert not math.isnan(details(small_server, "x", max_new_tokens=1)["tokens"][0]["logprob"])
