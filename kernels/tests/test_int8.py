"""Products with int8 weights: exact integers in all kernels, and how far they are from products in full precision."""

from __future__ import annotations

import weakref
from collections.abc import Callable

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

from bros_kernels.cpu_kernels import CpuKernels
from bros_kernels.int8 import Int8Weight, round_rows
from bros_kernels.kernels import Kernels, select_kernels
from bros_kernels.linear import RMSNorm
from bros_kernels.native import INSTRUCTION_SETS
from bros_kernels.torch_kernels import TorchKernels

CPU = torch.device("cpu")
DTYPES = (torch.bfloat16, torch.float32)


@pytest.fixture(params=["torch", *INSTRUCTION_SETS])
def kernels(request: pytest.FixtureRequest, make_cpu_kernels: Callable[..., CpuKernels]) -> Kernels:
    """Kernels in bfloat16 with int8 weights."""
    if request.param == "torch":
        return select_kernels("torch", CPU, torch.bfloat16, 2, has_int8_weights=True)
    return make_cpu_kernels(request.param, torch.bfloat16, has_int8_weights=True)


def relative_error(found: Tensor, expected: Tensor) -> float:
    return float((found.double() - expected).norm() / expected.norm())


def test_rows_are_rounded_to_their_own_scale() -> None:
    values, scales = round_rows(torch.tensor([[1.0, -2.0, 0.5, 0.0], [0.0, 0.0, 0.0, 0.0], [3e8, -1.0, 2e8, 1.5e8]]))
    assert values.tolist() == [[64, -127, 32, 0], [0, 0, 0, 0], [127, 0, 85, 64]]  # 63.5 and 31.75; halves to even
    torch.testing.assert_close(scales, torch.tensor([2.0, 0.0, 3e8]) / 127)


@pytest.mark.parametrize("num_columns", [2, 5, 64, 575, 4096])
def test_integers_of_pytorch_are_exact(num_columns: int) -> None:
    """Also where every one of them is as large as can be."""
    for weight in (torch.randn(7, num_columns), torch.ones(7, num_columns)):
        x = torch.where(torch.randn(5, num_columns) > 0, 1.0, -1.0) * weight[:1]
        int8 = Int8Weight.of(weight)
        (x_values, x_scales), scales = round_rows(x), int8.scales
        exact = x_values.double() @ int8.values.double().T
        expected = exact.float() * x_scales[:, None] * scales
        assert torch.equal(int8.multiply(x, None), expected)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@settings(deadline=None, max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    num_rows=st.integers(1, 250),
    out_features=st.integers(1, 150),
    in_features=st.integers(2, 150),
    has_bias=st.booleans(),
    has_residual=st.booleans(),
    seed=st.integers(0, 1000),
)
def test_c_kernels_give_the_bits_of_pytorch(
    cpu_kernels: Callable[..., CpuKernels],
    dtype: torch.dtype,
    num_rows: int,
    out_features: int,
    in_features: int,
    has_bias: bool,
    has_residual: bool,
    seed: int,
) -> None:
    generator = torch.Generator().manual_seed(seed)

    def normal(*sizes: int) -> Tensor:
        return torch.randn(*sizes, generator=generator).to(dtype)

    weight, bias = normal(out_features, in_features), normal(out_features) if has_bias else None
    x = normal(num_rows, 2 * in_features)[:, :in_features] * normal(num_rows, 1)  # rows that lie apart
    residual = normal(num_rows, out_features) if has_residual else None
    found, expected = (
        kernels.linear(weight, bias)(x, residual)
        for kernels in (cpu_kernels(dtype, has_int8_weights=True), TorchKernels(dtype, has_int8_weights=True))
    )
    assert torch.equal(found, expected)


@pytest.mark.parametrize("num_rows", [1, 12, 13, 100])
@pytest.mark.parametrize("has_norm", [False, True])
def test_product_is_close_to_one_that_is_not_rounded(kernels: Kernels, num_rows: int, has_norm: bool) -> None:
    weight, x = torch.randn(96, 576).bfloat16(), torch.randn(num_rows, 576).bfloat16()
    norm = RMSNorm(torch.rand(576).add(0.5).bfloat16(), 1e-5) if has_norm else None
    expected = F.linear((x if norm is None else norm(x)).double(), weight.double())
    assert relative_error(kernels.linear(weight, norm=norm)(x), expected) < 0.02


@pytest.mark.parametrize("activation", [F.silu, F.gelu])
def test_gated_product_is_close_to_one_that_is_not_rounded(kernels: Kernels, activation) -> None:
    weight, bias = torch.randn(2 * 96, 576).bfloat16(), torch.randn(2 * 96).bfloat16()
    x = torch.randn(33, 576).bfloat16()
    gate, up = F.linear(x.double(), weight.double(), bias.double()).chunk(2, -1)
    assert relative_error(kernels.gated_linear(weight, bias, activation, None)(x), activation(gate) * up) < 0.02


def test_exact_product_is_not_rounded(kernels: Kernels) -> None:
    weight, x = torch.randn(96, 576).bfloat16(), torch.randn(5, 576).bfloat16()
    expected = F.linear(x.double(), weight.double())
    assert relative_error(kernels.linear(weight, is_exact=True)(x), expected) < 0.003


@pytest.mark.parametrize("poison", [torch.nan, torch.inf, -torch.inf])
def test_numbers_that_are_not_finite_spoil_their_own_row(kernels: Kernels, poison: float) -> None:
    weight, x = torch.randn(40, 64).bfloat16(), torch.randn(3, 64).bfloat16()
    linear = kernels.linear(weight)
    healthy = linear(x)
    x[1, 17] = poison
    found = linear(x)
    assert not found[1].isfinite().any()
    assert torch.equal(found[::2], healthy[::2])


def test_large_weight_is_rounded_row_by_row() -> None:
    weight = torch.randn(2500, 16).bfloat16()
    values, scales = round_rows(weight)
    rounded = Int8Weight.of(weight)
    assert torch.equal(rounded.values, values) and torch.equal(rounded.scales, scales)


def test_row_of_zeros(kernels: Kernels) -> None:
    bias = torch.randn(40).bfloat16()
    assert torch.equal(kernels.linear(torch.randn(40, 64).bfloat16(), bias)(torch.zeros(1, 64).bfloat16())[0], bias)


def test_rounded_weight_is_the_only_copy(kernels: Kernels) -> None:
    weight = torch.randn(64, 64).bfloat16()
    linear = kernels.linear(weight)
    plain = weakref.ref(weight)
    del weight
    assert linear(torch.ones(1, 64, dtype=torch.bfloat16)).shape == (1, 64)
    assert plain() is None
