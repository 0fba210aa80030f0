"""Unmodified clients against the live server: Hugging Face's hub client, and TGI's own."""

import json
import re
import subprocess
from pathlib import Path

import pytest
from huggingface_hub import InferenceClient
from huggingface_hub.errors import HfHubHTTPError, ValidationError

REPOSITORY = Path(__file__).parents[1]
PROMPT = "Return the"


@pytest.fixture(scope="module")
def client(server) -> InferenceClient:
    return InferenceClient(base_url=server.url)


def test_hub_client_plain(client):
    text = client.text_generation(PROMPT, max_new_tokens=8)
    assert isinstance(text, str)
    assert text == client.text_generation(PROMPT, max_new_tokens=8)


def test_hub_client_details(client):
    output = client.text_generation(PROMPT, max_new_tokens=8, details=True, do_sample=True, seed=1)
    assert output.details.finish_reason in ("length", "eos_token")
    assert output.details.generated_tokens == len(output.details.tokens)
    assert output.details.seed == 1
    # On `POST /`, where this client sends to, the prompt comes back with the reply unless asked otherwise.
    assert output.generated_text == PROMPT + "".join(t.text for t in output.details.tokens if not t.special)


def test_hub_client_grammar(client):
    grammar = {"type": "regex", "value": "[0-9]{2}-[a-f]{3}"}
    text = client.text_generation(PROMPT, max_new_tokens=16, grammar=grammar, return_full_text=False)
    assert re.fullmatch(grammar["value"], text)
    schema = {
        "type": "object",
        "properties": {"n": {"type": "integer", "minimum": 0, "maximum": 99}},
        "required": ["n"],
    }
    grammar = {"type": "json", "value": schema}
    assert list(json.loads(client.text_generation(PROMPT, grammar=grammar, return_full_text=False))) == ["n"]


def test_hub_client_tools(client):
    """In TGI's own form of a format, and with a tool by name."""
    messages = [{"role": "user", "content": "What is the weather?"}]
    schema = {"type": "object", "properties": {"place": {"enum": ["Rio", "Bonn"]}}, "required": ["place"]}
    reply = client.chat_completion(messages, response_format={"type": "json", "value": schema}, temperature=0.0)
    assert json.loads(reply.choices[0].message.content)["place"] in ("Rio", "Bonn")
    tools = [{"type": "function", "function": {"name": "weather", "description": "", "parameters": schema}}]
    choice = {"function": {"name": "weather"}}
    reply = client.chat_completion(messages, tools=tools, tool_choice=choice, temperature=0.0)
    (call,) = reply.choices[0].message.tool_calls
    assert json.loads(call.function.arguments)["place"] in ("Rio", "Bonn")
    stream = client.chat_completion(messages, tools=tools, tool_choice=choice, temperature=0.0, stream=True)
    deltas = [delta for chunk in stream for delta in chunk.choices[0].delta.tool_calls or ()]
    assert deltas[0].function.name == "weather"
    joined = "".join(delta.function.arguments for delta in deltas)
    assert json.loads(joined) == json.loads(call.function.arguments)


def test_hub_client_stream_joins_to_the_plain_text(client):
    plain = client.text_generation(PROMPT, max_new_tokens=8, return_full_text=False)
    assert "".join(client.text_generation(PROMPT, max_new_tokens=8, stream=True)) == plain
    events = list(client.text_generation(PROMPT, max_new_tokens=8, return_full_text=False, stream=True, details=True))
    assert events[-1].generated_text == plain
    assert events[-1].details.generated_tokens == len(events)


def test_hub_client_gets_the_validation_error(client):
    with pytest.raises(ValidationError, match="`temperature` must be strictly positive"):
        client.text_generation(PROMPT, temperature=-1.0)


def test_hub_client_chat(client):
    messages = [{"role": "user", "content": "What does str.strip do?"}]
    reply = client.chat_completion(messages, max_tokens=8, temperature=0.0)
    assert reply.choices[0].message.content
    assert reply.usage.completion_tokens <= 8
    chunks = list(client.chat_completion(messages, max_tokens=8, temperature=0.0, stream=True))
    assert "".join(chunk.choices[0].delta.content for chunk in chunks) == reply.choices[0].message.content
    with pytest.raises(HfHubHTTPError, match="422"):
        client.chat_completion(messages, top_p=1.5)


def test_tgi_client_sync_and_async(server):
    """TGI's client needs an older hub client: it runs in an environment of its own, which `make test` installs."""
    python = REPOSITORY / ".venv-tgi-client" / "bin" / "python"
    script = REPOSITORY / "integration-tests" / "clients" / "tgi_client.py"
    run = subprocess.run([python, script, server.url, PROMPT], capture_output=True, text=True, timeout=120)
    assert run.returncode == 0, run.stderr
    seen = json.loads(run.stdout)
    plain = seen["sync"]["plain"]
    assert plain
    assert seen["sync"]["stream"] == seen["async"]["plain"] == seen["async"]["stream"] == plain
    assert seen["sync"]["finish_reason"] == seen["async"]["finish_reason"]
    assert seen["sync"]["error"] == seen["async"]["error"] == "ValidationError"
    for reply in seen.values():
        assert reply["num_best_of_sequences"] == 1
        assert min(reply["num_top_tokens"]) >= 1
