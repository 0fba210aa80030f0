"""The template helper: a process that renders chat templates for the router, and may not do much else.

    python -m bros_router.chat_templates.helper

Frames (`protocol`) come in on stdin and go out on stdout, one at a time; the end of stdin ends it. A template that
takes too long ends it as well, by a signal: the router starts another.
"""

from __future__ import annotations

import codecs
import importlib
import resource
import signal
import sys
import time
from typing import BinaryIO, Final

import msgspec

from bros_router.chat_templates.protocol import (
    LENGTH_BYTES,
    Refused,
    Rendered,
    RenderReply,
    RenderRequest,
    body_length,
    to_frame,
)
from bros_router.chat_templates.sandbox import RefusedTemplateError, render
from bros_shard.lifeline import die_with_parent

#: Seconds of processor time that one rendering may take. Ten thousand messages take some hundredths.
_CPU_LIMIT_S: Final = 1.0
#: Address space, interpreter included.
_MEMORY_LIMIT_BYTES: Final = 512 * 2**20
#: stdin, stdout, stderr.
_NUM_STREAMS: Final = 3
#: What Jinja and Python load when they first need it, which is too late once no file can be opened.
_LATE_MODULES: Final = ("jinja2.constants", "jinja2.debug", "pprint", "textwrap", "unicodedata")
_LATE_CODECS: Final = ("ascii", "latin-1", "unicode-escape", "utf-8")

_request_decoder = msgspec.json.Decoder(RenderRequest)


def main() -> None:
    """Serve until the router closes stdin."""
    die_with_parent()
    _give_up_resources()
    while (body := _read_frame(sys.stdin.buffer)) is not None:
        # Without a handler the signal ends the process, be it in the middle of one long call into C.
        signal.setitimer(signal.ITIMER_PROF, _CPU_LIMIT_S)
        frame = to_frame(_answer(body))
        signal.setitimer(signal.ITIMER_PROF, 0.0)
        sys.stdout.buffer.write(frame)
        sys.stdout.buffer.flush()


def _answer(body: bytes) -> RenderReply:
    request = _request_decoder.decode(body)
    try:
        return Rendered(render(request.source, request.variables))
    except RefusedTemplateError as error:
        return Refused(str(error))


def _read_frame(stream: BinaryIO) -> bytes | None:
    header = stream.read(LENGTH_BYTES)
    return stream.read(body_length(header)) if header else None


def _give_up_resources() -> None:
    """From here on: bounded memory, no file or socket that is not open yet, no file that grows, no child."""
    time.localtime()  # reads the time zone, for `strftime_now`
    for module in _LATE_MODULES:
        importlib.import_module(module)
    for codec in _LATE_CODECS:
        codecs.lookup(codec)
    for limit, value in (
        (resource.RLIMIT_AS, _MEMORY_LIMIT_BYTES),
        (resource.RLIMIT_NOFILE, _NUM_STREAMS),
        (resource.RLIMIT_FSIZE, 0),
        (resource.RLIMIT_NPROC, 0),
        (resource.RLIMIT_CORE, 0),
    ):
        resource.setrlimit(limit, (value, value))


if __name__ == "__main__":
    main()
