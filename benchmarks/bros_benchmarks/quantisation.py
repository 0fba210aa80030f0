"""What rounding costs in quality: `python -m bros_benchmarks.quantisation`.

The demo model reads documents that it was not trained on in float32, in bfloat16, and with int8 weights in both, with
the kernels that a server would choose. Errors and agreement are relative to float32.
"""

from __future__ import annotations

import argparse
import math
import random
from dataclasses import dataclass
from typing import Final

import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table
from tokenizers import Tokenizer
from torch import Tensor
from torch.nn import functional as F

from bros_kernels.attn_meta import AttnMeta
from bros_kernels.kernels import Kernels, select_kernels
from bros_shard.demo_model import DIRECTORY
from bros_shard.demo_model.corpus import build_corpus
from bros_shard.kv_cache import KVCache
from bros_shard.model_config import ConfigFields
from bros_shard.models.model import ModelLimits
from bros_shard.models.registry import load_model
from bros_shard.parallel import ParallelGroup

_CPU: Final = torch.device("cpu")
_MAX_LENGTH: Final = 512
_MIN_LENGTH: Final = 64
#: Dtype, and whether weights are int8.
_FORMATS: Final = ((torch.float32, False), (torch.bfloat16, False), (torch.float32, True), (torch.bfloat16, True))


@dataclass
class Score:
    """Sums over tokens."""

    num_tokens: int = 0
    nats: float = 0.0
    squared_error: float = 0.0
    squared_size: float = 0.0  # of the reference's logits, their mean taken off
    num_agreeing: int = 0

    def add(self, logits: Tensor, reference: Tensor, targets: Tensor) -> None:
        """Logits and reference: float32 (tokens, vocab_size)."""
        self.num_tokens += len(targets)
        self.nats += F.cross_entropy(logits, targets, reduction="sum").item()
        self.squared_error += (logits - reference).square().sum().item()
        self.squared_size += (reference - reference.mean(-1, keepdim=True)).square().sum().item()
        self.num_agreeing += int((logits.argmax(-1) == reference.argmax(-1)).sum())


class Reader:
    """The demo model in one format."""

    def __init__(self, kernels: Kernels, dtype: torch.dtype) -> None:
        self._kernels = kernels
        self._model = load_model(
            DIRECTORY, ConfigFields.load(DIRECTORY), ParallelGroup(), _CPU, dtype, ModelLimits(), kernels
        )
        self._cache = KVCache(self._model.kv_shape, _MAX_LENGTH // 64, 64, 0, dtype, _CPU)

    @torch.inference_mode()
    def logits(self, token_ids: Tensor) -> Tensor:
        """float32 (tokens, vocab_size), of what follows each token."""
        length = len(token_ids)
        meta = AttnMeta(
            block_table=torch.arange(_MAX_LENGTH // 64, dtype=torch.int32)[None],
            seq_lens=torch.tensor([length], dtype=torch.int32),
            cu_q=torch.tensor([0, length], dtype=torch.int32),
            slot_mapping=torch.arange(length),
            max_q=length,
            max_k=length,
            n_decode=0,
            block_size=64,
        )
        attention = self._kernels.attention(meta)
        hidden = self._model.forward(token_ids, torch.arange(length), self._cache.layers, attention)
        logits = self._model.logits(hidden)
        assert logits is not None
        return logits.float()


def read_documents(num_tokens: int) -> list[Tensor]:
    """Held-out documents in a fixed random order, each with the end-of-text token before it, until there are enough."""
    tokenizer = Tokenizer.from_file(str(DIRECTORY / "tokenizer.json"))
    documents = [document for document in build_corpus() if document.is_validation]
    random.Random(0).shuffle(documents)
    windows: list[Tensor] = []
    for document in documents:
        token_ids = tokenizer.encode(document.text).ids[:_MAX_LENGTH]
        if len(token_ids) >= _MIN_LENGTH:
            windows.append(torch.tensor([0, *token_ids]))
        if sum(map(len, windows)) >= num_tokens:
            break
    return windows


def main() -> None:
    """Read, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=16_000)
    parser.add_argument("--kernels", default="auto")
    parser.add_argument("--threads", type=int, default=2)
    arguments = parser.parse_args()
    readers = [
        Reader(select_kernels(arguments.kernels, _CPU, dtype, arguments.threads, is_int8), dtype)
        for dtype, is_int8 in _FORMATS
    ]
    scores = [Score() for _ in _FORMATS]
    for window in track(read_documents(arguments.tokens), "documents", console=Console(stderr=True)):
        reference = readers[0].logits(window[:-1])
        for reader, score in zip(readers, scores, strict=True):
            logits = reference if reader is readers[0] else reader.logits(window[:-1])
            score.add(logits, reference, window[1:])
    table = Table("format", "perplexity", "relative error of the logits", "same most likely token")
    for (dtype, is_int8), score in zip(_FORMATS, scores, strict=True):
        table.add_row(
            f"{str(dtype).removeprefix('torch.')}{', int8' if is_int8 else ''}",
            f"{math.exp(score.nats / score.num_tokens):.3f}",
            f"{100 * math.sqrt(score.squared_error / score.squared_size):.2f} %",
            f"{100 * score.num_agreeing / score.num_tokens:.2f} %",
        )
    console = Console(width=120)
    console.print(f"{scores[0].num_tokens} tokens")
    console.print(table)


if __name__ == "__main__":
    main()
