"""Failures that end the launcher: each has its exit status and says in one line what to do."""

from __future__ import annotations

from typing import ClassVar

from bros_shard.exit_codes import ExitCode


class StartupError(Exception):
    """The server cannot start or go on. The message is one line for the operator."""

    exit_code: ClassVar[ExitCode] = ExitCode.INTERNAL


class UsageError(StartupError):
    """The command line asks for what cannot be: a port that is taken, more GPUs than there are."""

    exit_code = ExitCode.USAGE


class ModelNotFoundError(StartupError):
    """The model could not be found or downloaded."""

    exit_code = ExitCode.MODEL_NOT_FOUND


class CheckpointError(StartupError):
    """The model's files are broken, incomplete or of a kind that is not supported."""

    exit_code = ExitCode.BAD_CHECKPOINT


class RankDiedError(StartupError):
    """A rank ended that should not have."""

    exit_code = ExitCode.RANK_DIED
