"""Which chat template a model has, and the special tokens it may name."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from bros_router.checkpoint_json import read_json, token_text
from bros_router.startup_error import CheckpointError

_SPECIAL_TOKENS: Final = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
#: Of several templates, the one for chats without tools.
_DEFAULT_NAME: Final = "default"


@dataclass(frozen=True, slots=True)
class ChatTemplate:
    """A model's chat template. Nothing of it was looked at yet: a broken one is found out by the first chat."""

    #: Jinja.
    source: str
    #: The special tokens that the model has, as text: templates know them as `bos_token`, `eos_token` and so on.
    special_tokens: Mapping[str, str]

    @property
    def knows_tools(self) -> bool:
        """Whether it looks at the tools that a model may call."""
        return re.search(r"\btools\b", self.source) is not None

    @property
    def knows_tool_calls(self) -> bool:
        """Whether it looks at the calls of earlier replies."""
        return "tool_calls" in self.source


def find_chat_template(
    path: Path, tokenizer_config: Mapping[str, Any], *, is_config_replaced: bool
) -> ChatTemplate | None:
    """The template of the model in folder `path`; `None` where it has none.

    Args:
        tokenizer_config: content of tokenizer_config.json, or of the file that replaces it.
        is_config_replaced: the operator named that file.

    Raises:
        CheckpointError: a file that would hold it is broken.
    """
    source = next(_sources(path, tokenizer_config, is_config_replaced=is_config_replaced), None)
    if source is None:
        return None
    special_tokens = (read_json(path / "special_tokens_map.json") or {}) | dict(tokenizer_config)
    texts = {name: token_text(special_tokens.get(name)) for name in _SPECIAL_TOKENS}
    return ChatTemplate(source, {name: text for name, text in texts.items() if text is not None})


def _sources(path: Path, tokenizer_config: Mapping[str, Any], *, is_config_replaced: bool) -> Iterator[str]:
    """In TGI's order. It does not know chat_template.jinja, which `transformers` writes today and believes first."""
    yield from _templates_in(read_json(path / "chat_template.json"))
    if is_config_replaced:
        yield from _templates_in(tokenizer_config)
    yield from _text_of(path / "chat_template.jinja")
    yield from _templates_in(tokenizer_config)
    yield from _templates_in(read_json(path / "processor_config.json"))


def _templates_in(config: Mapping[str, Any] | None) -> Iterator[str]:
    """`chat_template` is one template, or a list of named ones."""
    declared = (config or {}).get("chat_template")
    named = declared if isinstance(declared, list) else [{"name": _DEFAULT_NAME, "template": declared}]
    for entry in named:
        if isinstance(entry, dict) and entry.get("name") == _DEFAULT_NAME and isinstance(entry.get("template"), str):
            yield entry["template"]


def _text_of(path: Path) -> Iterator[str]:
    try:
        yield path.read_text(encoding="utf-8")
    except FileNotFoundError:
        return
    except (OSError, UnicodeDecodeError) as error:
        raise CheckpointError(f"{path.name} cannot be read ({error}).") from None
