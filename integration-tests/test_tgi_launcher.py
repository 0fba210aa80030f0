"""Started as TGI's own integration tests start their launcher: with their flags, their variables and their patience."""

import json
import os
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

import pytest

from bros_router.model_source import demo_model_path

#: How long those tests wait for a first reply, and for the end.
PATIENCE_S = 60.0


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port: int = listener.getsockname()[1]
        return port


def generate(port: int) -> dict:
    """The first reply: until it comes, connections are refused."""
    deadline_s = time.monotonic() + PATIENCE_S
    body = json.dumps({"inputs": "test", "parameters": {"max_new_tokens": 20}}).encode()
    request = urllib.request.Request(f"http://localhost:{port}/generate", body, {"Content-Type": "application/json"})
    while True:
        try:
            with urllib.request.urlopen(request, timeout=PATIENCE_S) as reply:
                return json.load(reply)
        except urllib.error.HTTPError as error:
            if error.code != 503:  # it listens, and the model is not loaded yet
                raise
        except urllib.error.URLError as error:
            if not isinstance(error.reason, ConnectionError):
                raise
        assert time.monotonic() < deadline_s, "no reply"
        time.sleep(0.1)


@pytest.mark.parametrize(
    ("flags", "variables"),
    [
        (("--num-shard", "2"), {"USE_FLASH_ATTENTION": "false"}),
        (
            ("--trust-remote-code", "--dtype", "bfloat16", "--max-input-length", "512", "--max-total-tokens", "1024"),
            {"PREFILL_CHUNKING": "1", "HF_TOKEN": "none"},
        ),
    ],
    ids=["two shards", "limits"],
)
def test_launcher_is_ready_in_time_and_ends_in_time(flags, variables, tmp_path):
    port = free_port()
    command = [str(Path(sys.executable).parent / "text-generation-launcher"), "--model-id", str(demo_model_path())]
    command += ["--port", str(port), "--master-port", str(free_port()), "--shard-uds-path", str(tmp_path / "server")]
    environment = os.environ | {"LOG_LEVEL": "info,text_generation_router=debug", "HOSTNAME": "127.0.0.1"} | variables
    with subprocess.Popen(
        [*command, *flags], stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environment
    ) as launcher:
        try:
            assert generate(port)["generated_text"]
        finally:
            launcher.terminate()
            launcher.communicate(timeout=PATIENCE_S)
    assert launcher.returncode == 0
