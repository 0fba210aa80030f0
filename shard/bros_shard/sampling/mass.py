"""Probability mass in whole numbers, and the draw of a token by it.

The mass of a token is `2**33 * exp(logit - row maximum)`, rounded to a whole number. Sums of whole numbers below 2**53
are exact in float64: they depend neither on the order of the additions nor on the shape of the batch nor on the
device, so a row's token is the same alone and in any company. For the same reason a draw cannot fall past the last
token or on one without mass. A token less than 2**-34 as likely as the row's best has no mass and is never chosen.
"""

from __future__ import annotations

from typing import Final

import torch
from torch import Tensor
from torch.nn.functional import pad

#: Leaves room for 2**20 tokens in the 53 bits of a float64; a mass itself is exact in float32, which has 24.
_FRACTION_BITS: Final = 33
_GROUP_SIZE: Final = 128


def shift_to_zero(logits: Tensor) -> tuple[Tensor, Tensor]:
    """Subtract each row's maximum, which changes no probability.

    Args:
        logits: float32 (num_rows, vocab_size), left as it is.

    Returns:
        The shifted logits, at most 0, and whether each row is usable: bool (num_rows,), False for a row that holds
        NaN or +inf or nothing but -inf. Such a row comes out as NaN somewhere, and its masses mean nothing.
    """
    maximum = logits.amax(-1, keepdim=True)
    return logits - maximum, maximum[:, 0].isfinite()


def masses_of(shifted_logits: Tensor) -> Tensor:
    """Masses of logits whose row maximum is 0: whole numbers in float32, same shape."""
    return shifted_logits.exp().mul_(2.0**_FRACTION_BITS).round_()


def total_mass(masses: Tensor) -> Tensor:
    """Sum over the last dimension, float64, exact."""
    return masses.sum(-1, dtype=torch.float64)


def cumulative_mass(masses: Tensor) -> Tensor:
    """Cumulative sum along the last dimension, float64, exact."""
    return masses.cumsum(-1, dtype=torch.float64)


def log_mass(total: Tensor) -> Tensor:
    """`log(sum(exp(shifted_logits)))`, float64, of the tokens whose masses sum to `total`."""
    return (total * 2.0**-_FRACTION_BITS).log()


def draw(masses: Tensor, uniforms: Tensor) -> Tensor:
    """Invert the cumulative distribution: the first index whose cumulative mass exceeds `uniform * total`.

    Args:
        masses: (num_rows, num_choices), with a total of at least 1 in every usable row.
        uniforms: float64 (num_rows,) in [0, 1).

    Returns:
        int64 (num_rows,): indices with mass; in range, whatever it is, where a row is not usable.
    """
    # Find the group, then the choice within it: the cumulative sums of a whole vocabulary need not be written.
    num_rows, num_choices = masses.shape
    groups = pad(masses, (0, -num_choices % _GROUP_SIZE)).view(num_rows, -1, _GROUP_SIZE)
    group_masses = total_mass(groups)
    cumulative = group_masses.cumsum(-1)
    total = cumulative[:, -1:]
    # Below the total even after rounding: the uniform is at most 1 - 2**-53, and the total exact.
    target = uniforms[:, None] * total
    group = _first_above(cumulative, target)
    target -= (cumulative - group_masses).gather(1, group)
    in_group = groups.gather(1, group[:, :, None].expand(-1, -1, _GROUP_SIZE))[:, 0]
    index = group * _GROUP_SIZE + _first_above(cumulative_mass(in_group), target)
    return index[:, 0].clamp_(max=num_choices - 1)


def _first_above(cumulative: Tensor, target: Tensor) -> Tensor:
    """(num_rows, 1): the first index whose value exceeds the target; the last one where none does (NaN)."""
    return torch.searchsorted(cumulative, target, right=True).clamp_(max=cumulative.shape[-1] - 1)
