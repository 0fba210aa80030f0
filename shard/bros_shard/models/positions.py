"""Positions that a model learned, one row of a table each."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional as F

from bros_shard.model_config import ConfigFields, UnsupportedModelError
from bros_shard.models.model import ModelLimits
from bros_shard.weights import RankWeights


def read_num_positions(config: ConfigFields, name: str, limits: ModelLimits) -> int:
    """How many positions the field `name` says the model has.

    Raises:
        UnsupportedModelError: the operator asks for longer sequences, or for rotary scaling.
    """
    if limits.rope_override is not None:
        raise UnsupportedModelError("rope_scaling: the model has no rotary embedding")
    num_positions = config.integer(name)
    if limits.max_length > num_positions:
        raise config.refusal(name, f"sequences of {limits.max_length} tokens were asked for")
    return num_positions


class LearnedPositions:
    """The table of positions."""

    def __init__(self, weights: RankWeights, name: str, num_positions: int, size: int, num_unused: int = 0) -> None:
        """`num_unused`: rows at the beginning of the table that no position uses."""
        self._table = weights.whole(f"{name}.weight", (num_unused + num_positions, size))[num_unused:]

    def __call__(self, positions: Tensor) -> Tensor:
        """(T) positions to (T, size)."""
        return F.embedding(positions, self._table)
