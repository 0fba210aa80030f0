"""Requests that were each a published advisory of some server, or could be: the expected answers are written out."""

import http.client
import json
from pathlib import Path

import pytest

ROWS = json.loads((Path(__file__).parent / "hostile_requests.json").read_text())


def body_of(row: dict) -> bytes:
    if "repeat" in row:
        return json.dumps({"inputs": "word " * row["repeat"]}).encode()
    if "nest" in row:
        return b'{"inputs":' + b"[" * row["nest"]
    if "latin1" in row:
        return row["latin1"].encode("latin-1")
    return row["raw"].encode() if "raw" in row else json.dumps(row["body"]).encode()


def ask(server, row: dict, path: str) -> tuple[int, str]:
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=60)
    headers = {"Content-Type": "application/json"} | row.get("headers", {})
    connection.request("POST", row.get("path", path), body_of(row), headers)
    response = connection.getresponse()
    return response.status, response.read().decode()


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row["name"])
def test_hostile_request_gets_its_answer_and_harms_nobody(server, row):
    ranks = [rank.pid for rank in server.ranks]
    status, text = ask(server, row, "/generate")
    assert status == row["status"], text[:500]
    assert row.get("error", "") in text
    assert not any(secret in text for secret in ("Traceback", "site-packages", str(Path(__file__).parents[1])))
    assert server.get("/health") == ""
    assert [rank.pid for rank in server.ranks] == ranks


#: What a stream is told by an event; rejections keep their status, and `best_of` has another message there.
IN_BAND = [
    row for row in ROWS if row.get("error", "").startswith("`") and "best_of" not in row["name"] and "path" not in row
]


@pytest.mark.parametrize("row", IN_BAND, ids=lambda row: row["name"])
def test_validation_error_of_a_stream_is_an_event(server, row):
    status, text = ask(server, row, "/generate_stream")
    if "headers" in row:
        assert status == 422  # judged before the stream begins
        return
    assert status == 200
    assert text.endswith("}\n\n")
    event = json.loads(text.removeprefix("data: "))
    assert event["error"].startswith("Input validation error: ")
    assert row["error"] in event["error"]
    assert event["error_type"] == "validation"
