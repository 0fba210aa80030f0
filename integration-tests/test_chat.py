"""Chats as curl sees them, against `transformers`; a template that turns on its messages; and TGI's very bytes."""

import json
import re
import subprocess

import psutil
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from bros_router.model_source import demo_model_path

MESSAGES = [
    {"role": "system", "content": "You explain Python."},
    {"role": "user", "content": "What does str.strip do?"},
]


def curl(url: str, body: dict, *options: str) -> str:
    command = ["curl", "--silent", "--show-error", "--max-time", "60", *options, url]
    command += ["-H", "Content-Type: application/json", "--data-binary", "@-"]
    return subprocess.run(command, input=json.dumps(body), capture_output=True, text=True, check=True).stdout


def chat(server, messages=MESSAGES, **fields) -> dict:
    return json.loads(curl(f"{server.url}/v1/chat/completions", {"messages": messages} | fields))


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(demo_model_path())


@pytest.fixture(scope="module")
def greedy_text(tokenizer) -> str:
    """What `transformers` makes of the chat: its own prompt, 24 tokens, greedily, in float32."""
    prompt = tokenizer.apply_chat_template(MESSAGES, tokenize=False, add_generation_prompt=True)
    inputs = tokenizer(prompt, return_tensors="pt", add_special_tokens=False)
    model = AutoModelForCausalLM.from_pretrained(demo_model_path(), dtype=torch.float32)
    output = model.generate(**inputs, max_new_tokens=24, do_sample=False)
    return tokenizer.decode(output[0, inputs.input_ids.shape[1] :], skip_special_tokens=True)


def test_chat_gives_the_text_of_transformers(server, greedy_text):
    reply = chat(server, max_tokens=24, temperature=0)
    assert reply["choices"][0]["message"] == {"role": "assistant", "content": greedy_text}
    assert reply["usage"]["completion_tokens"] <= 24


def test_stream_joins_to_the_whole_reply(server, greedy_text):
    body = {"messages": MESSAGES, "max_tokens": 24, "temperature": 0, "stream": True}
    body["stream_options"] = {"include_usage": True}
    text = curl(f"{server.url}/v1/chat/completions", body, "--no-buffer")
    *frames, done, end = text.split("\n\n")
    assert (done, end) == ("data: [DONE]", "")
    *chunks, usage = [json.loads(frame.removeprefix("data: ")) for frame in frames]
    assert "".join(chunk["choices"][0]["delta"]["content"] for chunk in chunks) == greedy_text
    assert [chunk["choices"][0]["finish_reason"] for chunk in chunks[:-1]] == [None] * (len(chunks) - 1)
    assert usage["usage"]["completion_tokens"] == len(chunks)


def test_chat_tokenize_agrees_with_transformers(server, tokenizer):
    prompt = tokenizer.apply_chat_template(MESSAGES, tokenize=False, add_generation_prompt=True)
    reply = json.loads(curl(f"{server.url}/chat_tokenize", {"messages": MESSAGES}))
    assert reply["templated_text"] == prompt
    ids = [token["id"] for token in reply["tokenize_response"]]
    assert ids == tokenizer(prompt, add_special_tokens=False).input_ids


def test_stop_sequence_is_cut_wherever_tokens_end(server, greedy_text):
    middle = len(greedy_text) // 2
    stop = greedy_text[middle : middle + 5]
    expected = greedy_text[: greedy_text.index(stop)]
    for stream in (False, True):
        body = {"messages": MESSAGES, "max_tokens": 24, "temperature": 0, "stop": stop, "stream": stream}
        text = curl(f"{server.url}/v1/chat/completions", body)
        if stream:
            frames = [json.loads(frame[6:]) for frame in text.split("\n\n")[:-2]]
            choices = [frame["choices"][0] for frame in frames]
            assert "".join(choice["delta"]["content"] for choice in choices) == expected
            assert choices[-1]["finish_reason"] == "stop"
        else:
            choice = json.loads(text)["choices"][0]
            assert (choice["message"]["content"], choice["finish_reason"]) == (expected, "stop")


def test_last_message_of_the_assistant_is_gone_on_with(server, greedy_text):
    begun = greedy_text[: len(greedy_text) // 2].strip()
    messages = [*MESSAGES, {"role": "assistant", "content": begun}]
    prompt = json.loads(curl(f"{server.url}/chat_tokenize", {"messages": messages}))["templated_text"]
    assert prompt.endswith(f"<|im_start|>assistant\n{begun}")


def test_completions_of_a_text_and_of_its_tokens_agree(server, tokenizer):
    prompt = "Return the"
    body = {"prompt": prompt, "max_tokens": 12, "temperature": 0}
    of_text = json.loads(curl(f"{server.url}/v1/completions", body))["choices"]
    of_tokens = json.loads(curl(f"{server.url}/v1/completions", body | {"prompt": tokenizer(prompt).input_ids}))
    generated = json.loads(curl(f"{server.url}/generate", {"inputs": prompt, "parameters": {"max_new_tokens": 12}}))
    assert of_text == of_tokens["choices"]
    assert of_text[0]["text"] == generated["generated_text"]


# --- a template that turns on its messages

HOSTILE = """\
{%- set wish = messages[-1]['content'] -%}
{%- if wish == 'endless' -%}
  {%- for i in range(99999) -%}{%- for j in range(99999) -%}{%- endfor -%}{%- endfor -%}
{%- elif wish == 'huge' -%}
  {%- for i in range(99999) -%}{{- 'a' * 1000 -}}{%- endfor -%}
{%- elif wish == 'greedy' -%}
  {{- 'a' * 10 ** 10 -}}
{%- elif wish == 'import' -%}
  {%- import 'os' as os -%}
{%- elif wish == 'inspect' -%}
  {{- ''.__class__.__mro__ -}}
{%- elif wish == 'refuse' -%}
  {{- raise_exception('No chats today.') -}}
{%- endif -%}
{{- messages | length }} {{ wish -}}
"""


@pytest.fixture(scope="module")
def hostile_server(launch, tmp_path_factory):
    """A server of the demo model with a template that does what the last message asks for."""
    path = tmp_path_factory.mktemp("hostile") / "tokenizer_config.json"
    config = json.loads((demo_model_path() / "tokenizer_config.json").read_text())
    path.write_text(json.dumps(config | {"chat_template": HOSTILE}))
    flags = ("--dtype", "float32", "--kv-cache-memory", "64MiB", "--tokenizer-config-path", str(path))
    return launch(*flags).wait_until_ready()


@pytest.mark.parametrize(
    ("wish", "reason"),
    [
        ("endless", "rendering takes too long"),
        ("huge", "the prompt is longer than 4194304 characters"),
        ("greedy", "rendering takes too much memory"),
        ("import", "the template failed (TypeError)"),
        ("inspect", "access to attribute '__class__' of 'str' object is unsafe."),
        ("refuse", "No chats today."),
    ],
)
@pytest.mark.parametrize("stream", [False, True])
def test_hostile_template_ends_one_request_and_harms_nobody(hostile_server, wish, reason, stream):
    ranks = [rank.pid for rank in hostile_server.ranks]
    body = {"messages": [{"role": "user", "content": wish}], "max_tokens": 1, "stream": stream}
    answer = curl(f"{hostile_server.url}/v1/chat/completions", body, "--write-out", "%{http_code}")
    assert answer == f'{{"error":"Template error: {reason}","error_type":"template_error"}}422'
    assert chat(hostile_server, max_tokens=1)["usage"]["completion_tokens"] == 1
    assert hostile_server.get("/health") == ""
    assert [rank.pid for rank in hostile_server.ranks] == ranks


def test_ten_thousand_messages_and_odd_texts_are_answered(hostile_server):
    prompt = f"{hostile_server.url}/chat_tokenize"
    many = [{"role": "user", "content": str(n)} for n in range(10_000)]
    assert json.loads(curl(prompt, {"messages": many}))["templated_text"] == "10000 9999"
    odd = [{"role": "a\0b", "content": "\0 {{ 7 * 7 }} \U0001f642 </s>"}]
    assert json.loads(curl(prompt, {"messages": odd}))["templated_text"] == "1 \0 {{ 7 * 7 }} \U0001f642 </s>"
    assert curl(prompt, {"messages": [{"role": "user", "content": "\ud800"}]}).startswith(
        "Failed to parse the request body as JSON: "
    )


def test_helper_that_is_killed_is_replaced(hostile_server):
    assert chat(hostile_server, max_tokens=1)["choices"]
    (helper,) = (
        child
        for child in psutil.Process(hostile_server.process.pid).children()
        if "bros_router.chat_templates.helper" in child.cmdline()
    )
    helper.kill()
    helper.wait(10)
    assert chat(hostile_server, max_tokens=1)["choices"]


# --- TGI's bytes


def test_strict_server_answers_tgis_bytes(launch, greedy_text):
    server = launch("--strict-tgi", "--dtype", "float32", "--kv-cache-memory", "64MiB").wait_until_ready()
    version = json.loads(server.get("/info"))["version"]
    body = {"messages": MESSAGES, "max_tokens": 1, "temperature": 0, "stream": True}
    text = re.sub(r'"created":\d+', '"created":0', curl(f"{server.url}/v1/chat/completions", body))
    first = json.dumps(json.loads(text.split("\n\n")[0][6:])["choices"][0]["delta"]["content"], ensure_ascii=False)
    assert greedy_text.startswith(json.loads(first))
    assert text == (
        'data: {"object":"chat.completion.chunk","id":"","created":0,"model":"bros-demo",'
        f'"system_fingerprint":"{version}-native","choices":[{{"index":0,"delta":{{"role":"assistant",'
        f'"content":{first}}},"logprobs":null,"finish_reason":"length"}}],"usage":null}}\n\ndata: [DONE]\n\n'
    )
    refused = curl(f"{server.url}/v1/chat/completions", {"messages": MESSAGES, "stop": "x"})
    assert refused.startswith("Failed to deserialize the JSON body into the target type: stop: ")
    refused = json.loads(curl(f"{server.url}/v1/chat/completions", {"messages": MESSAGES, "top_p": 1.0}))
    assert refused["error"] == "Input validation error: `top_p` must be > 0.0 and < 1.0"
    assert server.stop() == 0
