"""The small JSON files of a checkpoint: read whole, and refused by name where they are broken."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from bros_router.startup_error import CheckpointError


def read_json(path: Path) -> dict[str, Any] | None:
    """A JSON object; `None` where there is no such file.

    Raises:
        CheckpointError: it is not one.
    """
    try:
        content = json.loads(path.read_bytes())
    except FileNotFoundError:
        return None
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path.name} cannot be read ({error}).") from None
    if not isinstance(content, dict):
        raise CheckpointError(f"{path.name} is not a JSON object.")
    return content


def token_text(token: object) -> str | None:
    """A special token as text: files write it as a string, or as an object with `content`."""
    text = token.get("content") if isinstance(token, dict) else token
    return text if isinstance(text, str) else None
