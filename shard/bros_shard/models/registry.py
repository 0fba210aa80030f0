"""Which architectures are served, by the name that config.json gives them, and how one is loaded."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import Any, Final, TypeAlias

import torch

from bros_kernels.kernels import Kernels
from bros_kernels.low_rank import AdapterRouting
from bros_shard.checkpoint import Checkpoint, OnProgress
from bros_shard.lora import LoraAdapter
from bros_shard.model_config import ConfigFields
from bros_shard.models.falcon import Falcon, read_falcon
from bros_shard.models.gemma import Gemma, read_gemma, read_gemma2, read_gemma3
from bros_shard.models.gpt2 import GPT2, read_gpt2
from bros_shard.models.gpt_bigcode import read_gpt_bigcode
from bros_shard.models.gpt_neox import GPTNeoX, read_gpt_neox
from bros_shard.models.llama import Llama, read_llama
from bros_shard.models.mistral import read_mistral
from bros_shard.models.mixtral import read_mixtral
from bros_shard.models.model import CausalLM, ModelLimits
from bros_shard.models.opt import OPT, read_opt
from bros_shard.models.phi3 import read_phi3
from bros_shard.models.qwen import read_qwen2, read_qwen3
from bros_shard.models.qwen_moe import read_qwen2_moe, read_qwen3_moe
from bros_shard.models.starcoder2 import Starcoder2, read_starcoder2
from bros_shard.parallel import ParallelGroup
from bros_shard.weights import RankWeights

#: Reads a family's config; builds the model from what was read.
_Family: TypeAlias = tuple[Callable[[ConfigFields, ModelLimits], Any], Callable[[Any, RankWeights], CausalLM]]

_FAMILIES: Final[dict[str, _Family]] = {
    "FalconForCausalLM": (read_falcon, Falcon),
    "GemmaForCausalLM": (read_gemma, Gemma),
    "Gemma2ForCausalLM": (read_gemma2, Gemma),
    "Gemma3ForCausalLM": (read_gemma3, Gemma),
    "GPT2LMHeadModel": (read_gpt2, GPT2),
    "GPTBigCodeForCausalLM": (read_gpt_bigcode, GPT2),
    "GPTNeoXForCausalLM": (read_gpt_neox, GPTNeoX),
    "LlamaForCausalLM": (read_llama, Llama),
    "MistralForCausalLM": (read_mistral, Llama),
    "MixtralForCausalLM": (read_mixtral, Llama),
    "Qwen2ForCausalLM": (read_qwen2, Llama),
    "Qwen2MoeForCausalLM": (read_qwen2_moe, Llama),
    "Qwen3ForCausalLM": (read_qwen3, Llama),
    "Qwen3MoeForCausalLM": (read_qwen3_moe, Llama),
    "OPTForCausalLM": (read_opt, OPT),
    "Phi3ForCausalLM": (read_phi3, Llama),
    "Starcoder2ForCausalLM": (read_starcoder2, Starcoder2),
}

#: Tensors that some checkpoints carry and no model reads: a tied head's copy, frequencies that are computed, masks.
_IGNORED_TENSORS: Final = (
    "lm_head.weight",
    "embed_out.weight",
    ".rotary_emb.inv_freq",
    ".attn.bias",
    ".attn.masked_bias",
    ".attention.bias",
    ".attention.masked_bias",
)

DTYPES: Final = {
    "float32": torch.float32,
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
}


def read_dtype(config: ConfigFields) -> torch.dtype:
    """The dtype that config.json says the weights were made in; float32 where it says nothing."""
    name = "dtype" if not config.is_null("dtype") else "torch_dtype"
    dtype = DTYPES.get(config.text(name, "float32"))
    if dtype is None:
        raise config.refusal(name, "this dtype is not supported")
    return dtype


def load_model(
    folder: Path,
    config: ConfigFields,
    parallel: ParallelGroup,
    device: torch.device,
    dtype: torch.dtype,
    limits: ModelLimits,
    kernels: Kernels,
    on_progress: OnProgress = lambda done, total: None,
    adapters: Mapping[str, Path] = MappingProxyType({}),
    routing: AdapterRouting | None = None,
) -> CausalLM:
    """Load this rank's slice of the model in `folder`, whose config.json is `config`.

    Args:
        adapters: folders of LoRA adapters by name; their order is that of their indices.
        routing: through which of them the rows of a forward pass go; `None`: through none.

    Raises:
        UnsupportedModelError: the model or an adapter cannot be served as it was made, or not on so many ranks.
        CheckpointError: weights are not what the config says.
    """
    architectures = config.items("architectures")
    known = [name for name in architectures if name in _FAMILIES]
    read_config, build = _FAMILIES[known[0]] if known else _transformers_family(folder)
    model_config = read_config(config, limits)
    with ExitStack() as files:
        opened = [files.enter_context(LoraAdapter(name, path)) for name, path in adapters.items()]
        checkpoint = files.enter_context(Checkpoint(folder, on_progress))
        weights = RankWeights(
            checkpoint, parallel, device, dtype, kernels, adapters=opened, routing=routing or AdapterRouting()
        )
        model = build(model_config, weights)
        for adapter in opened:
            adapter.check_all_taken()
        checkpoint.check_all_taken(_IGNORED_TENSORS)
    return model


def _transformers_family(folder: Path) -> _Family:
    """Models that have no decoder of their own here: `transformers` may have one, and takes seconds to import."""
    from bros_shard.models.transformers_checkpoint import read_transformers
    from bros_shard.models.transformers_model import TransformersModel

    return partial(read_transformers, folder), TransformersModel
