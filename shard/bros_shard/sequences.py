"""What a rank remembers of each live sequence between steps, and the check that a plan agrees with it."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from itertools import chain

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from bros_shard.block_layout import block_of, num_blocks_for
from bros_shard.protocol import HostCopy, NewSequence, SamplingParams, SequenceStep, StepPlan, TailMove


class PlanError(Exception):
    """A plan contradicts what this rank knows: it and the router are no longer of one mind."""


class LiveSequence:
    """A sequence between its `NewSequence` and its release. Its token ids are in the `TokenPool`, in row `row`."""

    __slots__ = (
        "adapter",
        "block_table",
        "is_guided",
        "max_total_tokens",
        "num_known_tokens",
        "num_prompt_tokens",
        "num_prompt_top_tokens",
        "row",
        "sampling",
        "sequence_id",
    )

    def __init__(self, new: NewSequence, row: int) -> None:
        self.sequence_id = new.sequence_id
        self.sampling: SamplingParams = new.sampling
        self.max_total_tokens = new.max_total_tokens
        self.num_known_tokens = len(new.token_ids)
        self.num_prompt_tokens = len(new.token_ids) - new.num_generated_tokens
        self.num_prompt_top_tokens = new.num_prompt_top_tokens
        self.adapter = new.adapter
        self.is_guided = new.grammar is not None
        self.row = row
        self.block_table: npt.NDArray[np.int32] = np.empty(0, dtype=np.int32)


@dataclass(slots=True)
class Run:
    """What a step computes of a sequence: `num_tokens` known tokens, from position `start` on, and then guesses."""

    sequence: LiveSequence
    start: int
    num_tokens: int
    #: Most tokens that may be guessed.
    max_guesses: int = 0
    #: What may come after the last known token (`bros_shard.speculation`); they stand in the token pool already.
    guesses: list[int] = field(default_factory=list)

    @property
    def stop(self) -> int:
        """Position after the last token that is known."""
        return self.start + self.num_tokens

    @property
    def num_computed(self) -> int:
        """Tokens of the sequence that are computed after the step, guesses included."""
        return self.stop + len(self.guesses)

    @property
    def num_rows(self) -> int:
        """Rows of logits of a run that is sampled: behind the last known token, and behind each guess."""
        return 1 + len(self.guesses)

    @property
    def is_sampled(self) -> bool:
        """Whether the run ends at the last known token: a next one is chosen, and one after each guess."""
        return self.stop == self.sequence.num_known_tokens


class TokenPool:
    """Token ids of all live sequences, on the device: what was sampled is the next step's input without leaving it.

    One row for each sequence, int32. Rows and columns are added as they are needed and never given back.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._tokens = torch.zeros(16, 1024, dtype=torch.int32, device=device)
        self._free_rows = list(range(16))

    def add(self, token_ids: list[int], max_total_tokens: int) -> int:
        """Store a sequence's tokens in a row that holds up to `max_total_tokens`. Returns the row."""
        num_rows, num_columns = self._tokens.shape
        if max_total_tokens > num_columns or not self._free_rows:
            new_rows = num_rows if not self._free_rows else 0
            new_columns = max(num_columns, -(-max_total_tokens // 1024) * 1024)
            grown = torch.zeros(num_rows + new_rows, new_columns, dtype=torch.int32, device=self._device)
            grown[:num_rows, :num_columns] = self._tokens
            self._tokens = grown
            self._free_rows += range(num_rows, num_rows + new_rows)
        row = self._free_rows.pop()
        self._tokens[row, : len(token_ids)] = torch.tensor(token_ids, dtype=torch.int32, device=self._device)
        return row

    def release(self, row: int) -> None:
        """Forget a row's tokens."""
        self._free_rows.append(row)

    def read(self, rows: Tensor, columns: Tensor) -> Tensor:
        """The tokens at (row, column) pairs; int64, like the indices."""
        return self._tokens[rows, columns].long()

    def write(self, rows: Tensor, columns: Tensor, token_ids: Tensor) -> None:
        """Store tokens at (row, column) pairs."""
        self._tokens[rows, columns] = token_ids.int()

    def write_guesses(self, row: int, start: int, token_ids: list[int]) -> None:
        """Store tokens from column `start` of a row on."""
        self._tokens[row, start : start + len(token_ids)] = torch.tensor(token_ids, dtype=torch.int32)

    def history(self, row: int, num_tokens: int) -> npt.NDArray[np.int32]:
        """The first tokens of a row, on the host; to be read at once, for they may be the pool's own memory."""
        tokens: npt.NDArray[np.int32] = self._tokens[row, :num_tokens].cpu().numpy()
        return tokens

    def read_rows(self, rows: Tensor, num_columns: int) -> Tensor:
        """The first `num_columns` tokens of each row; int64 (len(rows), num_columns)."""
        return self._tokens[:, :num_columns].index_select(0, rows).long()


class SequenceTable:
    """The live sequences of a rank, by id."""

    def __init__(
        self,
        pool: TokenPool,
        vocab_size: int,
        max_length: int,
        num_blocks: int,
        block_size: int,
        num_adapters: int = 0,
    ) -> None:
        self.pool = pool
        self._vocab_size = vocab_size
        self._max_length = max_length
        self._num_blocks = num_blocks
        self._block_size = block_size
        self._num_adapters = num_adapters
        self._sequences: dict[int, LiveSequence] = {}

    def __len__(self) -> int:
        return len(self._sequences)

    def apply(self, plan: StepPlan) -> list[Run]:
        """Take up the plan's releases, new sequences and block tables.

        Returns:
            What to compute of `plan.sequences`, in that order.

        Raises:
            PlanError: the plan names what does not exist, or twice, or more tokens than are known or have blocks.
        """
        for sequence_id in plan.releases:
            self._release(sequence_id)
        for new in plan.new_sequences:
            self._add(new)
        runs = [self._step(step) for step in plan.sequences]
        if len({step.sequence_id for step in plan.sequences}) != len(plan.sequences):
            raise PlanError("a sequence stands twice in a step")
        return runs

    def _release(self, sequence_id: int) -> None:
        sequence = self._sequences.pop(sequence_id, None)
        if sequence is None:
            raise PlanError(f"sequence {sequence_id} is released but not known")
        self.pool.release(sequence.row)

    def _add(self, new: NewSequence) -> None:
        if new.sequence_id in self._sequences:
            raise PlanError(f"sequence {new.sequence_id} is new but known")
        if not len(new.token_ids) <= new.max_total_tokens <= self._max_length:
            raise PlanError(
                f"sequence {new.sequence_id}: {len(new.token_ids)} tokens of at most {new.max_total_tokens}, "
                f"the model takes {self._max_length}"
            )
        if new.num_generated_tokens >= len(new.token_ids):
            raise PlanError(f"sequence {new.sequence_id} has no prompt")
        biased = (token_id for token_id, _ in new.sampling.logit_bias)
        if max(chain(new.token_ids, biased)) >= self._vocab_size:
            raise PlanError(f"sequence {new.sequence_id} has a token outside the vocabulary")
        if new.adapter is not None and new.adapter >= self._num_adapters:
            raise PlanError(f"sequence {new.sequence_id}: adapter {new.adapter} of {self._num_adapters}")
        row = self.pool.add(new.token_ids, new.max_total_tokens)
        self._sequences[new.sequence_id] = LiveSequence(new, row)

    def _step(self, step: SequenceStep) -> Run:
        sequence = self._sequences.get(step.sequence_id)
        if sequence is None:
            raise PlanError(f"sequence {step.sequence_id} is not known")
        if step.first_changed_index > len(sequence.block_table):
            raise PlanError(f"sequence {step.sequence_id}: its block table would have a hole")
        self._check_entries(step.entries)
        if step.entries or step.first_changed_index < len(sequence.block_table):
            kept = sequence.block_table[: step.first_changed_index]
            sequence.block_table = np.concatenate([kept, np.array(step.entries, dtype=np.int32)])
        run = self._run(sequence, step)
        if num_blocks_for(run.stop + run.max_guesses, self._block_size) > len(sequence.block_table):
            raise PlanError(
                f"sequence {step.sequence_id}: {run.stop + run.max_guesses} tokens planned beyond its block table"
            )
        return run

    def _run(self, sequence: LiveSequence, step: SequenceStep) -> Run:
        """Where the run begins, and how much may be guessed behind it."""
        start, num_known_tokens = step.num_computed_tokens, sequence.num_known_tokens
        if step.num_uncertain_tokens:
            # The last token that a sequence may have is never computed. Where guesses have brought it already, the one
            # before it is computed once more, for nobody.
            num_confirmed = min(num_known_tokens, sequence.max_total_tokens - 1) - (start + step.num_tokens)
            if not 0 <= num_confirmed <= step.num_uncertain_tokens:
                raise PlanError(
                    f"sequence {step.sequence_id}: {num_confirmed} tokens confirmed of {step.num_uncertain_tokens}"
                )
            start += num_confirmed
        stop = start + step.num_tokens
        if stop > num_known_tokens:
            raise PlanError(f"sequence {step.sequence_id}: {stop} tokens planned, {num_known_tokens} known")
        if stop == sequence.max_total_tokens:
            raise PlanError(f"sequence {step.sequence_id} has all its {stop} tokens already")
        max_guesses = 0
        if step.max_speculative_tokens:
            if sequence.is_guided:
                raise PlanError(f"sequence {step.sequence_id} has a grammar: its tokens are not guessed")
            if stop == num_known_tokens:
                max_guesses = min(step.max_speculative_tokens, sequence.max_total_tokens - 1 - stop)
        return Run(sequence, start, step.num_tokens, max_guesses)

    def check_copies(self, moves: Iterable[TailMove], host_copies: Iterable[HostCopy], num_host_blocks: int) -> None:
        """Raises `PlanError` where a copy names a block that does not exist, or more tokens than a block holds."""
        for move in moves:
            self._check_entries((move.source_entry, move.destination_entry))
            self._check_num_tokens(move.num_tokens)
        for copy in host_copies:
            self._check_entries((copy.entry,))
            self._check_num_tokens(copy.num_tokens)
            if copy.host_block >= num_host_blocks:
                raise PlanError(f"host block {copy.host_block} of {num_host_blocks}")

    def _check_entries(self, entries: Iterable[int]) -> None:
        for entry in entries:
            if block_of(entry) >= self._num_blocks:
                raise PlanError(f"block {block_of(entry)} of {self._num_blocks}")

    def _check_num_tokens(self, num_tokens: int) -> None:
        if num_tokens > self._block_size:
            raise PlanError(f"{num_tokens} tokens copied of a block of {self._block_size}")
