"""Low-rank adapters: products to which each row of a forward pass may add a small product of its own."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

from torch import Tensor
from torch.nn import functional as F

from bros_kernels.kernels import Kernels
from bros_kernels.linear import Linear, LowRank, RMSNorm


@dataclass(frozen=True, eq=False)
class AdaptedRows:
    """Rows of a forward pass that go through one adapter."""

    adapter: int
    #: int64; `None`: all rows.
    rows: Tensor | None


class AdapterRouting:
    """Which rows of the forward pass that runs go through which adapter, each through one at most."""

    def __init__(self) -> None:
        self.adapted_rows: tuple[AdaptedRows, ...] = ()

    @contextmanager
    def routed(self, adapted_rows: tuple[AdaptedRows, ...]) -> Iterator[None]:
        """For the time of a forward pass. It may begin in the middle of another, whose rows are back afterwards."""
        interrupted, self.adapted_rows = self.adapted_rows, adapted_rows
        try:
            yield
        finally:
            self.adapted_rows = interrupted


def low_rank_of(kernels: Kernels, down: Tensor, up: Tensor, norm: RMSNorm | None = None) -> LowRank:
    """Of the weights (rank, in_features) and (out_features, rank), which are not rounded to int8.

    Args:
        norm: of the inputs.
    """
    if len(down) % 2:  # zeros beside it: not all kernels take an odd number of inputs in bfloat16
        down, up = F.pad(down, (0, 0, 0, 1)), F.pad(up, (0, 1))
    return LowRank(kernels.linear(down, None, norm, is_exact=True), kernels.linear(up, is_exact=True))


class AdaptedLinear:
    """Implements `Linear`: the rows of an adapter have its product added to their residual.

    So a row's result has the same bits whichever rows are beside it, as far as the products have.
    """

    def __init__(
        self,
        kernels: Kernels,
        linear: Linear,
        out_features: int,
        low_ranks: Mapping[int, LowRank],
        routing: AdapterRouting,
    ) -> None:
        """Describe it.

        Args:
            out_features: of the residual, which is twice as wide as the result where `linear` is gated.
            low_ranks: by adapter; those that change nothing here are left out.
        """
        self.linear = linear
        self._kernels = kernels
        self._out_features = out_features
        self._low_ranks = low_ranks
        self._routing = routing

    def __call__(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        return self.linear(x, self._adapted(x, residual))

    def _adapted(self, x: Tensor, residual: Tensor | None) -> Tensor | None:
        """The residual with what the adapters add."""
        parts = []
        for part in self._routing.adapted_rows:
            low_rank = self._low_ranks.get(part.adapter)
            if low_rank is not None and part.rows is None:
                return low_rank(x, residual)
            if low_rank is not None and part.rows is not None:
                parts.append((low_rank, part.rows))
        return self._kernels.add_low_ranks(parts, x, residual, self._out_features) if parts else residual


def unadapted(linear: Linear) -> Linear:
    """The product without adapters."""
    return linear.linear if isinstance(linear, AdaptedLinear) else linear
