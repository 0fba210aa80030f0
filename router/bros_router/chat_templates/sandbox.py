"""Renders a chat template as `transformers` does, in Jinja's sandbox. Only the helper process imports this.

The sandbox keeps a template away from Python's internals and from changing what it is given. It bounds neither time
nor memory: the process does (`helper`).
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from datetime import datetime
from functools import lru_cache
from typing import Any, Final, NoReturn

import jinja2
from jinja2 import nodes
from jinja2.ext import Extension, LoopControlExtension
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from bros_router.chat_templates.protocol import MAX_PROMPT_CHARACTERS, MAX_REASON_CHARACTERS

#: A server has one; compiling it takes milliseconds.
_NUM_COMPILED: Final = 4


class RefusedTemplateError(Exception):
    """There is no prompt. The message is public."""


class _GenerationBlock(Extension):
    """`{% generation %}` marks what the assistant said, for training. In a prompt it stands for what it holds."""

    tags = {"generation"}  # noqa: RUF012

    def parse(self, parser: Parser) -> nodes.Node:
        """The block's body, with the scope that `transformers` gives it."""
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.Scope(body, lineno=line)


def render(source: str, variables: Mapping[str, Any]) -> str:
    """The prompt, which is UTF-8.

    Raises:
        RefusedTemplateError: the template is none, or refuses the messages, or fails.
    """
    try:
        return _render(source, variables)
    except jinja2.TemplateError as error:
        reason = error.message or type(error).__name__
    except MemoryError:
        reason = "rendering takes too much memory"
    except UnicodeEncodeError:
        reason = "the prompt is not Unicode"
    except Exception as error:
        # What Python says of such errors may name objects and their addresses.
        reason = f"the template failed ({type(error).__name__})"
    raise RefusedTemplateError(reason[:MAX_REASON_CHARACTERS].encode(errors="replace").decode())


def _render(source: str, variables: Mapping[str, Any]) -> str:
    parts, num_characters = [], 0
    for part in _compiled(source).generate(variables):
        num_characters += len(part)
        if num_characters > MAX_PROMPT_CHARACTERS:
            raise jinja2.TemplateError(f"the prompt is longer than {MAX_PROMPT_CHARACTERS} characters")
        parts.append(part)
    prompt = "".join(parts)
    prompt.encode()  # a template can write half a surrogate pair
    return prompt


@lru_cache(maxsize=_NUM_COMPILED)
def _compiled(source: str) -> jinja2.Template:
    return _environment().from_string(source)


@lru_cache(maxsize=1)
def _environment() -> ImmutableSandboxedEnvironment:
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_GenerationBlock, LoopControlExtension]
    )
    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = _strftime_now
    return environment


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """Jinja's own would escape what HTML does not allow."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _raise_exception(message: object) -> NoReturn:
    raise jinja2.TemplateError(str(message))


def _strftime_now(format: str) -> str:
    return datetime.now().strftime(format)
