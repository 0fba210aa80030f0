"""Rows that go through adapters get what merged weights give, and the others what they get without any."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from bros_kernels.cpu_kernels import CpuKernels
from bros_kernels.kernels import Kernels
from bros_kernels.linear import Linear, RMSNorm
from bros_kernels.low_rank import AdaptedLinear, AdaptedRows, AdapterRouting, low_rank_of, unadapted

OUT_FEATURES, IN_FEATURES, NUM_ROWS = 32, 64, 13
#: Rows of the adapters 0 and 2; 1 has no part in the product, and the others go through none.
ROUTES = {0: [0, 3, 4, 11], 1: [1, 2], 2: [5, 12]}
RANKS = {0: 4, 2: 5}


class Adapted:
    """A product with two adapters, and each row's own weight."""

    def __init__(self, kernels: Kernels, dtype: torch.dtype, is_gated: bool) -> None:
        self.routing = AdapterRouting()
        self.norm = RMSNorm(torch.rand(IN_FEATURES).add(0.5).to(dtype), 1e-5)
        self.is_gated = is_gated
        num_features = OUT_FEATURES * (2 if is_gated else 1)
        weight = torch.randn(num_features, IN_FEATURES).to(dtype)
        linear: Linear
        if is_gated:
            linear = kernels.gated_linear(weight, None, F.silu, self.norm)
        else:
            linear = kernels.linear(weight, None, self.norm)
        self.weights = weight.double().repeat(NUM_ROWS, 1, 1)
        low_ranks = {}
        for adapter, rank in RANKS.items():
            down, up = torch.randn(rank, IN_FEATURES).to(dtype), torch.randn(num_features, rank).to(dtype)
            low_ranks[adapter] = low_rank_of(kernels, down, up, self.norm)
            self.weights[ROUTES[adapter]] += up.double() @ down.double()
        self.linear = AdaptedLinear(kernels, linear, num_features, low_ranks, self.routing)
        self.x = torch.randn(NUM_ROWS, IN_FEATURES).to(dtype)
        self.residual = torch.randn(NUM_ROWS, num_features).to(dtype)

    def expected(self, residual: Tensor | None) -> Tensor:
        """In float64, with merged weights."""
        normed = F.rms_norm(self.x.double(), self.norm.weight.shape, self.norm.weight.double(), self.norm.eps)
        product = torch.einsum("roi,ri->ro", self.weights, normed)
        if residual is not None:
            product += residual.double()
        if not self.is_gated:
            return product
        gate, up = product.chunk(2, -1)
        return F.silu(gate) * up


def adapted_rows(routes: dict[int, list[int]]) -> tuple[AdaptedRows, ...]:
    return tuple(AdaptedRows(adapter, torch.tensor(rows)) for adapter, rows in routes.items())


@pytest.mark.parametrize("is_gated", [False, True])
def test_each_row_goes_through_its_adapter(kind: tuple[Kernels, torch.dtype], is_gated: bool) -> None:
    kernels, dtype = kind
    adapted = Adapted(kernels, dtype, is_gated)
    tolerance = {torch.float32: 1e-4, torch.float16: 6e-3, torch.bfloat16: 3e-2}[dtype]
    with torch.inference_mode():
        for residual in (None, adapted.residual):
            expected = adapted.expected(residual)
            before = adapted.residual.clone()
            with adapted.routing.routed(adapted_rows(ROUTES)):
                found = adapted.linear(adapted.x, residual)
            assert torch.equal(adapted.residual, before)
            largest = float(expected.abs().max())
            torch.testing.assert_close(found.double(), expected, rtol=tolerance, atol=tolerance * largest)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("is_gated", [False, True])
@pytest.mark.parametrize("has_residual", [False, True])
def test_row_has_the_bits_that_it_has_alone(
    cpu_kernels: Callable[..., CpuKernels], dtype: torch.dtype, is_gated: bool, has_residual: bool
) -> None:
    adapted = Adapted(cpu_kernels(dtype), dtype, is_gated)
    residual = adapted.residual if has_residual else None
    with torch.inference_mode():
        with adapted.routing.routed(adapted_rows(ROUTES)):
            found = adapted.linear(adapted.x, residual)
        routes = {row: adapter for adapter, rows in ROUTES.items() for row in rows}
        for row in range(NUM_ROWS):
            alone = (AdaptedRows(routes[row], None),) if row in routes else ()
            with adapted.routing.routed(alone):
                part = None if residual is None else residual[row : row + 1]
                assert torch.equal(adapted.linear(adapted.x[row : row + 1], part), found[row : row + 1])


def test_nothing_is_added_where_no_row_has_an_adapter_of_this_product(kind: tuple[Kernels, torch.dtype]) -> None:
    adapted = Adapted(*kind, is_gated=False)
    plain = unadapted(adapted.linear)
    assert unadapted(plain) is plain
    expected = plain(adapted.x, adapted.residual)
    assert torch.equal(adapted.linear(adapted.x, adapted.residual), expected)
    with adapted.routing.routed((AdaptedRows(1, None),)):
        assert torch.equal(adapted.linear(adapted.x, adapted.residual), expected)


def test_pass_in_the_middle_of_another_leaves_its_rows_alone() -> None:
    routing = AdapterRouting()
    outer, inner = (AdaptedRows(0, None),), (AdaptedRows(1, None),)

    def fail() -> None:
        with routing.routed(inner):
            assert routing.adapted_rows == inner
            raise RuntimeError

    with routing.routed(outer):
        with pytest.raises(RuntimeError):
            fail()
        assert routing.adapted_rows == outer
    assert routing.adapted_rows == ()
