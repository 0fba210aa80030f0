"""Fixtures of the kernels' tests."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import TypeAlias

import pytest
import torch

from bros_kernels.cpu_kernels import CpuKernels
from bros_kernels.kernels import Kernels, select_kernels
from bros_kernels.native import INSTRUCTION_SETS, NativeLibraryError, load_library

#: Called with an instruction set, a dtype, and perhaps `has_int8_weights` and `num_threads`.
MakeCpuKernels: TypeAlias = Callable[..., CpuKernels]


@pytest.fixture(scope="session")
def make_cpu_kernels() -> MakeCpuKernels:
    """Make the C kernels for an instruction set; skips what this processor has not."""

    def make(
        instruction_set: str, dtype: torch.dtype, has_int8_weights: bool = False, num_threads: int = 2
    ) -> CpuKernels:
        try:
            return CpuKernels(load_library(num_threads, [instruction_set]), dtype, has_int8_weights)
        except NativeLibraryError as error:
            pytest.skip(f"{instruction_set}: {error}")

    return make


@pytest.fixture(params=INSTRUCTION_SETS)
def cpu_kernels(request: pytest.FixtureRequest, make_cpu_kernels: MakeCpuKernels) -> Callable[..., CpuKernels]:
    """The same for each instruction set in turn: `cpu_kernels(dtype)`."""
    make_cpu_kernels(request.param, torch.bfloat16)
    return lambda dtype, *arguments, **options: make_cpu_kernels(request.param, dtype, *arguments, **options)


@pytest.fixture(
    params=[
        *(("torch", dtype) for dtype in (torch.float32, torch.float16, torch.bfloat16)),
        *itertools.product(INSTRUCTION_SETS, (torch.bfloat16, torch.float32)),
    ],
    ids=lambda kind: f"{kind[0]}-{kind[1]}",
)
def kind(request: pytest.FixtureRequest, make_cpu_kernels: MakeCpuKernels) -> tuple[Kernels, torch.dtype]:
    """Kernels and the dtype that they compute in."""
    name, dtype = request.param
    if name == "torch":
        return select_kernels("torch", torch.device("cpu"), dtype, num_threads=2), dtype
    return make_cpu_kernels(name, dtype), dtype
