"""Ties a child process to the launcher that started it: when the launcher dies, so does the child.

Torch-free, and to be called before anything slow is imported.
"""

from __future__ import annotations

import ctypes
import os
import signal
import sys
from typing import Final

#: Set by the supervisor in a child's environment: the process id of the launcher. A process started by hand has none.
PARENT_PID_VARIABLE: Final = "BROS_PARENT_PID"

_PR_SET_PDEATHSIG: Final = 1  # linux/prctl.h


def die_with_parent() -> None:
    """Have the kernel send SIGKILL to this process when the launcher ends, however it ends.

    Does nothing in a process that no launcher started. The kernel ties the child to the *thread* that started it, so
    the launcher must start its children from a thread that lives as long as the launcher: the main one.

    Raises:
        OSError: the kernel refuses.
    """
    parent_pid = os.environ.get(PARENT_PID_VARIABLE)
    if parent_pid is None:
        return
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0) != 0:
        raise OSError(ctypes.get_errno(), "prctl(PR_SET_PDEATHSIG)")
    # The launcher may have died before the call above: then no signal will ever come.
    if os.getppid() != int(parent_pid):
        sys.exit(0)
