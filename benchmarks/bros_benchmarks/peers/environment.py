"""Virtual environments that peers are installed into, apart from ours and from each other."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from bros_benchmarks.peers.engine import EngineError


@dataclass(frozen=True, slots=True)
class Environment:
    """What a peer is installed from, and where."""

    folder: Path
    #: One call of pip each, in this order.
    requirements: Sequence[Sequence[str]]
    #: Distributions that come along and do harm.
    unwanted: Sequence[str] = ()

    def program(self, name: str) -> str:
        """Path of one of its programs."""
        return str((self.folder / "bin" / name).absolute())

    def install(self) -> None:
        """Make it, unless it was made from the same requirements before.

        Raises:
            EngineError: pip could not.
        """
        stamp = self.folder / "installed.txt"
        recipe = f"{self.requirements} without {self.unwanted}"
        if stamp.exists() and stamp.read_text() == recipe:
            return
        shutil.rmtree(self.folder, ignore_errors=True)
        self.folder.parent.mkdir(parents=True, exist_ok=True)
        _run([sys.executable, "-m", "venv", str(self.folder)])
        pip = [self.program("python"), "-m", "pip", "--quiet", "--disable-pip-version-check"]
        for requirements in self.requirements:
            _run([*pip, "install", *requirements])
        if self.unwanted:
            _run([*pip, "uninstall", "--yes", *self.unwanted])
        stamp.write_text(recipe)

    def run(self, program: str, *arguments: str) -> None:
        """Run one of its programs to its end.

        Raises:
            EngineError: it failed.
        """
        _run([self.program(program), *arguments])


def bare_environment(**variables: str) -> dict[str, str]:
    """This process's environment without what would lead another Python to our modules, and with `variables`."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    # Nothing that is measured may ask the network for anything.
    return kept | {"HF_HUB_OFFLINE": "1"} | variables


def _run(command: Sequence[str]) -> None:
    ended = subprocess.run(command, env=bare_environment(), capture_output=True, text=True)
    if ended.returncode:
        raise EngineError(f"{' '.join(map(str, command))}: {ended.stderr.strip()[-500:]}")
