"""LangChain, LiteLLM and LlamaIndex, unmodified, against the live server: `make frameworks`."""

import json
import os
import subprocess
import urllib.request
from pathlib import Path
from typing import Any

import pytest

REPOSITORY = Path(__file__).parents[1]
PYTHON = REPOSITORY / ".venv-frameworks" / "bin" / "python"
pytestmark = pytest.mark.skipif(not PYTHON.exists(), reason="`make frameworks` installs them: hundreds of megabytes")
#: As in `clients/frameworks.py`.
QUESTION, PROMPT = "What does str.strip do?", "Return a list of the"


def ask(url: str, path: str, **body: Any) -> dict[str, Any]:
    request = urllib.request.Request(
        url + path,
        json.dumps({"max_tokens": 12, "temperature": 0} | body).encode(),
        {"Content-Type": "application/json"},
    )
    with urllib.request.urlopen(request, timeout=60) as reply:
        return json.load(reply)


@pytest.fixture(scope="module")
def told(server) -> dict[str, Any]:
    """What each of them got."""
    run = subprocess.run(
        [PYTHON, REPOSITORY / "integration-tests" / "clients" / "frameworks.py", server.url],
        env=os.environ | {"LITELLM_LOCAL_MODEL_COST_MAP": "True", "OTEL_SDK_DISABLED": "true"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert run.returncode == 0, run.stderr
    return json.loads(run.stdout)


@pytest.fixture(scope="module")
def chat(server) -> str:
    """The reply to the question."""
    reply = ask(server.url, "/v1/chat/completions", messages=[{"role": "user", "content": QUESTION}])
    return reply["choices"][0]["message"]["content"]


@pytest.fixture(scope="module")
def completion(server) -> str:
    """How the prompt goes on."""
    return ask(server.url, "/v1/completions", prompt=PROMPT)["choices"][0]["text"]


def is_answer(value: dict[str, Any]) -> bool:
    return value.keys() == {"kind", "is_list"} and value["kind"] in ("str", "bytes")


def test_langchain_openai(told, chat, completion):
    found = told["langchain_openai"]
    assert found["chat"] == found["chat_stream"] == found["chat_async"] == chat
    assert found["chat_batch"] == [chat, chat]
    assert found["usage"] == 12
    assert found["stream_usage"] == [12]
    assert len(found["num_likely"]) == 12
    assert min(found["num_likely"]) == 2  # more where some tie
    assert all(map(is_answer, found["structured"]))
    assert is_answer(found["call"])
    assert found["call_stream"] == found["call"]
    assert found["any_call"] == "describe"
    assert found["after_call"]
    assert found["completion"] == found["completion_stream"] == completion
    assert found["completion_batch"] == [completion, completion]
    assert found["num_choices"] == 2


def test_langchain_huggingface(told):
    found = told["langchain_huggingface"]
    assert found["text"] == found["stream"] != ""
    assert found["chat"] == found["chat_stream"] != ""
    assert found["call"] == "describe"


def test_litellm(told, chat, completion):
    found = told["lite_llm"]
    assert found["chat"] == found["chat_stream"] == found["hub_chat"] == chat
    assert found["completion"] == completion
    assert is_answer(found["structured"])
    assert is_answer(found["call"])


def test_llama_index(told, chat):
    found = told["llama_index"]
    assert found["chat"] == found["chat_stream"] == found["chat_async"] == found["completion"] == chat
