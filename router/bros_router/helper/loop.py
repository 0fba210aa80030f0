"""A helper's side: a process that answers one frame after another, and may not do much else.

Frames come in on stdin and go out on stdout; the end of stdin ends it. An answer that takes too long ends it as well,
by a signal: the router starts another.
"""

from __future__ import annotations

import resource
import signal
import sys
from collections.abc import Callable
from typing import BinaryIO, Final

import msgspec

from bros_router.helper.frame import LENGTH_BYTES, body_length, to_frame
from bros_shard.lifeline import die_with_parent

#: Seconds of processor time that one answer may take.
CPU_LIMIT_S: Final = 1.0
#: stdin, stdout, stderr.
_NUM_STREAMS: Final = 3
#: Less than threads have, so that what did not exhaust a helper's stack does not exhaust a rank's.
_STACK_BYTES: Final = 4 * 2**20


def serve(answer: Callable[[bytes], msgspec.Struct]) -> None:
    """Answer until the router closes stdin."""
    while (body := _read_frame(sys.stdin.buffer)) is not None:
        # Without a handler the signal ends the process, be it in the middle of one long call into C.
        signal.setitimer(signal.ITIMER_PROF, CPU_LIMIT_S)
        frame = to_frame(answer(body))
        signal.setitimer(signal.ITIMER_PROF, 0.0)
        sys.stdout.buffer.write(frame)
        sys.stdout.buffer.flush()


def give_up_resources(memory_bytes: int) -> None:
    """From here on: bounded memory, no file or socket that is not open yet, no file that grows, no child; and no life
    without the router.

    Args:
        memory_bytes: address space, interpreter included.
    """
    die_with_parent()
    for limit, value in (
        (resource.RLIMIT_AS, memory_bytes),
        (resource.RLIMIT_STACK, _STACK_BYTES),
        (resource.RLIMIT_NOFILE, _NUM_STREAMS),
        (resource.RLIMIT_FSIZE, 0),
        (resource.RLIMIT_NPROC, 0),
        (resource.RLIMIT_CORE, 0),
    ):
        resource.setrlimit(limit, (value, value))


def _read_frame(stream: BinaryIO) -> bytes | None:
    header = stream.read(LENGTH_BYTES)
    return stream.read(body_length(header)) if header else None
