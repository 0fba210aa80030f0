"""Flags as click options, and a help page that groups them."""

from __future__ import annotations

import math
import re
import types
import typing
from collections.abc import Iterator
from dataclasses import fields, replace
from typing import Any, Final

import click

from bros_router import tgi_flags
from bros_router.config import SECTIONS, Flag, flags_of

_SIZE: Final = re.compile(r"(\d+(?:\.\d+)?) *([kmgt]?)(i?b)?", re.IGNORECASE)

#: What stands for a value on the help page.
_METAVARS: Final = {int: "N", float: "X", bool: "true|false", str: "TEXT", tuple: "TEXT"}


class SectionOption(click.Option):
    """An option that knows its section of the help page."""

    def __init__(self, declarations: list[str], *, section: str, default_text: str, **how: Any) -> None:
        super().__init__(declarations, **how)
        self.section = section
        self.default_text = default_text

    def get_help_record(self, context: click.Context) -> tuple[str, str]:
        """Names on the left; on the right what it does, its environment variable and its default."""
        names = ", ".join(sorted(self.opts, key=len))
        metavar = "" if self.is_flag else f" {self.make_metavar(context)}"
        notes = [f"[env: {self.envvar}]"] if self.envvar else []
        notes += [f"[default: {self.default_text}]"] if self.default_text else []
        return names + metavar, " ".join([self.help or "", *notes])


class SectionedCommand(click.Command):
    """A command whose help page lists its options by section."""

    def format_options(self, context: click.Context, formatter: click.HelpFormatter) -> None:
        """Write one list of options per section, in order of first appearance."""
        sections: dict[str, list[tuple[str, str]]] = {}
        for parameter in self.get_params(context):
            record = parameter.get_help_record(context)
            if record is not None:
                section = parameter.section if isinstance(parameter, SectionOption) else "Other"
                sections.setdefault(section, []).append(record)
        for section, records in sections.items():
            with formatter.section(section):
                formatter.write_dl(records)


class SizeType(click.types.IntParamType):
    """Bytes: a plain number, or one with a unit. `KB` is 1000 bytes; `KiB`, and `K` alone, 1024."""

    name = "size"

    def convert(self, value: Any, parameter: click.Parameter | None, context: click.Context | None) -> int:
        """Parse a size such as `2GiB`; at least one byte."""
        match = _SIZE.fullmatch(str(value).strip())
        if match is None:
            self.fail(f"{value!r} is not a size such as 2GiB, 500MB or 1048576.", parameter, context)
        number, prefix, unit = match.groups()
        base = 1000 if (unit or "").lower() == "b" else 1024
        size = int(float(number) * base ** " kmgt".index(prefix.lower() or " "))
        if size < 1:
            self.fail(f"{value!r} is no room at all.", parameter, context)
        return size


class FiniteRange(click.FloatRange):
    """A number within bounds; NaN is within none, though it compares as if it were within all."""

    def convert(self, value: Any, parameter: click.Parameter | None, context: click.Context | None) -> float:
        """Parse a finite number."""
        number: float = super().convert(value, parameter, context)
        if not math.isfinite(number):
            self.fail(f"{value!r} is not a finite number.", parameter, context)
        return number


class ListType(click.types.StringParamType):
    """A repeatable string; its environment variable holds several, separated by commas."""

    envvar_list_splitter = ","


def serve_options() -> Iterator[SectionOption]:
    """Every flag of the launcher: our configuration's by section, then TGI's others."""
    for _, section, config_class in SECTIONS:
        for name in flags_of(config_class):
            yield config_option(config_class, name, section)
            if name == "max_input_tokens":
                yield _option("max_input_length", tgi_flags.MAX_INPUT_LENGTH, int, section)
            elif name == "num_shard":
                yield _option("sharded", tgi_flags.SHARDED, bool, section)
            elif name == "json_output":
                yield _option("env", tgi_flags.ENV, bool, section, is_switch=True)
    for section, foreign_flags in (
        ("Accepted, without effect", tgi_flags.ACCEPTED),
        ("Refused", tgi_flags.REFUSED),
    ):
        for foreign in foreign_flags:
            yield _option(
                foreign.name,
                replace(foreign.flag, help=f"{foreign.flag.help} {foreign.reason}"),
                foreign.type,
                section,
                is_switch=foreign.type is bool,
            )


def config_option(config_class: type, name: str, section: str = "Options") -> SectionOption:
    """The option of one field of a configuration class."""
    flag = flags_of(config_class)[name]
    default = next(item.default for item in fields(config_class) if item.name == name)
    kind = _plain_type(typing.get_type_hints(config_class)[name])
    shown_default = flag.default_text or ("" if default is None or default is False else str(default))
    return _option(name, replace(flag, default_text=shown_default), kind, section, is_switch=kind is bool)


def _option(
    name: str,
    flag: Flag,
    kind: type,
    section: str,
    *,
    is_switch: bool = False,
) -> SectionOption:
    """Defaults stay with the configuration classes; click only shows them."""
    declarations = [name, flag.option] + ([f"-{flag.short}"] if flag.short else [])
    return SectionOption(
        declarations,
        section=section,
        type=None if is_switch else _click_type(flag, kind),
        is_flag=is_switch,
        multiple=kind is tuple,
        default=False if is_switch else None,
        default_text=flag.default_text,
        envvar=flag.variable or None,
        help=flag.help,
        metavar=None if flag.choices else "SIZE" if flag.is_bytes else _METAVARS.get(kind),
    )


def _click_type(flag: Flag, kind: type) -> click.ParamType[Any]:
    if flag.is_bytes:
        return SizeType()
    if flag.choices:
        return click.Choice(flag.choices)
    if kind is tuple:
        return ListType()
    if flag.minimum is not None or flag.maximum is not None:
        number_range: Any = click.IntRange if kind is int else FiniteRange
        return number_range(flag.minimum, flag.maximum)  # type: ignore[no-any-return]
    return click.types.convert_type(kind)


def _plain_type(hint: Any) -> type:
    """`int` of `int | None`, `tuple` of `tuple[str, ...]`."""
    if isinstance(hint, types.UnionType):
        hint = next(member for member in typing.get_args(hint) if member is not types.NoneType)
    plain = typing.get_origin(hint) or hint
    assert isinstance(plain, type)
    return plain
