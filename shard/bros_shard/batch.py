"""One step's plan as tensors: what the model and the sampler are called with, built once per step."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from bros_kernels.attn_meta import AttnMeta
from bros_kernels.low_rank import AdaptedRows
from bros_kernels.slots import slots_of
from bros_shard.prompt_logprobs import PromptChunk
from bros_shard.protocol import SequenceStep
from bros_shard.sampling.sampler import SamplingBatch, needs_history
from bros_shard.sequences import LiveSequence, TokenPool


@dataclass(frozen=True)
class StepBatch:
    """The T tokens of a step. Sequences that bring one token come first, ordered by length, then the chunks."""

    input_ids: Tensor  # int64 (T)
    positions: Tensor  # int64 (T)
    attention: AttnMeta
    adapted_rows: tuple[AdaptedRows, ...]  # which of the tokens go through which adapter
    sampled: list[LiveSequence]  # those whose run ends at their last known token: they get a next one
    sampled_tokens: Tensor  # int64 (len(sampled)): index in [0, T) of each one's last token
    sampled_rows: Tensor  # int64 (len(sampled)): rows of the token pool
    sampled_columns: Tensor  # int64 (len(sampled)): where the next token goes, which is also its position
    prompt_chunks: list[PromptChunk]  # of the sequences that ask for the log-probabilities of their prompts


def build_batch(
    steps: Sequence[SequenceStep],
    sequences: Sequence[LiveSequence],
    pool: TokenPool,
    block_size: int,
    device: torch.device,
) -> StepBatch:
    """The batch of a step's sequences, of which there is at least one; both lists in the same order."""
    pairs = sorted(zip(steps, sequences, strict=True), key=_batch_order)
    num_computed = np.array([step.num_computed_tokens for step, _ in pairs])
    num_tokens = np.array([step.num_tokens for step, _ in pairs])
    seq_lens = num_computed + num_tokens
    cu_q = np.zeros(len(pairs) + 1, dtype=np.int32)
    np.cumsum(num_tokens, out=cu_q[1:])

    # For each of the T tokens: which sequence it is of, and its logical position there.
    owner = np.repeat(np.arange(len(pairs)), num_tokens)
    position = np.arange(cu_q[-1]) - (cu_q[:-1] - num_computed)[owner]
    block_table = _padded_block_table([sequence for _, sequence in pairs], seq_lens, block_size)
    entries = block_table[owner, position // block_size]
    slots = slots_of(torch.from_numpy(entries), torch.from_numpy(position % block_size), block_size)
    rows = np.array([sequence.row for _, sequence in pairs])

    positions = torch.from_numpy(position).to(device)
    is_sampled = np.array(
        [length == sequence.num_known_tokens for length, (_, sequence) in zip(seq_lens, pairs, strict=True)]
    )
    sampled = np.flatnonzero(is_sampled)
    return StepBatch(
        input_ids=pool.read(torch.from_numpy(rows[owner]).to(device), positions),
        positions=positions,
        attention=AttnMeta(
            block_table=torch.from_numpy(block_table).to(device),
            seq_lens=torch.from_numpy(seq_lens.astype(np.int32)).to(device),
            cu_q=torch.from_numpy(cu_q).to(device),
            slot_mapping=slots.to(device),
            max_q=int(num_tokens.max()),
            max_k=int(seq_lens.max()),
            n_decode=int((num_tokens == 1).sum()),
            block_size=block_size,
        ),
        adapted_rows=_adapted_rows([sequence.adapter for _, sequence in pairs], owner, device),
        sampled=[pairs[index][1] for index in sampled],
        sampled_tokens=torch.from_numpy(cu_q[1:][sampled].astype(np.int64) - 1).to(device),
        sampled_rows=torch.from_numpy(rows[sampled]).to(device),
        sampled_columns=torch.from_numpy(seq_lens[sampled]).to(device),
        prompt_chunks=PromptChunk.find(pairs, cu_q.tolist()),
    )


def build_sampling_batch(batch: StepBatch, pool: TokenPool) -> SamplingBatch:
    """What the sampler must know of the sampled sequences. Their tokens are read only where a penalty needs them."""
    params = [sequence.sampling for sequence in batch.sampled]
    num_columns = max(
        (sequence.num_known_tokens for sequence in batch.sampled if needs_history(sequence.sampling)), default=0
    )
    num_prompt_tokens = [sequence.num_prompt_tokens for sequence in batch.sampled]
    return SamplingBatch(
        params, pool.read_rows(batch.sampled_rows, num_columns), batch.sampled_columns, num_prompt_tokens
    )


def _batch_order(pair: tuple[SequenceStep, LiveSequence]) -> tuple[bool, int]:
    step = pair[0]
    is_chunk = step.num_tokens > 1
    return is_chunk, 0 if is_chunk else step.num_computed_tokens


def _adapted_rows(
    adapters: Sequence[int | None], owner: npt.NDArray[np.int64], device: torch.device
) -> tuple[AdaptedRows, ...]:
    """`owner`: for each token, which of the sequences it is of."""
    named = sorted({adapter for adapter in adapters if adapter is not None})
    if len(set(adapters)) == 1:
        return tuple(AdaptedRows(adapter, None) for adapter in named)
    # Tokens of no adapter get a number that no adapter has.
    of_tokens = np.array([-1 if adapter is None else adapter for adapter in adapters])[owner]
    return tuple(
        AdaptedRows(adapter, torch.from_numpy(np.flatnonzero(of_tokens == adapter)).to(device)) for adapter in named
    )


def _padded_block_table(sequences: Sequence[LiveSequence], seq_lens: np.ndarray, block_size: int) -> np.ndarray:
    num_entries = -(-seq_lens // block_size)
    block_table = np.zeros((len(sequences), num_entries.max()), dtype=np.int32)
    for row, sequence, width in zip(block_table, sequences, num_entries, strict=True):
        row[:width] = sequence.block_table[:width]
    return block_table
