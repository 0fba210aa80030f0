"""Any causal language model that `transformers` has modelling code for, over the paged region.

It is slower than a decoder of ours and takes part in no tensor parallelism. What it is worth is shown when it is
loaded: over the paged region it must compute what it computes by itself.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from typing import Any, Final

import structlog
import torch
from torch import Tensor, nn

from bros_kernels.attn_meta import AttnMeta
from bros_kernels.kernels import Kernels
from bros_kernels.linear import Linear
from bros_kernels.paged_attention import PagedAttention
from bros_kernels.slots import slots_at
from bros_shard.kv_cache import KVCache
from bros_shard.model_config import UnsupportedModelError
from bros_shard.models.model import KVShape, LayerKV
from bros_shard.models.transformers_attention import NOTED, PAGED, LayerCall, running_step, taking_notes
from bros_shard.models.transformers_checkpoint import TransformersConfig, load_module
from bros_shard.weights import RankWeights

#: Names of linear layers that choose experts: rounded, they would choose others.
_ROUTERS: Final = ("gate", "router")
#: Of the two sequences that a model is checked with, at most as many tokens, and where its three steps end.
_CHECKED_LENGTH: Final = 12
_CHECKED_STEPS: Final = (5, 11, 12)
_CHECKED_BLOCK_SIZE: Final = 16
#: How far a token's logits may be from where they should, as a part of how far they are from the mean of all. In half
#: precision some tokens may be sent to other experts, and be further away.
_QUANTILE: Final = 0.8
_TOLERANCES: Final = {torch.float32: 1e-3, torch.float16: 0.05, torch.bfloat16: 0.2}

log = structlog.get_logger()


class TransformersModel:
    """Implements `CausalLM`."""

    def __init__(self, config: TransformersConfig, weights: RankWeights) -> None:
        if weights.parallel.world_size > 1:
            raise UnsupportedModelError(f"{config.architecture} runs through transformers, and so on one rank alone")
        if weights.adapters:
            raise UnsupportedModelError(f"{config.architecture} runs through transformers, and so without adapters")
        self.vocab_size = config.vocab_size
        self.max_length = config.max_length
        self._model = load_module(config, weights.checkpoint, weights.device, weights.dtype)
        _replace_linears(self._model, weights)
        self._check(config.architecture, weights)
        log.warning(
            "served through transformers, which is slower than a decoder of our own",
            architecture=config.architecture,
        )

    def forward(self, input_ids: Tensor, positions: Tensor, kv: Iterable[LayerKV], attention: PagedAttention) -> Tensor:
        """See `CausalLM.forward`."""
        with running_step(self._layers, kv, attention):
            output = self._decoder(input_ids=input_ids[None], position_ids=positions[None], use_cache=False)
        hidden: Tensor = output.last_hidden_state[0]
        return hidden

    def logits(self, hidden: Tensor) -> Tensor | None:
        """See `CausalLM.logits`."""
        self._given.hidden = hidden[None]
        input_ids = torch.zeros(1, len(hidden), dtype=torch.int64, device=hidden.device)
        logits: Tensor = self._model(input_ids=input_ids, use_cache=False).logits[0]
        return logits

    @torch.inference_mode()
    def _check(self, architecture: str, weights: RankWeights) -> None:
        """Find out what the layers ask for, and whether the model computes the same over a paged region as without.

        Modelling code may do what no attention function can see: keep a state of its own, add to scores, or count
        tokens where it is given positions. Two sequences of made-up tokens, in chunks and beside each other, tell.
        """
        length = min(_CHECKED_LENGTH, self.max_length)
        input_ids = torch.arange(2 * length, device=weights.device).view(2, length) * 7919 % self.vocab_size
        try:
            expected = self._model(input_ids=input_ids, use_cache=False).logits
            self._adopt(input_ids[:1])
            found = self._step_by_step(input_ids, weights)
        except UnsupportedModelError as error:
            raise UnsupportedModelError(f"{architecture} cannot be served through transformers: {error}") from None
        except Exception as error:  # whatever the code of any model says to what it was not made for
            reason = f"{type(error).__name__}: {' '.join(str(error).split())}"[:300]
            raise UnsupportedModelError(f"{architecture} cannot be served through transformers: {reason}") from error
        distances = (found - expected).float().norm(dim=-1)
        sizes = (expected - expected.mean((0, 1))).float().norm(dim=-1)
        distance = float((distances / sizes).flatten().quantile(_QUANTILE))
        if found.shape[-1] != self.vocab_size or not distance <= _TOLERANCES[weights.dtype]:
            raise UnsupportedModelError(
                f"{architecture} cannot be served through transformers: over the paged cache it computes something"
                f" else than by itself (its logits are {distance:.2g} of their size away)"
            )

    def _adopt(self, input_ids: Tensor) -> None:
        """Note what the layers ask for, and take the model apart into its decoder and its head."""
        model = self._model
        self._decoder = model.base_model
        if self._decoder is model:
            raise UnsupportedModelError("its decoder is not apart from its head")
        model.config._attn_implementation = NOTED
        positions = torch.arange(input_ids.shape[1], device=input_ids.device)[None]
        with taking_notes(self.max_length) as notes:
            output = self._decoder(input_ids=input_ids, position_ids=positions, use_cache=False)
        model.config._attn_implementation = PAGED
        self._given = _Given(output)
        setattr(model, model.base_model_prefix, self._given)
        self._layers, self.kv_shape = _with_one_shape(notes.layers)

    def _step_by_step(self, input_ids: Tensor, weights: RankWeights) -> Tensor:
        """Logits (2, length, vocab_size) of two sequences that are run in steps, the second in a reversed block."""
        length, device = input_ids.shape[1], weights.device
        cache = KVCache(self.kv_shape, 2, _CHECKED_BLOCK_SIZE, 0, weights.dtype, device)
        logits = []
        start = 0
        for stop in _CHECKED_STEPS:
            if start < min(stop, length):
                stop = min(stop, length)
                meta = _meta_of_pair(start, stop, device)
                positions = torch.arange(start, stop, device=device).repeat(2)
                hidden = self.forward(
                    input_ids[:, start:stop].flatten(), positions, cache.layers, weights.kernels.attention(meta)
                )
                step_logits = self.logits(hidden)
                assert step_logits is not None
                logits.append(step_logits.view(2, stop - start, -1))
                start = stop
        return torch.cat(logits, 1)


class _Given(nn.Module):
    """Stands where a model's head expects its decoder, and returns what it is told that the decoder returned."""

    def __init__(self, output: Any) -> None:
        """`output`: an output of the decoder."""
        super().__init__()
        self._output = output
        self.hidden: Tensor = output.last_hidden_state

    def forward(self, *_: Any, **__: Any) -> Any:
        return replace(self._output, last_hidden_state=self.hidden)


class _KernelLinear(nn.Module):
    """An `nn.Linear` that our kernels compute."""

    def __init__(self, linear: nn.Linear, kernels: Kernels, is_exact: bool) -> None:
        super().__init__()
        bias = None if linear.bias is None else linear.bias.detach()
        self._linear: Linear = kernels.linear(linear.weight.detach(), bias, is_exact=is_exact)
        #: Modelling code may ask a weight for its dtype or its shape. There are no numbers in it.
        self.weight = linear.weight.detach().to("meta")

    def forward(self, x: Tensor) -> Tensor:
        assert x.dtype == self.weight.dtype, "a linear layer is given numbers of another format"
        return self._linear(x.reshape(-1, x.shape[-1]).contiguous()).view(*x.shape[:-1], -1)


def _replace_linears(model: nn.Module, weights: RankWeights) -> None:
    """Have the kernels compute all that is an `nn.Linear` and nothing more, in the format that is served."""

    def is_replaced(module: nn.Module) -> bool:
        return type(module) is nn.Linear and module.weight.dtype == weights.dtype

    # Not the layers themselves are listed: each may be freed before the next is laid out anew.
    for parent in [module for module in model.modules() if not is_replaced(module)]:
        for name, child in list(parent.named_children()):
            if is_replaced(child):
                assert isinstance(child, nn.Linear)
                setattr(parent, name, _KernelLinear(child, weights.kernels, is_exact=name in _ROUTERS))


def _with_one_shape(layers: list[LayerCall]) -> tuple[list[LayerCall], KVShape]:
    """The layers as the region has room for them: heads of one size, the largest."""
    num_kv_heads = {layer.num_kv_heads for _, layer in layers}
    if len(num_kv_heads) != 1:
        reason = "its layers differ in their key heads" if layers else "its attention cannot be replaced"
        raise UnsupportedModelError(reason)
    head_dim = max(layer.head_dim for _, layer in layers)
    layers = [(module, replace(layer, head_dim=head_dim)) for module, layer in layers]
    return layers, KVShape(len(layers), num_kv_heads.pop(), head_dim)


def _meta_of_pair(start: int, stop: int, device: torch.device) -> AttnMeta:
    """Two sequences that bring their tokens [start, stop), the first in block 0, the second in block 1, reversed."""
    num_tokens = stop - start
    block_table = torch.tensor([[0], [~1]], dtype=torch.int32, device=device)
    positions = torch.arange(start, stop, device=device).expand(2, -1)
    return AttnMeta(
        block_table=block_table,
        seq_lens=torch.full((2,), stop, dtype=torch.int32, device=device),
        cu_q=torch.arange(3, dtype=torch.int32, device=device) * num_tokens,
        slot_mapping=slots_at(block_table, positions, _CHECKED_BLOCK_SIZE).flatten(),
        max_q=num_tokens,
        max_k=stop,
        n_decode=2 if num_tokens == 1 else 0,
        block_size=_CHECKED_BLOCK_SIZE,
    )
