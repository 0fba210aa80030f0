"""Log-probabilities of prompts, for the sequences that ask for them: how likely the model finds what it was given.

The token at one position is judged by the logits at the position before, of the model alone: nothing of what changes
logits on the way to a choice is applied. A prompt that is computed in chunks is told in chunks, and one that is
computed anew, after a preemption, is told anew.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor

from bros_shard.models.model import CausalLM
from bros_shard.protocol import PromptLogprobs, RankedToken
from bros_shard.sampling.top_tokens import likeliest_tokens
from bros_shard.sequences import LiveSequence, Run, TokenPool

#: Logits are made for so many bytes of float32 at a time: a long chunk's would not fit beside the KV region.
_MAX_LOGITS_BYTES: Final = 2**26


@dataclass(frozen=True)
class PromptChunk:
    """What a step computes of a prompt whose log-probabilities are asked for."""

    sequence: LiveSequence
    first_row: int  # of the step's T tokens, the first that another token of the prompt follows
    first_position: int  # of that other token in the prompt
    num_tokens: int  # how many follow one another

    @classmethod
    def find(cls, runs: Iterable[Run], first_rows: Sequence[int]) -> list[PromptChunk]:
        """Those of a step whose runs stand in this order, the first token of each in the row that is given."""
        chunks = []
        for run, first_row in zip(runs, first_rows, strict=False):
            sequence = run.sequence
            if sequence.num_prompt_top_tokens is not None:
                first = run.start + 1
                num_tokens = min(run.stop + 1, sequence.num_prompt_tokens) - first
                if num_tokens > 0:
                    chunks.append(cls(sequence, first_row, first, num_tokens))
        return chunks


def prompt_logprobs(
    chunks: Iterable[PromptChunk], hidden: Tensor, model: CausalLM, pool: TokenPool
) -> list[PromptLogprobs]:
    """Judge the tokens of these chunks; empty on ranks other than 0, which all must call this with the same chunks.

    Args:
        hidden: (T, size), what the model's `forward` gave.
    """
    return [result for chunk in chunks for result in _judge(chunk, hidden, model, pool)]


def _judge(chunk: PromptChunk, hidden: Tensor, model: CausalLM, pool: TokenPool) -> Iterator[PromptLogprobs]:
    sequence, num_rows = chunk.sequence, max(1, _MAX_LOGITS_BYTES // (4 * model.vocab_size))
    for start in range(0, chunk.num_tokens, num_rows):
        size = min(num_rows, chunk.num_tokens - start)
        logits = model.logits(hidden[chunk.first_row + start : chunk.first_row + start + size])
        if logits is None:
            continue
        logprobs = logits.float().log_softmax(-1)
        positions = torch.arange(size, device=hidden.device) + (chunk.first_position + start)
        token_ids = pool.read(torch.full_like(positions, sequence.row), positions)
        values = logprobs.gather(1, token_ids[:, None])[:, 0].tolist()
        yield PromptLogprobs(
            sequence.sequence_id,
            chunk.first_position + start,
            [value if math.isfinite(value) else None for value in values],
            _top_tokens(logprobs, sequence.num_prompt_top_tokens),
        )


def _top_tokens(logprobs: Tensor, count: int | None) -> list[list[RankedToken]]:
    return likeliest_tokens(logprobs, [count] * len(logprobs), most=count) if count else []
