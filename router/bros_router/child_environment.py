"""What a process that the launcher starts is told through its environment, and what it is not told."""

from __future__ import annotations

import os
from typing import Final

from bros_shard.lifeline import PARENT_PID_VARIABLE

#: The launcher uses these; none of its children does.
_SECRETS: Final = frozenset({"API_KEY", "HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "HF_API_TOKEN", "NGROK_AUTHTOKEN"})


def child_environment() -> dict[str, str]:
    """The launcher's environment without its secrets, for a child that dies with it and fetches nothing.

    `PYTHONSAFEPATH` keeps the working directory from being searched for modules.
    """
    inherited = {name: value for name, value in os.environ.items() if name not in _SECRETS}
    return inherited | {
        PARENT_PID_VARIABLE: str(os.getpid()),
        "PYTHONSAFEPATH": "1",
        "PYTHONUNBUFFERED": "1",
        "HF_HUB_OFFLINE": "1",
    }
