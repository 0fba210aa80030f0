"""Log lines as operators and collectors get them: each test logs in a process of its own."""

import json
import subprocess
import sys

import pytest

from bros_router.logs import level_of

PROLOGUE = """
import logging, sys, warnings
import structlog
from bros_router import logs
from bros_router.config import LogConfig
log = structlog.get_logger("bros_router.engine")
"""


def logged(config: str, code: str) -> list[str]:
    """The lines that `code` logs under `LogConfig(config)`."""
    script = f"{PROLOGUE}\nlogs.configure(LogConfig({config}))\n{code}"
    ended = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60)
    assert ended.returncode == 0, ended.stderr
    assert ended.stdout == ""  # stdout is for results
    return ended.stderr.splitlines()


@pytest.mark.parametrize(
    ("directives", "level"),
    [
        ("", "INFO"),
        ("info", "INFO"),
        ("debug", "DEBUG"),
        ("trace", "DEBUG"),
        ("WARN", "WARNING"),
        ("error", "ERROR"),
        ("off", "CRITICAL"),
        ("info,text_generation_router=debug", "INFO"),
        ("text_generation_router=debug,warn", "WARNING"),
        ("text_generation_router=debug", "INFO"),
        ("nonsense", "INFO"),
    ],
)
def test_value_of_log_level(directives, level):
    assert level_of(directives) == level


def test_json_has_the_keys_of_tgi():
    (line,) = logged("json_output=True", "log.warning('request failed', request_id='r1', queue_s=0.5)")
    event = json.loads(line)
    timestamp = event.pop("timestamp")
    assert timestamp.endswith("Z")
    assert "T" in timestamp
    assert event == {
        "level": "WARN",
        "message": "request failed",
        "target": "bros_router.engine",
        "request_id": "r1",
        "queue_s": 0.5,
    }


def test_json_levels():
    methods = ("debug", "info", "warning", "error", "critical")
    lines = logged("json_output=True, level='DEBUG'", "; ".join(f"log.{method}('x')" for method in methods))
    assert [json.loads(line)["level"] for line in lines] == ["DEBUG", "INFO", "WARN", "ERROR", "ERROR"]


def test_what_is_below_the_level_is_not_logged():
    lines = logged("level='WARNING'", "log.info('no'); log.warning('yes'); logging.getLogger('x').info('no')")
    assert len(lines) == 1
    assert "yes" in lines[0]


def test_libraries_log_the_same_way():
    (line,) = logged(
        "json_output=True", "logging.getLogger('aiohttp.server').error('Error %s', 7, extra={'peer': 'p'})"
    )
    event = json.loads(line)
    assert (event["message"], event["target"], event["level"]) == ("Error 7", "aiohttp.server", "ERROR")
    assert event["peer"] == "p"


def test_exception_is_one_json_line_and_readable_text_otherwise():
    code = "try: 1 / 0\nexcept ZeroDivisionError: log.exception('failed')"
    (line,) = logged("json_output=True", code)
    event = json.loads(line)
    assert event["message"] == "failed"
    assert "ZeroDivisionError: division by zero" in event["exception"]
    lines = logged("", code)
    assert "failed" in lines[0]
    assert any("ZeroDivisionError: division by zero" in line for line in lines)


def test_text_is_plain_off_a_terminal_and_coloured_on_request():
    (plain,) = logged("", "log.info('hello', a=1)")
    assert "\x1b" not in plain
    assert "hello" in plain
    assert "a=1" in plain
    (coloured,) = logged("colorize=True", "log.info('hello', a=1)")
    assert "\x1b" in coloured


RANK_LINES = [
    ("plain output", "INFO", "plain output"),
    ('{"a": "b"}  two  spaces', "INFO", '{"a": "b"}  two  spaces'),
    ("2026-01-02 03:04:05 [error    ] rank fault     error='x y'", "ERROR", "rank fault     error='x y'"),
    ("2026-01-02T03:04:05.678901Z [warning  ] slow", "WARN", "slow"),
    ("[info     ] loaded", "INFO", "loaded"),
    ("\x1b[2m2026-01-02 03:04:05\x1b[0m [\x1b[31merror    \x1b[0m] red", "ERROR", "red"),
    ("tensor[error] is not a level", "INFO", "tensor[error] is not a level"),
    ("%s %d {} \\n", "INFO", "%s %d {} \\n"),
]


def test_lines_of_a_rank_are_passed_on():
    code = "\n".join(f"logs.log_rank_line(3, {line!r})" for line, _, _ in RANK_LINES)
    events = [json.loads(line) for line in logged("json_output=True", code)]
    assert [(event["level"], event["message"]) for event in events] == [tuple(line[1:]) for line in RANK_LINES]
    assert {(event["rank"], event["target"]) for event in events} == {(3, "bros_shard")}


def test_empty_line_of_a_rank_is_dropped():
    assert logged("", "logs.log_rank_line(0, ''); logs.log_rank_line(0, '  ')") == []


def test_log_lines_go_where_stderr_points():
    """A progress bar replaces sys.stderr while it is drawn."""
    code = "import io; real, sys.stderr = sys.stderr, io.StringIO(); log.info('a'); sys.stderr = real; log.info('b')"
    (line,) = logged("", code)
    assert line.split("] ")[1].startswith("b")
