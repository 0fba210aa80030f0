"""A mark in generated text: behind each token, another share of the vocabulary is made a little more likely.

Kirchenbauer et al., "A Watermark for Large Language Models" (ICML 2023), algorithm 2, with TGI's hash: the generator is
seeded with the previous token times a prime, and the first ids of a permutation of the vocabulary are green. Whoever
knows the prime and the share can count the green tokens of a text, and needs no model for it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

import torch
from torch import Tensor

from bros_shard.protocol import Watermark

#: TGI's key, the millionth prime.
_HASH_KEY: Final = 15485863


def green_token_ids(previous_token_id: int, vocab_size: int, gamma: float, device: torch.device) -> Tensor:
    """int64 (int(vocab_size * gamma),): what is green behind a token.

    PyTorch permutes differently on the CPU and on a GPU, so a text shows its mark to whoever looks for it on the kind
    of device that wrote it. It is so with TGI's marks.
    """
    generator = torch.Generator(device).manual_seed(_HASH_KEY * previous_token_id)
    permutation = torch.randperm(vocab_size, generator=generator, device=device)
    return permutation[: int(vocab_size * gamma)]


def apply_watermarks(logits: Tensor, watermarks: Sequence[Watermark | None], previous_token_ids: Tensor) -> Tensor:
    """Make the green tokens of the rows that have a mark more likely.

    Args:
        logits: float32 (num_rows, vocab_size), left as it is.
        previous_token_ids: int64 (num_rows,): the tokens before those to be chosen.
    """
    marked = logits.clone()
    for row, (watermark, token_id) in enumerate(zip(watermarks, previous_token_ids.tolist(), strict=True)):
        if watermark is not None:
            marked[row, green_token_ids(token_id, logits.shape[1], watermark.gamma, logits.device)] += watermark.delta
    return marked
