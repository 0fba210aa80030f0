"""Products with weights that never change, and what is done to their inputs and results in the same breath."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol, TypeAlias

from torch import Tensor
from torch.nn import functional as F

#: A function of each number.
Activation: TypeAlias = Callable[[Tensor], Tensor]


@dataclass(frozen=True, eq=False)
class RMSNorm:
    """The function x / rms(x) * (offset + weight), over the last dimension."""

    weight: Tensor  # (size)
    eps: float
    offset: float = 0.0  # added in float32: in bfloat16 the sum would lose digits that the weight has

    def __call__(self, x: Tensor) -> Tensor:
        """Compute it with PyTorch."""
        if self.offset == 0.0:
            return F.rms_norm(x, self.weight.shape, self.weight, self.eps)
        return F.rms_norm(x.float(), self.weight.shape, self.weight.float() + self.offset, self.eps).to(x.dtype)


class Linear(Protocol):
    """The function norm(x) @ weight.T + bias + residual."""

    def __call__(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        """Compute it.

        Args:
            x: (rows, in_features), the numbers of a row side by side.
            residual: (rows, out_features), contiguous; None: nothing is added.

        Returns:
            (rows, out_features), contiguous; new.
        """


def gated(gate_up: Linear, activation: Activation) -> Linear:
    """The function activation(gate(x)) * up(x), of one product: the features of gate, then those of up.

    The residual is the product's: (rows, 2 * out_features), added before the activation.
    """

    def multiply(x: Tensor, residual: Tensor | None = None) -> Tensor:
        gate, up = gate_up(x, residual).chunk(2, -1)
        return activation(gate).mul_(up)

    return multiply


@dataclass(frozen=True, eq=False)
class LowRank:
    """The function up(down(x)) + residual: what an adapter adds to a product."""

    down: Linear
    up: Linear

    def __call__(self, x: Tensor, residual: Tensor | None) -> Tensor:
        return self.up(self.down(x), residual)


def add_low_ranks(
    parts: Sequence[tuple[LowRank, Tensor]], x: Tensor, residual: Tensor | None, out_features: int
) -> Tensor:
    """What `Kernels.add_low_ranks` is, by the parts' own products."""
    total = x.new_zeros(len(x), out_features) if residual is None else residual.clone()
    for low_rank, rows in parts:
        total[rows] = low_rank(x[rows], total[rows])
    return total
