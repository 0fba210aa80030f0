"""Fixtures of the kernels' tests."""

from __future__ import annotations

import pytest
import torch

from bros_kernels.kernels import Kernels, UnknownKernelsError, select_kernels


def _cpu_kernels(dtype: torch.dtype, has_int8_weights: bool = False) -> Kernels:
    try:
        return select_kernels("cpu", torch.device("cpu"), dtype, 2, has_int8_weights)
    except UnknownKernelsError as error:
        pytest.skip(str(error))


@pytest.fixture(scope="session")
def cpu_kernels() -> Kernels:
    """The C kernels in bfloat16, with two threads."""
    return _cpu_kernels(torch.bfloat16)


@pytest.fixture(scope="session")
def cpu_float32_kernels() -> Kernels:
    """The same in float32."""
    return _cpu_kernels(torch.float32)


@pytest.fixture(scope="session")
def cpu_int8_kernels() -> Kernels:
    """The same in bfloat16 with int8 weights."""
    return _cpu_kernels(torch.bfloat16, has_int8_weights=True)
