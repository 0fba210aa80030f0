"""The image and its compose file, held against the rules of hadolint and of the compose specification that matter here.

Nothing here needs docker: files are parsed, and what they would run is run.
"""

import http.server
import json
import os
import re
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml

from bros_router.config import ServerConfig

REPOSITORY = Path(__file__).parents[2]
DOCKER = REPOSITORY / "docker"

Instruction = tuple[str, str]


def parse_dockerfile(text: str) -> dict[str, list[Instruction]]:
    """Instructions by stage, in order; those before the first FROM under the empty name."""
    without_comments = "\n".join(line for line in text.splitlines() if not line.lstrip().startswith("#"))
    lines = re.sub(r"\\\n\s*", "", without_comments).splitlines()
    stages: dict[str, list[Instruction]] = {"": []}
    stage = ""
    for line in filter(None, (line.strip() for line in lines)):
        keyword, _, rest = line.partition(" ")
        if keyword == "FROM":
            stage = rest.split(" AS ")[1]
            stages[stage] = []
        stages[stage].append((keyword, rest.strip()))
    return stages


STAGES = parse_dockerfile((DOCKER / "Dockerfile").read_text())
COMPOSE: dict[str, Any] = yaml.safe_load((DOCKER / "compose.yaml").read_text())


def all_of(keyword: str, stage: str | None = None) -> list[str]:
    stages = STAGES.values() if stage is None else [STAGES[stage]]
    return [rest for instructions in stages for name, rest in instructions if name == keyword]


def inherited(stage: str, keyword: str) -> list[str]:
    """What a stage and those it is built on say, oldest first."""
    parent = all_of("FROM", stage)[0].split()[0]
    return (inherited(parent, keyword) if parent in STAGES else []) + all_of(keyword, stage)


def environment_of(stage: str) -> dict[str, str]:
    return dict(pair.split("=", 1) for line in inherited(stage, "ENV") for pair in line.split())


def images() -> list[str]:
    """Base images that come from a registry."""
    sources = [rest.split()[0] for rest in all_of("FROM")]
    return [source for source in sources if source not in STAGES and not source.startswith("${")]


def test_base_images_are_pinned():
    assert len(images()) == 2
    for image in images():
        _, _, tag = image.partition(":")
        assert re.match(r"\d+\.\d+\.\d+-", tag), f"{image} names no exact version"


def test_variants_are_stages():
    devices = re.findall(r"DEVICE=(\w+)", (DOCKER / "Dockerfile").read_text())
    assert {"cpu", "cuda"} == set(devices)
    assert {"cpu", "cuda"} <= set(STAGES)


@pytest.mark.parametrize("stage", ["server", "sagemaker"])
def test_server_runs_without_privileges(stage):
    user = inherited(stage, "USER")[-1]
    assert user.split(":")[0].isdigit(), "Kubernetes' runAsNonRoot checks numbers alone"
    assert user.split(":")[0] != "0"


@pytest.mark.parametrize(
    ("stage", "command"), [("server", "text-generation-launcher"), ("sagemaker", "sagemaker-entrypoint")]
)
def test_entry_point_receives_signals(stage, command):
    """The exec form: a shell in between would swallow SIGTERM."""
    assert [json.loads(entry) for entry in inherited(stage, "ENTRYPOINT")] == [[command]]
    assert inherited(stage, "CMD") == []


def test_plain_build_gives_the_server():
    assert list(STAGES)[-1] == "server"


def test_environment_is_that_of_tgis_image():
    environment = environment_of("server")
    assert (environment["PORT"], environment["HF_HOME"], environment["PYTHONSAFEPATH"]) == ("80", "/data", "1")
    assert inherited("server", "EXPOSE") == ["80"]
    assert environment_of("sagemaker")["PORT"] == "8080"


def test_no_secret_is_baked_in():
    words = re.compile(r"token|password|secret|api_?key", re.IGNORECASE)
    assert not [line for line in all_of("ENV") + all_of("ARG") if words.search(line)]


def test_nothing_is_fetched_but_packages():
    assert all_of("ADD") == []
    assert not [run for run in all_of("RUN") if re.search(r"\b(curl|wget|git clone)\b|https?://", run)]


def test_package_managers_leave_no_caches():
    for run in all_of("RUN"):
        assert "pip install" not in run or "--no-cache-dir" in run
        if "apt-get" in run:
            assert "--no-install-recommends" in run
            assert "--yes" in run
            assert run.index("apt-get update") < run.index("apt-get install") < run.index("rm -rf /var/lib/apt/lists/*")
        assert "sudo" not in run
        assert not re.search(r"(^|&& *)cd ", run)


def test_torch_is_installed_before_what_depends_on_it_and_before_our_sources():
    steps = [rest for keyword, rest in STAGES["build"] if keyword in ("RUN", "COPY")]
    installs = [step for step in steps if "pip install" in step]
    assert "torch==$TORCH_VERSION" in installs[0]
    assert ".$EXTRAS" in installs[1]
    sources = next(index for index, step in enumerate(steps) if step.startswith("router "))
    assert steps.index(installs[0]) < sources < steps.index(installs[1])


def test_torch_is_one_that_the_package_allows():
    (version,) = (rest.split("=")[1] for rest in all_of("ARG") if rest.startswith("TORCH_VERSION="))
    (wanted,) = re.findall(r'"torch(>=.*?)"', (REPOSITORY / "pyproject.toml").read_text())
    lowest, highest = (tuple(map(int, part.strip("<>=").split("."))) for part in wanted.split(","))
    assert lowest <= tuple(map(int, version.split("."))) < highest


def test_everything_that_is_copied_is_there_and_in_the_context():
    ignored = (REPOSITORY / ".dockerignore").read_text().splitlines()
    for rest in all_of("COPY"):
        words = [word for word in rest.split() if not word.startswith("--")]
        if "--from=" in rest:
            continue
        for source in words[:-1]:
            assert (REPOSITORY / source).exists()
            assert f"!{source}" in ignored


def test_context_leaves_out_what_has_no_place_in_an_image():
    lines = [line for line in (REPOSITORY / ".dockerignore").read_text().splitlines() if line and line[0] != "#"]
    assert lines[0] == "*"
    assert "**/tests" in lines
    assert not any(".git" in line or ".venv" in line for line in lines if line.startswith("!"))


@pytest.fixture(params=[200, 503])
def health(request) -> Iterator[tuple[int, int]]:
    """A server whose /health answers one status: (status, port)."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(request.param if self.path == "/health" else 404)
            self.end_headers()

        def log_message(self, *arguments: object) -> None:
            """Quiet."""

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
        yield request.param, server.server_address[1]
        server.shutdown()


def run_check(command: list[str], port: int) -> int:
    assert command[0] == "python"
    environment = {"PATH": os.environ["PATH"], "PORT": str(port)}
    return subprocess.run(
        [sys.executable, *command[1:]], env=environment, stderr=subprocess.DEVNULL, timeout=60
    ).returncode


def test_image_health_check_tells_a_ready_server_from_one_that_is_not(health):
    status, port = health
    (check,) = inherited("server", "HEALTHCHECK")
    command = json.loads(check.partition("CMD ")[2])
    assert (run_check(command, port) == 0) == (status == 200)


@pytest.mark.parametrize("service", sorted(COMPOSE["services"]))
def test_compose_health_check_tells_a_ready_server_from_one_that_is_not(service, health):
    status, port = health
    kind, *command = COMPOSE["services"][service]["healthcheck"]["test"]
    assert kind == "CMD"
    assert ":80/health" in command[-1]
    command[-1] = command[-1].replace(":80/", f":{port}/")
    assert (run_check(command, port) == 0) == (status == 200)


LAUNCHER_STUB = """#!/bin/sh
echo "$* MODEL_ID=$MODEL_ID REVISION=$REVISION NUM_SHARD=$NUM_SHARD QUANTIZE=$QUANTIZE CODE=$TRUST_REMOTE_CODE"
"""


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        (
            {"HF_MODEL_ID": "org/model"},
            (0, "--port 8080 MODEL_ID=org/model REVISION= NUM_SHARD= QUANTIZE= CODE=\n"),
        ),
        (
            {
                "HF_MODEL_ID": "org/model",
                "HF_MODEL_REVISION": "main",
                "SM_NUM_GPUS": "4",
                "HF_MODEL_QUANTIZE": "awq",
                "HF_MODEL_TRUST_REMOTE_CODE": "true",
            },
            (0, "--port 8080 MODEL_ID=org/model REVISION=main NUM_SHARD=4 QUANTIZE=awq CODE=true\n"),
        ),
        ({"HF_MODEL_ID": "m", "NUM_SHARD": "2"}, (0, "--port 8080 MODEL_ID=m REVISION= NUM_SHARD=2 QUANTIZE= CODE=\n")),
        ({}, (2, "")),
    ],
)
def test_sagemaker_names_are_translated(tmp_path, environment, expected):
    stub = tmp_path / "text-generation-launcher"
    stub.write_text(LAUNCHER_STUB)
    stub.chmod(0o755)
    path = f"{tmp_path}:{os.environ['PATH']}"
    script = DOCKER / "sagemaker-entrypoint.sh"
    ended = subprocess.run(
        [str(script), "serve"], env=environment | {"PATH": path}, capture_output=True, text=True, timeout=60
    )
    assert (ended.returncode, ended.stdout) == expected


DURATION = {"type": "string", "pattern": r"^(\d+h)?(\d+m)?(\d+s)?$", "minLength": 2}
STRINGS = {"type": "array", "items": {"type": "string"}, "minItems": 1}
#: What the compose specification says of the keys used here; other keys are mistakes.
SERVICE_SCHEMA: dict[str, Any] = {
    "type": "object",
    "additionalProperties": False,
    "required": ["image", "build", "healthcheck", "stop_grace_period", "restart", "profiles"],
    "properties": {
        "profiles": STRINGS,
        "image": {"type": "string", "pattern": r"^[a-z/-]+:(?!latest$)[\w.-]+$"},
        "build": {
            "type": "object",
            "additionalProperties": False,
            "required": ["context", "dockerfile", "target"],
            "properties": {
                "context": {"type": "string"},
                "dockerfile": {"type": "string"},
                "target": {"type": "string"},
                "args": {"type": "object", "additionalProperties": {"type": "string"}},
            },
        },
        "restart": {"enum": ["no", "always", "on-failure", "unless-stopped"]},
        "init": {"type": "boolean"},
        "ports": STRINGS,
        "volumes": STRINGS,
        # YAML's bare true and 90 are not strings; the specification wants quotes.
        "environment": {
            "type": "object",
            "propertyNames": {"pattern": "^[A-Z][A-Z0-9_]*$"},
            "additionalProperties": {"type": "string"},
        },
        "stop_grace_period": DURATION,
        "shm_size": {"type": "string", "pattern": r"^\d+(b|k|m|g|kb|mb|gb)$"},
        "cap_drop": STRINGS,
        "security_opt": STRINGS,
        "healthcheck": {
            "type": "object",
            "additionalProperties": False,
            "required": ["test", "interval", "timeout", "retries", "start_period"],
            "properties": {
                "test": STRINGS,
                "interval": DURATION,
                "timeout": DURATION,
                "start_period": DURATION,
                "retries": {"type": "integer", "minimum": 1},
            },
        },
        "deploy": {
            "type": "object",
            "additionalProperties": False,
            "properties": {
                "resources": {
                    "type": "object",
                    "additionalProperties": False,
                    "properties": {
                        "reservations": {
                            "type": "object",
                            "additionalProperties": False,
                            "properties": {
                                "devices": {
                                    "type": "array",
                                    "items": {
                                        "type": "object",
                                        "additionalProperties": False,
                                        "required": ["capabilities"],
                                        "properties": {
                                            "driver": {"type": "string"},
                                            "count": {"anyOf": [{"const": "all"}, {"type": "integer", "minimum": 1}]},
                                            "capabilities": STRINGS,
                                        },
                                    },
                                }
                            },
                        }
                    },
                }
            },
        },
    },
}
COMPOSE_SCHEMA: dict[str, Any] = {
    "type": "object",
    "additionalProperties": False,
    "required": ["services"],
    "patternProperties": {"^x-": {}},
    "properties": {
        "name": {"type": "string", "pattern": "^[a-z0-9][a-z0-9_-]*$"},
        "services": {"type": "object", "additionalProperties": SERVICE_SCHEMA, "minProperties": 1},
        "volumes": {"type": "object", "additionalProperties": {"type": ["object", "null"]}},
    },
}


def seconds(duration: str) -> int:
    units = {"h": 3600, "m": 60, "s": 1}
    return sum(int(number) * units[unit] for number, unit in re.findall(r"(\d+)([hms])", duration))


def test_compose_file_follows_the_specification():
    jsonschema.validate(COMPOSE, COMPOSE_SCHEMA)


def test_each_profile_is_one_container():
    profiles = {name: service["profiles"] for name, service in COMPOSE["services"].items()}
    assert profiles == {"bros-cpu": ["cpu"], "bros-gpu": ["gpu"]}


@pytest.mark.parametrize("name", sorted(COMPOSE["services"]))
def test_service_fits_the_image_and_the_server(name):
    service = COMPOSE["services"][name]
    build = service["build"]
    assert (DOCKER / build["context"] / build["dockerfile"]).resolve() == DOCKER / "Dockerfile"
    assert build["target"] in STAGES
    declared = {rest.split("=")[0] for rest in all_of("ARG")}
    assert set(build["args"]) <= declared
    assert build["args"]["DEVICE"] in STAGES
    assert all(port.endswith(f":{environment_of('server')['PORT']}") for port in service["ports"])
    assert {volume.split(":")[0] for volume in service["volumes"]} <= set(COMPOSE["volumes"])
    timeout_s = int(service["environment"]["GRACEFUL_TERMINATION_TIMEOUT"])
    assert timeout_s == ServerConfig().http.graceful_termination_timeout_s
    assert seconds(service["stop_grace_period"]) > timeout_s
    assert seconds(service["healthcheck"]["timeout"]) < seconds(service["healthcheck"]["interval"])


def test_gpu_profile_reserves_the_gpus():
    (device,) = COMPOSE["services"]["bros-gpu"]["deploy"]["resources"]["reservations"]["devices"]
    assert device == {"driver": "nvidia", "count": "all", "capabilities": ["gpu"]}
    assert "deploy" not in COMPOSE["services"]["bros-cpu"]
