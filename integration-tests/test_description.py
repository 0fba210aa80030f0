"""The server does what its own description says: Schemathesis asks what it allows and what it forbids.

First the edges of every type, some thousands, then what chance makes of them: more of it with `make schemathesis`.
"""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

#: Those that chance makes.
NUM_CASES = int(os.environ.get("BROS_SCHEMATHESIS_CASES", "40"))

SCHEMATHESIS = Path(sys.executable).parent / "schemathesis"
CONFIG = Path(__file__).parent / "schemathesis.toml"


@pytest.fixture(scope="module")
def described_server(launch):
    """Short replies: what is asked mostly sets no limit to them."""
    flags = ["--max-total-tokens", "32", "--kserve"]
    return launch("--dtype", "float32", "--kv-cache-memory", "64MiB", *flags).wait_until_ready()


def test_nothing_that_is_asked_is_answered_otherwise_than_described(described_server, tmp_path):
    ranks = [rank.pid for rank in described_server.ranks]
    paths = json.loads(described_server.get("/api-doc/openapi.json"))["paths"]
    num_bodies = sum("requestBody" in operation for methods in paths.values() for operation in methods.values())
    # What has no body gives one case.
    examples = str(-(-NUM_CASES // num_bodies))
    command = [SCHEMATHESIS, "--config-file", CONFIG, "run", f"{described_server.url}/api-doc/openapi.json"]
    command += ["--mode", "all", "--checks", "all", "--phases", "examples,coverage,fuzzing", "--warnings", "off"]
    command += ["--max-examples", examples, "--continue-on-failure", "--no-color"]
    # A machine that is busy fails nothing.
    command += ["--request-timeout", "60", "--suppress-health-check", "all"]
    run = subprocess.run([*map(str, command)], cwd=tmp_path, capture_output=True, text=True, timeout=3600)
    assert run.returncode == 0, run.stdout + run.stderr
    generated = re.search(r"(\d+) generated", run.stdout)
    assert generated is not None, run.stdout
    assert int(generated[1]) > 2000 + NUM_CASES
    print(run.stdout[run.stdout.index("Test cases:") :])
    assert described_server.get("/health") == ""
    assert [rank.pid for rank in described_server.ranks] == ranks
