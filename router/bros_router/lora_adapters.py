"""LoRA adapters as the operator names them, in TGI's grammar."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Final

#: `id`, `id@revision`, `id=path`; beside a path, a revision means nothing.
_ADAPTER: Final = re.compile(r"([^=@]+)(?:=([^@]+))?(?:@(.+))?")


@dataclass(frozen=True, slots=True)
class AdapterSource:
    """One adapter, and where it is."""

    #: As clients name it.
    adapter_id: str
    #: Its folder; `None`: the id is one, or its name on the hub.
    path: Path | None = None
    #: Branch, tag or commit on the hub.
    revision: str | None = None


def parse_adapters(text: str) -> tuple[AdapterSource, ...]:
    """Adapters separated by commas; none where the text is empty.

    Raises:
        ValueError: an item is not an adapter, or two have the same id.
    """
    sources: dict[str, AdapterSource] = {}
    for item in text.split(",") if text else ():
        match = _ADAPTER.fullmatch(item.strip())
        if match is None:
            raise ValueError(f"{item.strip()!r} is not an adapter such as id, id@revision or id=/path.")
        adapter_id, path, revision = match.groups()
        if adapter_id in sources:
            raise ValueError(f"{adapter_id!r} is given twice.")
        sources[adapter_id] = AdapterSource(adapter_id, None if path is None else Path(path), revision)
    return tuple(sources.values())
