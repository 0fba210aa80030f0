"""Weights and inputs of products as int8: what is rounded how, and the products by PyTorch.

A weight has a scale for each output feature, an input one for each token: largest magnitude / 127. Nothing is
calibrated, and a token's numbers depend on nothing but the token.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor

#: Inputs of no larger magnitude become 0, and nothing is divided by 0.
_SMALLEST_MAXIMUM: Final = 1e-30
#: Rows of a weight that are rounded together: a whole vocabulary in float32 would be as large as a small model.
_ROWS_AT_ONCE: Final = 1024


def round_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    """x: (rows, size) to int8 of the same shape, and float32 (rows) scales: x is about int8 * scale.

    Halves are rounded to even. The scale of a row is NaN where the row holds NaN, and not finite where it holds
    infinity.
    """
    x = x.float()
    maxima = x.abs().amax(-1)
    # Not 127.0 / maxima, which PyTorch takes for 127.0 * (1 / maxima): that is rounded twice.
    inverse = torch.full_like(maxima, 127.0) / maxima.clamp(min=_SMALLEST_MAXIMUM)
    rounded = x.mul(inverse[:, None]).round_()
    return rounded.to(torch.int8), maxima / 127.0


@dataclass(frozen=True)
class Int8Weight:
    """A weight of int8, and the product with it."""

    values: Tensor  # int8 (out_features, in_features)
    scales: Tensor  # float32 (out_features)

    @classmethod
    def of(cls, weight: Tensor) -> Int8Weight:
        """The weight (out_features, in_features), rounded."""
        assert weight.shape[1] > 1, "PyTorch's integer product is wrong for one input feature"
        starts = range(0, len(weight), _ROWS_AT_ONCE)
        parts = [round_rows(weight[start : start + _ROWS_AT_ONCE]) for start in starts]
        return cls(torch.cat([values for values, _ in parts]), torch.cat([scales for _, scales in parts]))

    def multiply(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """x @ weight.T + bias, of the rounded x. The integers are exact.

        Args:
            x: (rows, in_features), of any floating-point dtype.
            bias: (out_features), or None.

        Returns:
            float32 (rows, out_features).
        """
        values, scales = round_rows(x)
        product = torch._int_mm(values, self.values.T).float().mul_(scales[:, None]).mul_(self.scales)
        return product if bias is None else product.add_(bias)
