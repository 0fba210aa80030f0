"""TGI's contract, row by row: what is asked, and every byte of the answer, written out in conformance.yaml."""

import http.client
import json
import re
import subprocess
import threading
from collections.abc import Mapping
from pathlib import Path

import pytest
import yaml

ROWS = yaml.safe_load((Path(__file__).parent / "conformance.yaml").read_text())

#: What a row leaves open.
OPEN = {
    "«int»": r"\d+",
    "«float»": r"-?\d+(\.\d+)?(e-?\d+)?",
    "«text»": r'(?:[^"\\]|\\.)*',
    "«bool»": "(true|false)",
    "«version»": r"\d+\.\d+\.\d+",
    "«any»": r"[^\r\n]+",
}


@pytest.fixture(scope="module")
def strict_server(launch):
    flags = ["--strict-tgi", "--max-input-tokens", "64", "--max-total-tokens", "96", "--payload-limit", "20000"]
    return launch("--dtype", "float32", "--kv-cache-memory", "64MiB", *flags).wait_until_ready()


def pattern(written: str) -> str:
    """The regular expression of what a row says."""
    parts = re.split("(«[a-z]+»)", written)
    return "".join(OPEN[part] if part in OPEN else re.escape(part) for part in parts)


def body_of(row: Mapping) -> bytes:
    return re.sub(
        r"\{digits:(\d+)\}", lambda match: ("0123456789" * int(match[1]))[: int(match[1])], row.get("body", "")
    ).encode()


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row["name"])
def test_row(strict_server, row):
    connection = http.client.HTTPConnection("127.0.0.1", strict_server.port, timeout=60)
    method, path = row["request"].split()
    headers = {"content-type": "application/json"} if "body" in row else {}
    connection.request(method, path, body_of(row) or None, headers | row.get("headers", {}))
    response = connection.getresponse()
    text = response.read().decode()
    assert response.status == row["status"], text
    assert re.fullmatch(pattern(row["reply"]), text), text
    for name, written in row.get("present", {}).items():
        assert re.fullmatch(pattern(written), response.headers.get(name, "")), f"{name}: {response.headers.get(name)}"
    assert not {*row.get("absent", [])} & {name.lower() for name in response.headers}


def test_an_end_of_sequence_at_the_limit_is_the_length(strict_server):
    """What a chat of the demo model ends with, and after how many tokens, is the model's; so it is asked first."""

    def chat(max_tokens: int) -> tuple[str, int]:
        body = {"messages": [{"role": "user", "content": "Hello"}], "temperature": 0, "max_tokens": max_tokens}
        reply = json.loads(post(strict_server, "/v1/chat/completions", body))
        return reply["choices"][0]["finish_reason"], reply["usage"]["completion_tokens"]

    reason, num_tokens = chat(64)
    assert reason == "stop"
    assert chat(num_tokens) == ("length", num_tokens)
    assert chat(num_tokens + 1) == ("stop", num_tokens)


def post(server, path: str, body: dict) -> str:
    command = ["curl", "-sS", "--max-time", "60", server.url + path, "-H", "Content-Type: application/json"]
    return subprocess.run([*command, "-d", json.dumps(body)], capture_output=True, text=True, check=True).stdout


#: What the expressions of the dashboard that TGI publishes for Grafana select, but for `tgi_request_skipped_tokens`,
#: which only a server that speculates has.
DASHBOARD = """
    tgi_request_count tgi_request_success tgi_request_failure{err="validation"}
    tgi_request_duration_bucket tgi_request_queue_duration_bucket tgi_request_mean_time_per_token_duration_bucket
    tgi_request_input_length_bucket tgi_request_generated_tokens_bucket
    tgi_request_generated_tokens_sum tgi_request_generated_tokens_count
    tgi_queue_size tgi_batch_current_size tgi_batch_current_max_tokens tgi_batch_concat{reason="chunking"}
    tgi_batch_inference_duration_bucket{method="prefill"} tgi_batch_inference_duration_bucket{method="decode"}
    tgi_batch_forward_duration_bucket{method="decode"} tgi_batch_decode_duration_bucket{method="decode"}
    tgi_batch_filter_duration_bucket{method="decode"} tgi_batch_concat_duration_bucket{method="decode"}
"""


def test_tgis_dashboard_finds_its_series(strict_server, eventually):
    """One request is joined by another, and one is refused."""
    joined = threading.Event()

    def talk() -> None:
        while not joined.is_set():
            post(strict_server, "/generate", {"inputs": "1", "parameters": {"max_new_tokens": 60, "ignore_eos": True}})

    talkers = [threading.Thread(target=talk) for _ in range(3)]
    for talker in talkers:
        talker.start()
    try:
        eventually(lambda: strict_server.metric('tgi_batch_concat{reason="chunking"}') > 0, 60)
    finally:
        joined.set()
        for talker in talkers:
            talker.join()
    post(strict_server, "/generate", {"inputs": ""})
    series = strict_server.get("/metrics").replace(',le="', '}{le="')
    for selector in DASHBOARD.split():
        assert f"\n{selector}" in series, selector
