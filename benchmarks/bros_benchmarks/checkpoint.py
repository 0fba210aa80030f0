"""Makes full-shaped checkpoints with random weights: what a benchmark needs of a model that it need not understand."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import tokenizers
import torch
import transformers
from tokenizers import models, pre_tokenizers


@dataclass(frozen=True, slots=True)
class Shape:
    """The shape of a Llama-family model, as its published configuration gives it."""

    name: str
    hidden_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    intermediate_size: int
    vocab_size: int


#: HuggingFaceTB/SmolLM2-135M, config.json.
SMOLLM2_135M = Shape("smollm2-135m", 576, 30, 9, 3, 1536, 49152)


def make_checkpoint(shape: Shape, folder: Path, dtype: torch.dtype = torch.bfloat16) -> Path:
    """A checkpoint of this shape with seeded random weights, made once and kept in `folder`.

    Its tokenizer has one token per word, `w0` to `w49151`, so a prompt of n words is a prompt of n tokens.
    """
    path = folder / f"{shape.name}-{str(dtype).removeprefix('torch.')}"
    if (path / "model.safetensors").exists():
        return path
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        hidden_size=shape.hidden_size,
        num_hidden_layers=shape.num_layers,
        num_attention_heads=shape.num_heads,
        num_key_value_heads=shape.num_kv_heads,
        intermediate_size=shape.intermediate_size,
        vocab_size=shape.vocab_size,
        max_position_embeddings=8192,
        tie_word_embeddings=True,
        bos_token_id=0,
        eos_token_id=0,
        dtype=dtype,
    )
    model = transformers.LlamaForCausalLM(config)
    torch.nn.Module.to(model, dtype)
    model.save_pretrained(path)
    words = tokenizers.Tokenizer(models.WordLevel({f"w{i}": i for i in range(shape.vocab_size)}, unk_token="w0"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    words.save(str(path / "tokenizer.json"))
    (path / "tokenizer_config.json").write_text(json.dumps({"model_max_length": 8192}))
    return path
