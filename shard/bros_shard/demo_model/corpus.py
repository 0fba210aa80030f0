"""Turns the standard library into training documents and holds some modules back for validation."""

from __future__ import annotations

import re
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import Final

from bros_shard.demo_model import conversations
from bros_shard.demo_model.stdlib import (
    Definition,
    Module,
    Topic,
    read_compiled_modules,
    read_modules,
    read_topics,
    source_root,
)

#: One origin in this many is never trained on.
VALIDATION_ONE_IN: Final = 20
#: Anything shorter says nothing.
MIN_DOCUMENT_CHARS: Final = 80


class Kind(Enum):
    """What a document is. The value is how often one pass over the corpus repeats it: English prose first."""

    TOPIC = ("topic", 3)
    REFERENCE = ("reference", 2)
    CHAT = ("chat", 2)
    SMALL_TALK = ("small talk", 8)
    SOURCE = ("source", 1)

    def __init__(self, label: str, repeats: int) -> None:
        self.label = label
        self.repeats = repeats


@dataclass(frozen=True)
class Document:
    """One text, followed by the end-of-text token when trained on."""

    kind: Kind
    origin: str  # the module or topic it comes from: the unit of the validation split
    text: str

    @property
    def is_validation(self) -> bool:
        """Held back, with everything else of the same origin. Small talk is ours and is always trained on."""
        checksum = zlib.crc32(self.origin.encode())
        return self.kind is not Kind.SMALL_TALK and checksum % VALIDATION_ONE_IN == 0


def build_corpus(root: Path | None = None) -> list[Document]:
    """Every document, in an order that depends on nothing but the text read.

    `root` is a folder of sources; by default the running Python's standard library, compiled modules included.
    """
    sources = list(read_modules(root or source_root()))
    compiled = [] if root else list(read_compiled_modules())
    modules = drop_repeats([*compiled, *sources])
    topics = list(read_topics(root or source_root()))
    documents = [
        *(topic_page(topic) for topic in topics),
        *(reference_page(module) for module in modules),
        *(Document(Kind.SOURCE, module.name, module.source) for module in modules),
        *(Document(Kind.CHAT, name, text) for name, text in conversations.about_topics(topics)),
        *(Document(Kind.CHAT, name, text) for name, text in conversations.about_modules(modules)),
        *(Document(Kind.SMALL_TALK, "bros", text) for text in conversations.small_talk()),
    ]
    return [document for document in documents if len(document.text) >= MIN_DOCUMENT_CHARS]


def drop_repeats(modules: Iterable[Module]) -> list[Module]:
    """Keep the first definition with a given docstring: copies would cross the validation split."""
    seen: set[str] = set()

    def first_seen(definitions: Iterable[Definition]) -> Iterator[Definition]:
        for definition in definitions:
            key = " ".join(definition.docstring.lower().split())
            if key not in seen:
                seen.add(key)
                yield definition

    return [
        Module(module.name, module.docstring, module.source, tuple(first_seen(module.definitions)))
        for module in modules
    ]


def topic_page(topic: Topic) -> Document:
    """A help topic with its underlined headings turned into Markdown ones."""
    text = re.sub(r"^(\S.*)\n([*=~\-])\2{2,}$", r"# \1", topic.text, flags=re.M)
    return Document(Kind.TOPIC, topic.name, text + "\n")


def reference_page(module: Module) -> Document:
    """A module's documentation as one Markdown page: its docstring, then a section for each definition."""
    sections = [f"# {module.name}", module.docstring]
    for definition in module.definitions:
        sections += [f"## {definition.name}{definition.signature}", definition.docstring]
    text = "\n\n".join(section for section in sections if section)
    documented = module.docstring or module.definitions
    return Document(Kind.REFERENCE, module.name, text + "\n" if documented else "")
