"""The generate routes as curl sees them, and the text they give against `transformers`."""

import json
import subprocess

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from bros_router.model_source import demo_model_path

PROMPT = "The module defines"


def curl(*arguments: str) -> str:
    return subprocess.run(
        ["curl", "--silent", "--show-error", "--max-time", "60", *arguments], capture_output=True, text=True, check=True
    ).stdout


def post(url: str, body: dict) -> str:
    return curl(url, "-X", "POST", "-H", "Content-Type: application/json", "-d", json.dumps(body))


@pytest.fixture(scope="module")
def greedy_ids() -> list[int]:
    """What `transformers` generates for `PROMPT`, 24 tokens, greedily, in float32."""
    tokenizer = AutoTokenizer.from_pretrained(demo_model_path())
    model = AutoModelForCausalLM.from_pretrained(demo_model_path(), dtype=torch.float32)
    inputs = tokenizer(PROMPT, return_tensors="pt")
    output = model.generate(**inputs, max_new_tokens=24, do_sample=False, eos_token_id=None)
    return output[0, inputs.input_ids.shape[1] :].tolist()


def test_generate_gives_the_text_of_transformers(server, greedy_ids):
    parameters = {"max_new_tokens": 24, "details": True, "ignore_eos": True}
    reply = json.loads(post(f"{server.url}/generate", {"inputs": PROMPT, "parameters": parameters}))
    assert [token["id"] for token in reply["details"]["tokens"]] == greedy_ids
    assert reply["generated_text"] == "".join(t["text"] for t in reply["details"]["tokens"] if not t["special"])
    assert reply["details"]["finish_reason"] == "length"
    assert reply["details"]["generated_tokens"] == 24
    assert reply["details"]["seed"] is None
    assert all(token["logprob"] <= 0 for token in reply["details"]["tokens"])


def test_generate_stream_gives_one_event_a_token(server, greedy_ids):
    parameters = {"max_new_tokens": 24, "details": True, "ignore_eos": True}
    text = post(f"{server.url}/generate_stream", {"inputs": PROMPT, "parameters": parameters})
    assert text.endswith("\n\n")
    frames = text.removesuffix("\n\n").split("\n\n")
    assert all(frame.startswith("data: {") for frame in frames)
    events = [json.loads(frame.removeprefix("data: ")) for frame in frames]
    assert [event["token"]["id"] for event in events] == greedy_ids
    assert [event["index"] for event in events] == list(range(1, 25))
    assert [event["generated_text"] for event in events[:-1]] == [None] * 23
    assert events[-1]["generated_text"] == "".join(e["token"]["text"] for e in events if not e["token"]["special"])
    assert events[-1]["details"]["input_length"] == len(
        AutoTokenizer.from_pretrained(demo_model_path())(PROMPT).input_ids
    )


def test_compat_route_answers_with_an_array_and_the_full_text(server):
    (reply,) = json.loads(post(server.url, {"inputs": PROMPT, "parameters": {"max_new_tokens": 2}}))
    assert reply["generated_text"].startswith(PROMPT)


def test_same_seed_gives_same_text_beside_other_requests(server):
    body = {"inputs": PROMPT, "parameters": {"do_sample": True, "seed": 7, "max_new_tokens": 20, "temperature": 0.9}}
    alone = post(f"{server.url}/generate", body)
    crowd = [
        subprocess.Popen(
            ["curl", "-s", f"{server.url}/generate", "-H", "Content-Type: application/json", "-d", json.dumps(request)],
            stdout=subprocess.PIPE,
            text=True,
        )
        for request in [body, *({"inputs": f"{PROMPT} {i}", "parameters": {"max_new_tokens": 30}} for i in range(6))]
    ]
    beside_others, *_ = [process.communicate(timeout=60)[0] for process in crowd]
    other_seed = post(f"{server.url}/generate", {**body, "parameters": {**body["parameters"], "seed": 8}})
    assert beside_others == alone
    assert other_seed != alone


def test_stop_sequence_ends_the_reply_and_stays_in_it(server, greedy_ids):
    tokenizer = AutoTokenizer.from_pretrained(demo_model_path())
    stop = tokenizer.decode(greedy_ids[5])
    parameters = {"max_new_tokens": 24, "stop": [stop], "details": True}
    reply = json.loads(post(f"{server.url}/generate", {"inputs": PROMPT, "parameters": parameters}))
    first = next(i for i, token_id in enumerate(greedy_ids) if tokenizer.decode(greedy_ids[: i + 1]).endswith(stop))
    assert reply["details"]["finish_reason"] == "stop_sequence"
    assert reply["details"]["generated_tokens"] == first + 1
    assert reply["generated_text"].endswith(stop)


def test_headers_and_probes(server):
    head = curl(
        "-i",
        f"{server.url}/generate",
        "-H",
        "Content-Type: application/json",
        "-d",
        '{"inputs":"a","parameters":{"max_new_tokens":4}}',
    )
    status, *lines = head.split("\n\n")[0].splitlines()
    headers = dict(line.lower().split(": ", 1) for line in lines)
    assert status == "HTTP/1.1 200 OK"
    assert headers["x-compute-type"].startswith("1-")
    assert int(headers["x-prompt-tokens"]) == 1
    assert int(headers["x-generated-tokens"]) >= 1
    assert headers["x-request-class"] == "rt"
    for path in ("/health", "/ping", "/"):
        assert curl("-i", server.url + path).startswith("HTTP/1.1 200 OK")
    info = json.loads(curl(f"{server.url}/info"))
    assert info["model_id"] == "bros-demo"
    assert info["max_input_tokens"] < info["max_total_tokens"]
    assert json.loads(curl(f"{server.url}/v1/models"))["data"][0]["id"] == "bros-demo"
    assert "tgi_request_count" in curl(f"{server.url}/metrics")


def test_tokenize_agrees_with_transformers(server):
    text = "def größe(x): return x  # ✓"
    tokens = json.loads(post(f"{server.url}/tokenize", {"inputs": text}))
    assert [t["id"] for t in tokens] == AutoTokenizer.from_pretrained(demo_model_path())(text).input_ids
