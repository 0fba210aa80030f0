"""The processors that change logits over the whole vocabulary: bias, penalties for repeated tokens, temperature.

The filters (top-k, top-p, typical-p) come after them and only ever remove tokens: `candidates`.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def apply_logit_bias(logits: Tensor, biases: Sequence[Sequence[tuple[int, float]]]) -> Tensor:
    """Add to the logits of some tokens of each row: OpenAI's `logit_bias`.

    Args:
        logits: float32 (num_rows, vocab_size), left as it is.
        biases: (token id, bias) pairs of each row; of a token that occurs twice, either counts.
    """
    rows = torch.tensor([row for row, pairs in enumerate(biases) for _ in pairs], device=logits.device)
    token_ids = torch.tensor([token_id for pairs in biases for token_id, _ in pairs], device=logits.device)
    values = torch.tensor([value for pairs in biases for _, value in pairs], dtype=logits.dtype, device=logits.device)
    return logits.index_put((rows, token_ids), logits[rows, token_ids] + values)


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
    counts = _counts(logits, token_ids, _is_token(token_ids, lengths))
    return logits - counts.mul_((penalties / lengths)[:, None])


def apply_presence_penalty(
    logits: Tensor, token_ids: Tensor, num_prompt_tokens: Tensor, lengths: Tensor, penalties: Tensor
) -> Tensor:
    """Subtract `penalty` from every token that was generated before, how often it may have been: OpenAI's rule.

    Shapes and types as `apply_repetition_penalty`; `num_prompt_tokens` as `lengths`.
    """
    is_prompt = _is_token(token_ids, num_prompt_tokens)
    counts = _counts(logits, token_ids, _is_token(token_ids, lengths) & ~is_prompt)
    return logits - counts.clamp_(max=1.0).mul_(penalties[:, None])


def apply_temperature(logits: Tensor, temperatures: Tensor) -> Tensor:
    """Divide by the temperature, float32 (num_rows,), after moving each row's maximum to 0.

    Moving it first changes no probability; it keeps small temperatures from overflowing, and precision near the top.
    """
    smallest = torch.finfo(temperatures.dtype).tiny  # a positive float64 may round to zero
    return (logits - logits.amax(-1, keepdim=True)).div_(temperatures.clamp(min=smallest)[:, None])


def _counts(logits: Tensor, token_ids: Tensor, is_counted: Tensor) -> Tensor:
    """How often each token of the vocabulary occurs. Small whole numbers, so float sums are exact in any order."""
    counts = torch.zeros_like(logits)
    return counts.scatter_add_(1, torch.where(is_counted, token_ids, 0), is_counted.to(logits.dtype))


def _is_token(token_ids: Tensor, lengths: Tensor) -> Tensor:
    return torch.arange(token_ids.shape[1], device=token_ids.device) < lengths[:, None]
