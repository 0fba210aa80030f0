"""The processors that change logits over the whole vocabulary: penalties for repeated tokens, and temperature.

The filters (top-k, top-p, typical-p) come after them and only ever remove tokens: `candidates`.
"""

from __future__ import annotations

import torch
from torch import Tensor


def apply_repetition_penalty(logits: Tensor, token_ids: Tensor, lengths: Tensor, penalties: Tensor) -> Tensor:
    """Make every token that occurs in a sequence less likely, once: Keskar et al. 2019 (CTRL), section 4.1.

    A positive logit is divided by the penalty, a negative one multiplied, as `transformers` does.

    Args:
        logits: float32 (num_rows, vocab_size).
        token_ids: int64 (num_rows, max_length), in range up to each row's length, anything beyond it.
        lengths: int64 (num_rows,), at least 1.
        penalties: float32 (num_rows,).
    """
    # Padding repeats the first token: a token that occurs twice is written twice with the same value.
    occurring = torch.where(_is_token(token_ids, lengths), token_ids, token_ids[:, :1])
    found = logits.gather(1, occurring)
    penalty = penalties[:, None]
    return logits.scatter(1, occurring, torch.where(found < 0, found * penalty, found / penalty))


def apply_frequency_penalty(logits: Tensor, token_ids: Tensor, lengths: Tensor, penalties: Tensor) -> Tensor:
    """Subtract `penalty * count / length`: TGI's rule, with the length of the sequence itself, without padding.

    Shapes and types as `apply_repetition_penalty`.
    """
    is_token = _is_token(token_ids, lengths)
    # Small whole numbers, so float sums are exact in any order.
    counts = torch.zeros_like(logits)
    counts.scatter_add_(1, torch.where(is_token, token_ids, 0), is_token.to(logits.dtype))
    return logits - counts.mul_((penalties / lengths)[:, None])


def apply_temperature(logits: Tensor, temperatures: Tensor) -> Tensor:
    """Divide by the temperature, float32 (num_rows,), after moving each row's maximum to 0.

    Moving it first changes no probability; it keeps small temperatures from overflowing, and precision near the top.
    """
    smallest = torch.finfo(temperatures.dtype).tiny  # a positive float64 may round to zero
    return (logits - logits.amax(-1, keepdim=True)).div_(temperatures.clamp(min=smallest)[:, None])


def _is_token(token_ids: Tensor, lengths: Tensor) -> Tensor:
    return torch.arange(token_ids.shape[1], device=token_ids.device) < lengths[:, None]
