"""Prompts of known length for the benchmark checkpoints, whose tokenizer has one token per word."""

from __future__ import annotations

import random
from collections.abc import Iterable
from typing import Final

#: Words that every benchmark checkpoint knows. Prompts of random words share no prefix worth a cache's while.
_NUM_COMMON_WORDS: Final = 1000


def prompt_of(token_ids: Iterable[int]) -> str:
    """The text that tokenises to these ids."""
    return " ".join(f"w{token_id}" for token_id in token_ids)


def random_prompt(num_tokens: int, generator: random.Random) -> str:
    """A text of exactly `num_tokens` tokens."""
    return prompt_of(generator.choices(range(1, _NUM_COMMON_WORDS), k=num_tokens))
