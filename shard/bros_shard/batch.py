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
from bros_shard.sampling.sampler import SamplingBatch, needs_history
from bros_shard.sequences import LiveSequence, Run, TokenPool


@dataclass(frozen=True)
class StepBatch:
    """The T tokens of a step, and the N rows of logits that tokens are chosen from.

    Sequences that bring one token come first, ordered by length, then the chunks. A sampled sequence has one row, and
    one more for each guess.
    """

    input_ids: Tensor  # int64 (T)
    positions: Tensor  # int64 (T)
    attention: AttnMeta
    adapted_rows: tuple[AdaptedRows, ...]  # which of the tokens go through which adapter
    sampled: list[Run]  # those that end at the last known token: their sequences get a next one
    sampled_tokens: Tensor  # int64 (N): index in [0, T) of the token that each row follows
    sampled_rows: Tensor  # int64 (N): rows of the token pool
    sampled_columns: Tensor  # int64 (N): where the next token goes, which is also its position
    prompt_chunks: list[PromptChunk]  # of the sequences that ask for the log-probabilities of their prompts


def build_batch(runs: Sequence[Run], pool: TokenPool, block_size: int, device: torch.device) -> StepBatch:
    """The batch of a step's runs, of which there is at least one."""
    runs = sorted(runs, key=_batch_order)
    starts = np.array([run.start for run in runs])
    seq_lens = np.array([run.num_computed for run in runs])
    num_tokens = seq_lens - starts
    cu_q = np.zeros(len(runs) + 1, dtype=np.int32)
    np.cumsum(num_tokens, out=cu_q[1:])

    # For each of the T tokens: which sequence it is of, and its logical position there.
    owner = np.repeat(np.arange(len(runs)), num_tokens)
    position = np.arange(cu_q[-1]) - (cu_q[:-1] - starts)[owner]
    block_table = _padded_block_table([run.sequence for run in runs], seq_lens, block_size)
    entries = block_table[owner, position // block_size]
    slots = slots_of(torch.from_numpy(entries), torch.from_numpy(position % block_size), block_size)
    rows = np.array([run.sequence.row for run in runs])

    positions = torch.from_numpy(position).to(device)
    sampled_tokens = np.flatnonzero(
        np.array([run.is_sampled for run in runs])[owner]
        & (position >= np.array([run.stop for run in runs])[owner] - 1)
    )
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
        adapted_rows=_adapted_rows([run.sequence.adapter for run in runs], owner, device),
        sampled=[run for run in runs if run.is_sampled],
        sampled_tokens=torch.from_numpy(sampled_tokens).to(device),
        sampled_rows=torch.from_numpy(rows[owner[sampled_tokens]]).to(device),
        sampled_columns=torch.from_numpy(position[sampled_tokens] + 1).to(device),
        prompt_chunks=PromptChunk.find(runs, cu_q.tolist()),
    )


def build_sampling_batch(batch: StepBatch, pool: TokenPool) -> SamplingBatch:
    """What the sampler must know of the N rows. The tokens before are read only where a penalty needs them."""
    sequences = [run.sequence for run in batch.sampled for _ in range(run.num_rows)]
    num_columns = max((run.num_computed for run in batch.sampled if needs_history(run.sequence.sampling)), default=0)
    return SamplingBatch(
        [sequence.sampling for sequence in sequences],
        pool.read_rows(batch.sampled_rows, num_columns),
        batch.sampled_columns,
        [sequence.num_prompt_tokens for sequence in sequences],
    )


def _batch_order(run: Run) -> tuple[bool, int]:
    is_chunk = run.num_tokens + len(run.guesses) > 1
    return is_chunk, 0 if is_chunk else run.start


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
