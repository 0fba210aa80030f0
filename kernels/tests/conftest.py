"""Fixtures of the kernels' tests."""

from __future__ import annotations

import pytest
import torch

from bros_kernels.kernels import Kernels, UnknownKernelsError, select_kernels


@pytest.fixture(scope="session")
def cpu_kernels() -> Kernels:
    """The C kernels, with two threads."""
    try:
        return select_kernels("cpu", torch.device("cpu"), torch.bfloat16, num_threads=2)
    except UnknownKernelsError as error:
        pytest.skip(str(error))
