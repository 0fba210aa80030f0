"""Projections: products with weights of the checkpoint, split over the ranks, and with what adapters add to them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from bros_kernels.linear import Activation, Linear, LowRank, RMSNorm
from bros_kernels.low_rank import AdaptedLinear, low_rank_of
from bros_shard.lora import LoraAdapter
from bros_shard.parallel import ParallelGroup, part_of
from bros_shard.weights import RankWeights


@dataclass(frozen=True)
class HeldFeatures:
    """Which output features of a projection this rank holds: ranges of them, in this order."""

    #: As the checkpoint calls it.
    projection: str
    #: Of all ranks.
    num_features: int
    ranges: tuple[range, ...]

    @classmethod
    def part(
        cls, parallel: ParallelGroup, projection: str, num_features: int, num_parts: int | None = None
    ) -> HeldFeatures:
        """As `part_of` cuts them."""
        return cls(projection, num_features, (part_of(parallel, num_features, num_parts),))

    @classmethod
    def blocks(cls, projection: str, num_features: int, block_size: int, indices: Sequence[int]) -> HeldFeatures:
        """Blocks of `block_size` features, those of `indices`."""
        ranges = (range(index * block_size, (index + 1) * block_size) for index in indices)
        return cls(projection, num_features, tuple(ranges))

    @property
    def num_held(self) -> int:
        """How many they are."""
        return sum(map(len, self.ranges))


def column_parallel(
    weights: RankWeights,
    held: Sequence[HeldFeatures],
    in_features: int,
    has_bias: bool,
    norm: RMSNorm | None = None,
    activation: Activation | None = None,
) -> Linear:
    """Projections of the same inputs as one product: the features held of the first, then those of the next.

    Args:
        norm: of the inputs.
        activation: where half of the features are a gate, and then those that it is multiplied with; `None`: none are.
    """

    def stacked(kind: str, *columns: int) -> Tensor:
        shares = [
            weights.rows(f"{part.projection}.{kind}", (part.num_features, *columns), part.ranges) for part in held
        ]
        return torch.cat(shares) if len(shares) > 1 else shares[0]

    weight, bias = stacked("weight", in_features), stacked("bias") if has_bias else None
    if activation is None:
        linear = weights.kernels.linear(weight, bias, norm)
    else:
        linear = weights.kernels.gated_linear(weight, bias, activation, norm)
    low_ranks = {}
    for index, adapter in enumerate(weights.adapters):
        factors = _column_factors(adapter, held, in_features)
        if factors is not None:
            down, up = map(weights.placed, factors)
            low_ranks[index] = low_rank_of(weights.kernels, down, up, norm)
    return _adapted(weights, linear, sum(part.num_held for part in held), low_ranks)


def row_parallel(weights: RankWeights, name: str, out_features: int, in_features: int, has_bias: bool) -> Linear:
    """A projection split by input features over the ranks, whose results are summed."""
    is_first = weights.parallel.rank == 0
    weight = weights.columns(f"{name}.weight", (out_features, in_features))
    bias = weights.whole(f"{name}.bias", (out_features,)) if has_bias else None
    # One rank adds the bias and the residual, so that the sum holds them once.
    linear = weights.kernels.linear(weight, bias if is_first else None)
    low_ranks = {}
    for index, adapter in enumerate(weights.adapters):
        factors = adapter.factors(name)
        if factors is not None:
            down = factors.down(in_features, part_of(weights.parallel, in_features))
            up = factors.up(out_features, [range(out_features)])
            low_ranks[index] = low_rank_of(weights.kernels, weights.placed(down), weights.placed(up))
    linear = _adapted(weights, linear, out_features, low_ranks)
    if weights.parallel.world_size == 1:
        return linear
    all_reduce = weights.parallel.all_reduce
    return lambda x, residual=None: all_reduce(linear(x, residual if is_first else None))


def _column_factors(
    adapter: LoraAdapter, held: Sequence[HeldFeatures], in_features: int
) -> tuple[Tensor, Tensor] | None:
    """The two factors for all of the features: what one projection adds to is nothing to the others."""
    downs, ups = [], []
    for part in held:
        factors = adapter.factors(part.projection)
        if factors is None:
            ups.append(torch.zeros(part.num_held, 0))
        else:
            downs.append(factors.down(in_features))
            ups.append(factors.up(part.num_features, part.ranges))
    return (torch.cat(downs), torch.block_diag(*ups)) if downs else None  # type: ignore[no-untyped-call]


def _adapted(weights: RankWeights, linear: Linear, out_features: int, low_ranks: dict[int, LowRank]) -> Linear:
    if not low_ranks:
        return linear
    return AdaptedLinear(weights.kernels, linear, out_features, low_ranks, weights.routing)
