"""The image without a container engine: its build steps run in a fresh environment, then its entry point is started."""

import json
import os
import re
import shlex
import shutil
import subprocess
import urllib.request
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[1]


def stage_of(name: str) -> list[tuple[str, str]]:
    """The instructions of one stage of the Dockerfile."""
    text = re.sub(r"^\s*#.*\n", "", (REPOSITORY / "docker" / "Dockerfile").read_text(), flags=re.MULTILINE)
    stage = re.search(rf"^FROM \S+ AS {name}\n(.*?)(?=^FROM |\Z)", text, re.DOTALL | re.MULTILINE)
    assert stage is not None
    lines = re.sub(r"\\\n\s*", "", stage[1]).splitlines()
    return [(line.split(" ", 1)[0], line.split(" ", 1)[1].strip()) for line in lines if line.strip()]


@pytest.fixture(scope="module")
def image(tmp_path_factory) -> Path:
    """What the `build` stage leaves at /opt/bros."""
    root = tmp_path_factory.mktemp("image")
    prefix, source = root / "bros", root / "src"
    environment = os.environ | {"PATH": f"{prefix}/bin:{os.environ['PATH']}", "TORCH_INDEX_URL": "", "EXTRAS": ""}
    for instruction, rest in stage_of("build"):
        if instruction == "ARG" and not rest.endswith("="):
            environment |= dict([rest.split("=", 1)])
        elif instruction == "COPY":
            *names, destination = rest.split()
            for name in names:
                if (REPOSITORY / name).is_dir():
                    ignored = shutil.ignore_patterns("tests", "__pycache__", ".*_cache")
                    shutil.copytree(REPOSITORY / name, source / destination, ignore=ignored)
                else:
                    source.mkdir(exist_ok=True)
                    shutil.copy(REPOSITORY / name, source / name)
        elif instruction == "RUN":
            command = rest.replace("/opt/bros", str(prefix))
            cwd = source if source.exists() else root
            run = subprocess.run(command, shell=True, cwd=cwd, env=environment, capture_output=True, text=True)
            assert run.returncode == 0, run.stderr
    return prefix


def test_entry_point_of_the_image_serves(image, launch):
    settings = dict(pair.split("=", 1) for kind, rest in stage_of("runtime") if kind == "ENV" for pair in rest.split())
    assert settings["PORT"] == "80"  # no test may bind it: the fixture asks for a free one
    ((_, entry_point),) = [step for step in stage_of("server") if step[0] == "ENTRYPOINT"]
    (command,) = json.loads(entry_point)
    environment = {name: settings[name] for name in ("PYTHONSAFEPATH", "PYTHONUNBUFFERED")}
    server = launch(program=[str(image / "bin" / command)], environment=environment).wait_until_ready()
    body = json.dumps({"inputs": "Return the", "parameters": {"max_new_tokens": 3}}).encode()
    request = urllib.request.Request(f"{server.url}/generate", body, {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=60) as reply:
        assert json.load(reply)["generated_text"]
    health_check = next(rest for kind, rest in stage_of("runtime") if kind == "HEALTHCHECK")
    probe = json.loads(health_check.split("CMD ", 1)[1])
    probe[0] = str(image / "bin" / probe[0])
    assert subprocess.run(probe, env=os.environ | {"PORT": str(server.port)}).returncode == 0, shlex.join(probe)
    assert server.stop() == 0
