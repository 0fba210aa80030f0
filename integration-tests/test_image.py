"""The image without a container engine: its build steps run in a fresh environment, then its entry point is started.

Two things are not as in the image. The steps that install packages of the system are left out: they would change this
machine. And the fresh environment is given links to what `bros` requires, and what that requires, as it is installed
here, so that pip downloads little more than what builds our wheel. It is not given what pyproject.toml forgets: then
the server does not start.
"""

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
import urllib.request
from importlib import metadata
from pathlib import Path

import pytest
from packaging.requirements import Requirement

REPOSITORY = Path(__file__).parents[1]


def stage_of(name: str) -> list[tuple[str, str]]:
    """The instructions of one stage of the Dockerfile."""
    text = re.sub(r"^\s*#.*\n", "", (REPOSITORY / "docker" / "Dockerfile").read_text(), flags=re.MULTILINE)
    stage = re.search(rf"^FROM \S+ AS {name}\n(.*?)(?=^FROM |\Z)", text, re.DOTALL | re.MULTILINE)
    assert stage is not None
    lines = re.sub(r"\\\n\s*", "", stage[1]).splitlines()
    return [(line.split(" ", 1)[0], line.split(" ", 1)[1].strip()) for line in lines if line.strip()]


def closure_of(requirement: Requirement) -> dict[str, metadata.Distribution]:
    """By name, what this requires as it is installed here, and what that requires in turn; without itself."""
    closure: dict[str, metadata.Distribution] = {}
    done = set()
    left = [requirement]
    while left:
        parent = left.pop()
        if str(parent) not in done:
            done.add(str(parent))
            closure[parent.name] = metadata.distribution(parent.name)
            for required in map(Requirement, closure[parent.name].requires or ()):
                marker = required.marker
                if marker is None or any(marker.evaluate({"extra": extra}) for extra in ("", *parent.extras)):
                    left.append(required)
    del closure[requirement.name]
    return closure


def link(distribution: metadata.Distribution, prefix: Path) -> None:
    """Let another environment have the modules of an installed distribution, and the metadata that pip reads."""
    packages = Path(sysconfig.get_path("purelib", vars={"base": str(prefix)}))
    if any(metadata.distributions(name=distribution.name, path=[str(packages)])):
        return  # it came with the environment
    assert distribution.files is not None
    for file in distribution.files:
        if ".." not in file.parts and not (packages / file).exists():  # no scripts; some share a file
            (packages / file).parent.mkdir(parents=True, exist_ok=True)
            (packages / file).symlink_to(distribution.locate_file(file))


@pytest.fixture(scope="module")
def image(tmp_path_factory) -> Path:
    """What the `build` stage leaves at /opt/bros."""
    root = tmp_path_factory.mktemp("image")
    prefix, source = root / "bros", root / "src"
    path = f"{prefix}/bin:{Path(sys.executable).parent}:{os.environ['PATH']}"  # links fit the same Python only
    environment = os.environ | {"PATH": path, "TORCH_INDEX_URL": ""}
    steps = stage_of("build")
    (extras,) = (rest.removeprefix("EXTRAS=") for kind, rest in steps if kind == "ARG" and rest.startswith("EXTRAS="))
    for instruction, rest in steps:
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
        elif instruction == "RUN" and not rest.startswith("apt-get"):
            command = rest.replace("/opt/bros", str(prefix))
            cwd = source if source.exists() else root
            run = subprocess.run(command, shell=True, cwd=cwd, env=environment, capture_output=True, text=True)
            assert run.returncode == 0, run.stderr
            if "-m venv" in rest:
                for distribution in closure_of(Requirement(f"bros{extras}")).values():
                    link(distribution, prefix)
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
