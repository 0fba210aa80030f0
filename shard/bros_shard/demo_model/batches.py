"""Cuts tokenised documents into training rows: shuffled for each pass, the same for the same seed."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from tokenizers import Tokenizer
from torch import Tensor

from bros_shard.demo_model.corpus import Document
from bros_shard.demo_model.tokenizer import EOS_TOKEN_IDS

TokenArray = npt.NDArray[np.uint16]


@dataclass(frozen=True)
class Rows:
    """A batch: `targets` are `tokens` moved by one. Both (rows, length), int64."""

    tokens: Tensor
    targets: Tensor

    @staticmethod
    def cut(stream: TokenArray, starts: Sequence[int], length: int, device: torch.device) -> Rows:
        index = np.asarray(starts)[:, None] + np.arange(length + 1)
        window = torch.from_numpy(stream[index].astype(np.int64)).to(device)
        return Rows(window[:, :-1], window[:, 1:])


def encode(tokenizer: Tokenizer, documents: Iterable[Document]) -> list[TokenArray]:
    """Token ids of each document, the end-of-text token last."""
    encodings = tokenizer.encode_batch_fast([document.text for document in documents])
    return [np.array([*encoding.ids, EOS_TOKEN_IDS[0]], dtype=np.uint16) for encoding in encodings]


class Sampler:
    """An endless sequence of batches. Its position is two integers, which is all a checkpoint needs.

    One pass lays all documents, each repeated as often as its kind says, end to end in a new random order and
    visits the rows of that stream in a new random order. A row may span documents.
    """

    def __init__(self, documents: Sequence[Document], encoded: Sequence[TokenArray], seed: int) -> None:
        self.repeated = [
            tokens for document, tokens in zip(documents, encoded, strict=True) for _ in range(document.kind.repeats)
        ]
        self.seed = seed
        self.num_passes = 0  # finished or begun
        self.num_rows = 0  # already taken from the current pass
        self.length = 0
        self.stream: TokenArray = np.empty(0, np.uint16)
        self.starts: npt.NDArray[np.int64] = np.empty(0, np.int64)

    def next_rows(self, count: int, length: int, device: torch.device) -> Rows:
        """The next `count` rows. A new length, or too few rows left, begins a new pass."""
        if length != self.length or self.num_rows + count > len(self.starts):
            self.begin_pass(self.num_passes + 1, length)
        taken = self.starts[self.num_rows : self.num_rows + count]
        self.num_rows += count
        return Rows.cut(self.stream, taken.tolist(), length, device)

    def begin_pass(self, number: int, length: int, num_rows: int = 0) -> None:
        """Lay out pass `number`, as if `num_rows` of it had been taken."""
        rng = np.random.default_rng([self.seed, number])
        order = rng.permutation(len(self.repeated))
        self.stream = np.concatenate([self.repeated[index] for index in order])
        offset = int(rng.integers(length))
        self.starts = rng.permutation(np.arange(offset, len(self.stream) - length, length))
        self.num_passes, self.length, self.num_rows = number, length, num_rows
