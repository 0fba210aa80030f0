"""The layers that decoders share, each already this rank's slice and holding weights, not parameters to be filled.

Sequences are flattened: activations are (T, features) for the T tokens of a step, whichever sequences they are of.
"""

from __future__ import annotations

from typing import Final

from torch import Tensor
from torch.nn import functional as F

from bros_kernels.linear import Activation, Linear, RMSNorm
from bros_shard.model_config import ConfigFields, UnsupportedModelError
from bros_shard.models.projections import HeldFeatures, column_parallel, row_parallel
from bros_shard.parallel import ParallelGroup
from bros_shard.weights import RankWeights


def _gelu_tanh(x: Tensor) -> Tensor:
    return F.gelu(x, approximate="tanh")


_ACTIVATIONS: Final[dict[str, Activation]] = {
    "silu": F.silu,
    "swish": F.silu,
    "relu": F.relu,
    "gelu": F.gelu,
    "gelu_new": _gelu_tanh,
    "gelu_pytorch_tanh": _gelu_tanh,
}


def read_activation(config: ConfigFields, name: str, default: str) -> Activation:
    """The function that a config field names; raises `UnsupportedModelError` where it is not known."""
    activation = _ACTIVATIONS.get(config.text(name, default))
    if activation is None:
        raise config.refusal(name, "this activation is not supported")
    return activation


def rms_norm(weights: RankWeights, name: str, size: int, eps: float, offset: float = 0.0) -> RMSNorm:
    """The normalisation whose weight the checkpoint calls `name`, which keeps it less `offset`."""
    return RMSNorm(weights.whole(f"{name}.weight", (size,)), eps, offset)


def qk_norms(
    weights: RankWeights, prefix: str, head_dim: int, eps: float, offset: float = 0.0
) -> tuple[RMSNorm, RMSNorm]:
    """Those of each head's query and key."""
    return (
        rms_norm(weights, f"{prefix}.q_norm", head_dim, eps, offset),
        rms_norm(weights, f"{prefix}.k_norm", head_dim, eps, offset),
    )


class LayerNorm:
    """(x - mean) / deviation, then scaled and shifted where it has weights."""

    def __init__(self, weights: RankWeights, name: str, size: int, eps: float = 1e-5, has_weights: bool = True) -> None:
        self._shape = (size,)
        self._weight = weights.whole(f"{name}.weight", (size,)) if has_weights else None
        self._bias = weights.whole(f"{name}.bias", (size,)) if has_weights else None
        self._eps = eps

    def __call__(self, x: Tensor) -> Tensor:
        return F.layer_norm(x, self._shape, self._weight, self._bias, self._eps)


class Vocabulary:
    """The token embedding and the language-model head, each holding this rank's share of the vocabulary."""

    def __init__(
        self, weights: RankWeights, embedding_name: str, head_name: str | None, vocab_size: int, size: int
    ) -> None:
        """`head_name` is None where the head is tied to the embedding."""
        self._parallel = weights.parallel
        self._vocab_size = vocab_size
        self._embedding = weights.padded_rows(f"{embedding_name}.weight", (vocab_size, size))
        head = self._embedding
        if head_name is not None:
            head = weights.padded_rows(f"{head_name}.weight", (vocab_size, size))
        self._head = weights.kernels.linear(head)

    def embed(self, input_ids: Tensor) -> Tensor:
        """(T) token ids to (T, size)."""
        if self._parallel.world_size == 1:
            return F.embedding(input_ids, self._embedding)
        local_ids = input_ids - self._parallel.rank * self._embedding.shape[0]
        is_elsewhere = (local_ids < 0) | (local_ids >= self._embedding.shape[0])
        embedded = F.embedding(local_ids.masked_fill(is_elsewhere, 0), self._embedding)
        return self._parallel.all_reduce(embedded.masked_fill_(is_elsewhere[:, None], 0.0))

    def logits(self, hidden: Tensor) -> Tensor | None:
        """(rows, size) to (rows, vocab_size) on rank 0, None on the others."""
        logits = self._parallel.gather_last_dim(self._head(hidden))
        return None if logits is None else logits[:, : self._vocab_size]


def gated_linear(
    weights: RankWeights,
    names: tuple[str, str],
    out_features: int,
    in_features: int,
    activation: Activation,
    has_bias: bool,
    norm: RMSNorm | None = None,
) -> Linear:
    """activation(gate(norm(x))) * up(norm(x)), of the projections `names`: gate, up. Split by output features."""
    held = [HeldFeatures.part(weights.parallel, name, out_features) for name in names]
    return column_parallel(weights, held, in_features, has_bias, norm, activation)


def fused_gated_linear(
    weights: RankWeights,
    name: str,
    out_features: int,
    in_features: int,
    activation: Activation,
    has_bias: bool,
    norm: RMSNorm | None = None,
) -> Linear:
    """The same of one projection, whose weight holds the rows of gate, then those of up."""
    rank, world_size = weights.parallel.rank, weights.parallel.world_size
    chosen = (rank, world_size + rank)
    held = HeldFeatures.blocks(name, 2 * out_features, out_features // world_size, chosen)
    return column_parallel(weights, [held], in_features, has_bias, norm, activation)


class GatedMLP:
    """down(gated(x)) + residual."""

    def __init__(self, gated: Linear, down: Linear) -> None:
        self.gated = gated
        self.down = down

    def __call__(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        return self.down(self.gated(x), residual)


class MLP:
    """out(activation(in(x))) + residual."""

    def __init__(
        self,
        weights: RankWeights,
        names: tuple[str, str],
        hidden_size: int,
        inner_size: int,
        activation: Activation,
        has_bias: bool,
    ) -> None:
        held = HeldFeatures.part(weights.parallel, names[0], inner_size)
        self._in = column_parallel(weights, [held], hidden_size, has_bias)
        self._out = row_parallel(weights, names[1], hidden_size, inner_size, has_bias)
        self._activation = activation

    def __call__(self, x: Tensor, residual: Tensor) -> Tensor:
        return self._out(self._activation(self._in(x)), residual)


def check_inner_size(parallel: ParallelGroup, inner_size: int) -> None:
    """Refuse an MLP that cannot be split evenly over the ranks.

    Raises:
        UnsupportedModelError
    """
    if inner_size % parallel.world_size:
        raise UnsupportedModelError(
            f"{inner_size} features of the MLP cannot be split over {parallel.world_size} ranks"
        )


def check_divisible(parallel: ParallelGroup, num_heads: int, num_kv_heads: int, inner_size: int) -> None:
    """Refuse a model that cannot be split evenly over the ranks.

    Heads and the MLP's inner size must divide by the world size. KV heads too, unless there are fewer of them:
    then several ranks hold the same one, and the world size must divide by them.

    Raises:
        UnsupportedModelError
    """
    world_size = parallel.world_size
    if num_heads % num_kv_heads:
        raise UnsupportedModelError(f"{num_heads} attention heads do not share {num_kv_heads} key-value heads evenly")
    if num_heads % world_size:
        raise UnsupportedModelError(f"{num_heads} attention heads cannot be split over {world_size} ranks")
    check_inner_size(parallel, inner_size)
    if num_kv_heads % world_size and world_size % num_kv_heads:
        raise UnsupportedModelError(f"{num_kv_heads} key-value heads cannot be split over {world_size} ranks")
