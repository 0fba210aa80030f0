"""Logging: one line an event on stderr, for people or (`--json-output`) for machines, with TGI's keys.

The libraries' logs (standard `logging`) and the ranks' output take the same way.
"""

from __future__ import annotations

import logging
import re
import sys
from typing import Any, Final, TextIO

import structlog
from structlog.typing import EventDict, WrappedLogger

from bros_router.config import LogConfig

#: TGI's names of levels (those of Rust's `tracing`) and ours.
_LEVELS: Final = {
    "trace": "DEBUG",
    "debug": "DEBUG",
    "info": "INFO",
    "warn": "WARNING",
    "warning": "WARNING",
    "error": "ERROR",
    "off": "CRITICAL",
}
#: A line as `structlog` writes it where nothing was configured: time, [level], event.
_RANK_LINE: Final = re.compile(r"(?:[\d-]+[T ][\d:.]+Z? +)?\[(debug|info|warning|error|critical) *\] (.*)")
#: What a rank may use to colour its lines; stripped, since these end in files and collectors.
_COLOUR: Final = re.compile(r"\x1b\[[0-9;]*m")

_ranks = structlog.get_logger("bros_shard")


def level_of(directives: str) -> str:
    """The level that applies to everything in a value of LOG_LEVEL such as `info,text_generation_router=debug`.

    Returns a name of `logging`; `INFO` where no directive is a bare, known level.
    """
    for directive in directives.split(","):
        level = _LEVELS.get(directive.strip().lower())
        if level is not None:
            return level
    return "INFO"


def configure(config: LogConfig) -> None:
    """Send every log of this process to stderr. Replaces what was configured before."""
    shared: list[structlog.typing.Processor] = [
        structlog.stdlib.add_log_level,
        structlog.stdlib.add_logger_name,
        structlog.stdlib.ExtraAdder(),
        structlog.processors.TimeStamper(fmt="iso", utc=True),
    ]
    structlog.configure(
        processors=[
            structlog.stdlib.filter_by_level,
            *shared,
            structlog.stdlib.ProcessorFormatter.wrap_for_formatter,
        ],
        logger_factory=structlog.stdlib.LoggerFactory(),
        wrapper_class=structlog.stdlib.BoundLogger,
        cache_logger_on_first_use=True,
    )
    handler = _StderrHandler()
    handler.setFormatter(
        structlog.stdlib.ProcessorFormatter(
            foreign_pre_chain=shared,
            processors=[structlog.stdlib.ProcessorFormatter.remove_processors_meta, *_renderers(config)],
        )
    )
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(config.level)
    # Each download is a dozen requests, logged at INFO by these.
    for name in ("httpx", "httpx2", "httpcore", "httpcore2"):
        logging.getLogger(name).setLevel(logging.WARNING)


def log_rank_line(rank: int, line: str) -> None:
    """Pass on a line that a rank wrote: as it is, at the level it names."""
    line = _COLOUR.sub("", line)
    match = _RANK_LINE.fullmatch(line)
    level, message = match.groups() if match is not None else ("info", line)
    if message.strip():
        getattr(_ranks, level)(message, rank=rank)


class _StderrHandler(logging.StreamHandler[TextIO]):
    """Writes to whatever `sys.stderr` is at the time: a progress bar replaces it while it is drawn."""

    def __init__(self) -> None:
        super().__init__(sys.stderr)

    @property
    def stream(self) -> TextIO:
        """Where lines go now."""
        return sys.stderr

    @stream.setter
    def stream(self, stream: TextIO) -> None:
        """Assigned by the base class; `sys.stderr` stays the one source."""


def _renderers(config: LogConfig) -> list[structlog.typing.Processor]:
    if config.json_output:
        return [structlog.processors.format_exc_info, _tgi_keys, structlog.processors.JSONRenderer()]
    is_coloured = sys.stderr.isatty() if config.colorize is None else config.colorize
    return [structlog.dev.ConsoleRenderer(colors=is_coloured, sort_keys=False)]


def _tgi_keys(logger: WrappedLogger, method: str, event: EventDict) -> EventDict:
    """`timestamp`, `level` in capitals, `message`, the event's own fields, `target`."""
    return {
        "timestamp": event.pop("timestamp"),
        "level": _tgi_level(event.pop("level")),
        "message": event.pop("event"),
        "target": event.pop("logger"),
        **event,
    }


def _tgi_level(level: Any) -> str:
    return {"warning": "WARN", "critical": "ERROR"}.get(level, str(level).upper())
