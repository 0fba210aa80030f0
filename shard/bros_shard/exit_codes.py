"""The exit statuses of the launcher and of a rank: one for each class of failure.

Torch-free: the router imports this module.
"""

from __future__ import annotations

from enum import IntEnum


class ExitCode(IntEnum):
    """Why a process ended."""

    #: It was asked to (SIGTERM, SIGINT, `Shutdown`) and finished what it had accepted.
    OK = 0
    #: A fault of ours: an error that nothing expected.
    INTERNAL = 1
    #: The command line or the machine: a bad flag, a port that is taken, too few GPUs. Starting again will not help.
    USAGE = 2
    #: The model is not there: no such folder, no such repository, no network, no room for the download.
    MODEL_NOT_FOUND = 3
    #: The model is there and cannot be served: broken, incomplete, or of a kind that is not supported.
    BAD_CHECKPOINT = 4
    #: A rank died while starting or serving. Starting again may help.
    RANK_DIED = 5
