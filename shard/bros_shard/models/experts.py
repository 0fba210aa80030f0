"""Mixtures of experts: a router sends each token to a few of many gated MLPs, and weighs what they give."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from bros_kernels.linear import Activation, Linear, RMSNorm
from bros_shard.model_config import ConfigFields
from bros_shard.models.layers import GatedMLP, check_inner_size, gated_linear
from bros_shard.weights import RankWeights


@dataclass(frozen=True, kw_only=True)
class ExpertsConfig:
    """The experts of one layer."""

    num_experts: int
    num_chosen: int  # for each token
    inner_size: int  # of each
    is_renormalised: bool  # the weights of a token's experts sum to 1, not those of all
    shared_inner_size: int | None = None  # of one more, which all tokens pass through a gate of its own
    block_name: str = "mlp"
    projection_names: tuple[str, str, str] = ("gate_proj", "up_proj", "down_proj")


def read_num_chosen(config: ConfigFields, num_experts: int, default: int) -> int:
    """`num_experts_per_tok`."""
    num_chosen = config.integer("num_experts_per_tok", default)
    if num_chosen > num_experts:
        raise config.refusal("num_experts_per_tok", f"there are {num_experts} experts")
    return num_chosen


class Experts:
    """Every rank holds a part of every expert; the parts of all ranks are summed once."""

    def __init__(
        self,
        config: ExpertsConfig,
        weights: RankWeights,
        prefix: str,
        hidden_size: int,
        activation: Activation,
        norm: RMSNorm,
    ) -> None:
        """`prefix`: of the layer's tensors. `norm`: of the inputs."""
        name = f"{prefix}.{config.block_name}"

        def expert(expert_name: str, inner_size: int) -> GatedMLP:
            """One whose result is this rank's part of a sum."""
            check_inner_size(weights.parallel, inner_size)
            gate, up, down = (f"{expert_name}.{projection}" for projection in config.projection_names)
            # Experts see some of a step's tokens, so adapters, which go by where a token stands among all, add nothing.
            gated = gated_linear(weights.unadapted(), (gate, up), inner_size, hidden_size, activation, has_bias=False)
            return GatedMLP(gated, weights.kernels.linear(weights.columns(f"{down}.weight", (hidden_size, inner_size))))

        self._config = config
        self._kernels = weights.kernels
        self._parallel = weights.parallel
        self._norm = norm
        # Whole on every rank, with the same inputs: all choose the same experts.
        router = weights.whole(f"{name}.gate.weight", (config.num_experts, hidden_size))
        self._router = weights.kernels.linear(router, is_exact=True)
        self._experts = [expert(f"{name}.experts.{index}", config.inner_size) for index in range(config.num_experts)]
        self._shared: tuple[Linear, GatedMLP] | None = None  # its gate, and itself
        if config.shared_inner_size is not None:
            gate = weights.whole(f"{name}.shared_expert_gate.weight", (1, hidden_size))
            shared = expert(f"{name}.shared_expert", config.shared_inner_size)
            self._shared = weights.kernels.linear(gate, is_exact=True), shared

    def __call__(self, x: Tensor, residual: Tensor) -> Tensor:
        """(T, hidden_size) to the same: what the experts give for norm(x), and `residual` added to it."""
        x = self._kernels.rms_norm(x, self._norm)
        shares, chosen = self._router(x).softmax(-1, dtype=torch.float32).topk(self._config.num_chosen, -1)
        if self._config.is_renormalised:
            shares = shares / shares.sum(-1, keepdim=True)
        # float32, and each token's experts in their order, so that its sum does not depend on the tokens beside it.
        total = torch.zeros(x.shape, dtype=torch.float32, device=x.device)
        for expert in sorted(set(chosen.flatten().tolist())):
            tokens, place = (chosen == expert).nonzero(as_tuple=True)
            total.index_add_(0, tokens, self._experts[expert](x[tokens]) * shares[tokens, place, None])
        if self._shared is not None:
            gate, shared = self._shared
            total += gate(x).sigmoid() * shared(x)
        if self._parallel.rank == 0:  # so that the sum over the ranks holds it once
            total += residual
        return self._parallel.all_reduce(total.to(x.dtype))
