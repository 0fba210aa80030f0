"""Step times kept between starts: what a rank measured once on this machine need not be measured again.

One JSON file for each combination of model, machine and settings that a step's time depends on. A cache: whatever is
wrong with it, a rank starts without.
"""

from __future__ import annotations

import hashlib
import os
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated

import msgspec
import structlog
from msgspec import Meta, Struct

from bros_shard.protocol import Seconds, StepShape

log = structlog.get_logger()


class _Measured(Struct, forbid_unknown_fields=True):
    """A file's content."""

    #: The key, for people who wonder what the file is of.
    key: dict[str, str]
    grid: str
    points: Annotated[list[tuple[StepShape, Seconds]], Meta(min_length=1, max_length=4096)]


class ProfileCache:
    """The file of one key."""

    def __init__(self, key: Mapping[str, str]) -> None:
        """`key` names all that the times depend on."""
        self._key = dict(key)
        digest = hashlib.sha256(msgspec.json.encode(sorted(self._key.items()))).hexdigest()
        folder = _cache_home()
        self.path = None if folder is None else folder / "bros" / "step-times" / f"{digest[:32]}.json"

    def load(self, grid: str) -> list[tuple[StepShape, float]]:
        """What was measured on this grid or, where it is `quick`, on the full one; empty where nothing was."""
        if self.path is None:
            return []
        try:
            measured = msgspec.json.decode(self.path.read_bytes(), type=_Measured)
        except FileNotFoundError:
            return []
        except (OSError, msgspec.MsgspecError, UnicodeDecodeError) as error:
            log.warning("cached step times are unreadable: measuring again", path=str(self.path), error=str(error))
            return []
        return measured.points if measured.grid in (grid, "full") else []

    def store(self, grid: str, points: list[tuple[StepShape, float]]) -> None:
        """Write the file, whole or not at all."""
        if self.path is None:
            return
        content = msgspec.json.format(msgspec.json.encode(_Measured(self._key, grid, points)))
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with tempfile.NamedTemporaryFile(dir=self.path.parent, delete=False) as file:
                try:
                    file.write(content)
                    file.flush()
                    os.replace(file.name, self.path)
                except OSError:
                    os.unlink(file.name)
                    raise
        except OSError as error:
            log.warning("step times are not kept: the next start measures again", error=str(error))


def processor_name() -> str:
    """The processor's model as Linux names it, and how many of it this process may use."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    models = sorted({line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")})
    return f"{len(os.sched_getaffinity(0))} x {' / '.join(models) or os.uname().machine}"


def _cache_home() -> Path | None:
    """As the XDG base directory specification has it; `None` for a user without a home."""
    for folder in (os.environ.get("XDG_CACHE_HOME", ""), os.path.expanduser("~/.cache")):
        if os.path.isabs(folder):  # another one must be ignored
            return Path(folder)
    return None
