"""Reads the standard library of the running Python as text: modules, definitions, help topics.

Sources are parsed, never imported; only modules compiled into the interpreter, which have no source, are asked
for their docstrings. Everything is returned in sorted order, so one Python always yields the same text.
"""

from __future__ import annotations

import ast
import importlib
import inspect
import re
import sys
import sysconfig
import textwrap
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Final, TypeAlias

FunctionNode: TypeAlias = ast.FunctionDef | ast.AsyncFunctionDef

#: Tests, tables, third-party packages, and what a build generates: not prose and not code to learn from.
EXCLUDED_PARTS: Final = frozenset(
    {
        "__phello__", "__pycache__", "_bundled", "encodings", "idle_test", "msilib", "pydoc_data",
        "site-packages", "dist-packages", "test", "tests", "turtledemo",
    }
)  # fmt: skip
EXCLUDED_PREFIXES: Final = ("_sysconfigdata", "config-")
#: ntpath repeats what posixpath says of os.path.
EXCLUDED_MODULES: Final = frozenset({"ntpath"})
#: Implementations documented under the name that users import; builtins need none.
PUBLIC_NAMES: Final = {
    "_collections_abc": "collections.abc",
    "_pydatetime": "datetime",
    "_pydecimal": "decimal",
    "_pyio": "io",
    "builtins": "",
    "posix": "os",
    "posixpath": "os.path",
}
#: A line that holds only literals: one row of a table.
TABLE_ROW: Final = re.compile(r"^\s*[\[({]*['\"\d-].*[,:)\]}]\s*(#.*)?$")
#: Above this share of table rows a file is data (html/entities.py has 0.99, ordinary modules under 0.1).
MAX_TABLE_SHARE: Final = 0.3
#: Longer lines are embedded data or regular expressions.
MAX_LINE_CHARS: Final = 160
#: Longer signatures are cut: nobody reads them.
MAX_SIGNATURE_CHARS: Final = 160
LEGAL: Final = re.compile(
    r"copyright|all rights reserved|licensed (to|under)|warranty|permission (to use|is hereby)|\bSPDX\b", re.I
)


@dataclass(frozen=True)
class Definition:
    """A documented function, method or class."""

    name: str  # dotted, as users write it: "textwrap.TextWrapper.wrap", "os.path.join", "len"
    signature: str  # "(text, width=70)"; empty for a class and only for a class
    docstring: str  # clean, never empty
    source: str  # dedented source of a function; empty for a class or a compiled function

    @property
    def is_public(self) -> bool:
        return not any(part.startswith("_") for part in self.name.split("."))


@dataclass(frozen=True)
class Module:
    """One module as text."""

    name: str
    docstring: str
    source: str  # empty for a compiled module
    definitions: tuple[Definition, ...]


@dataclass(frozen=True)
class Topic:
    """One page of `help()`: a section of the language reference."""

    name: str
    text: str


def clean_docstring(raw: str) -> str:
    """Dedent; drop trailing blanks, legal notices and repeated empty lines."""
    lines = [line.rstrip() for line in inspect.cleandoc(raw.expandtabs(8)).splitlines()]
    paragraphs = re.split(r"\n\s*\n", "\n".join(lines))
    return "\n\n".join(text for text in paragraphs if text.strip() and not LEGAL.search(text))


def clean_source(raw: str) -> str:
    """Expand tabs; drop overlong lines and leading comment blocks that only state a licence."""
    lines = [line.rstrip() for line in raw.expandtabs(8).splitlines()]
    blocks = re.split(r"\n\n+", "\n".join(line for line in lines if len(line) <= MAX_LINE_CHARS))
    while blocks and is_comment(blocks[0]) and LEGAL.search(blocks[0]):
        blocks.pop(0)
    return re.sub(r"\n{4,}", "\n\n\n", "\n\n".join(blocks)).strip("\n") + "\n"


def is_comment(block: str) -> bool:
    return all(line.startswith("#") or not line for line in block.splitlines())


def is_table(source: str) -> bool:
    """Whether a file is mostly literals."""
    lines = [line for line in source.splitlines() if line.strip()]
    rows = sum(bool(TABLE_ROW.match(line)) for line in lines)
    return rows > MAX_TABLE_SHARE * len(lines)


def source_root() -> Path:
    return Path(sysconfig.get_paths()["stdlib"])


def read_modules(root: Path) -> Iterator[Module]:
    """Every module under `root` worth reading, by name."""
    for path in sorted(root.rglob("*.py")):
        relative = path.relative_to(root)
        if EXCLUDED_PARTS.intersection(relative.parts) or relative.parts[0].startswith(EXCLUDED_PREFIXES):
            continue
        name = ".".join(relative.with_suffix("").parts).removesuffix(".__init__")
        try:
            source = path.read_text("utf-8")
            module = parse_module(name, source)
        except (UnicodeDecodeError, SyntaxError):  # lib2to3 keeps samples of both
            continue
        if name not in EXCLUDED_MODULES and not is_table(source):
            yield module


def parse_module(name: str, source: str) -> Module:
    """Split a module's text into what documents it and what it does. Raises SyntaxError."""
    tree = ast.parse(source)
    definitions = tuple(walk_definitions(tree, PUBLIC_NAMES.get(name, name), source.splitlines()))
    return Module(name, clean_docstring(ast.get_docstring(tree, clean=False) or ""), clean_source(source), definitions)


def walk_definitions(node: ast.Module | ast.ClassDef, prefix: str, lines: list[str]) -> Iterator[Definition]:
    """The documented definitions directly in `node` and in its classes, in source order."""
    for child in node.body:
        if not isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            continue
        name = join_names(prefix, child.name)
        docstring = clean_docstring(ast.get_docstring(child, clean=False) or "")
        if isinstance(child, ast.ClassDef):
            if docstring:
                yield Definition(name, "", docstring, "")
            yield from walk_definitions(child, name, lines)
        elif docstring:
            yield Definition(name, signature_of(child), docstring, source_of(child, lines))


def join_names(prefix: str, name: str) -> str:
    return f"{prefix}.{name}" if prefix else name


def signature_of(node: FunctionNode) -> str:
    arguments = re.sub(r"^(self|cls|mcls)\b(, (/, )?)?", "", ast.unparse(node.args))
    if len(arguments) > MAX_SIGNATURE_CHARS:
        arguments = arguments[:MAX_SIGNATURE_CHARS].rsplit(",", 1)[0] + ", ..."
    return f"({arguments})"


def source_of(node: FunctionNode, lines: list[str]) -> str:
    """A function's own lines, decorators included, dedented."""
    first = min([node.lineno, *(decorator.lineno for decorator in node.decorator_list)])
    return textwrap.dedent("\n".join(lines[first - 1 : node.end_lineno]).expandtabs(8))


def read_compiled_modules() -> Iterator[Module]:
    """Docstrings of the modules linked into the interpreter: builtins, itertools, posix, sys, time, ..."""
    for name in sorted(sys.builtin_module_names):
        if not name.startswith("_"):
            module = importlib.import_module(name)
            definitions = tuple(walk_objects(module, PUBLIC_NAMES.get(name, name)))
            yield Module(name, clean_docstring(module.__doc__ or ""), "", definitions)


def walk_objects(owner: ModuleType | type, prefix: str) -> Iterator[Definition]:
    """The documented callables directly in `owner` and in its classes, by name."""
    for key, value in sorted(vars(owner).items()):
        if not callable(value):
            continue
        docstring = clean_docstring(getattr(value, "__doc__", None) or "")
        name = join_names(prefix, key)
        if docstring:
            yield Definition(name, compiled_signature(value), docstring, "")
        if isinstance(value, type) and isinstance(owner, ModuleType) and value.__module__ == owner.__name__:
            yield from walk_objects(value, name)


def compiled_signature(value: object) -> str:
    """Like `signature_of`; most compiled functions carry a signature, the others get "(...)"."""
    if isinstance(value, type):
        return ""
    signature = getattr(value, "__text_signature__", None) or "(...)"
    return re.sub(r"\$(self|module|type)(, /)?(, )?", "", signature)


def read_topics(root: Path) -> Iterator[Topic]:
    """The pages behind `help("with")` and the like, by name; none if this Python ships without them."""
    path = root / "pydoc_data" / "topics.py"
    if not path.exists():
        return
    for statement in ast.parse(path.read_text("utf-8")).body:
        if isinstance(statement, ast.Assign) and isinstance(statement.value, ast.Dict):
            topics: dict[str, str] = ast.literal_eval(statement.value)
            for name in sorted(topics):
                yield Topic(name, clean_docstring(topics[name]))
