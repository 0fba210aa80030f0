"""The model's tokenizer: text to token ids, and token ids back to text as they arrive."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import tokenizers
from tokenizers.decoders import DecodeStream

#: TGI's decoding window starts this many tokens before the end of the prompt (its `initialize`).
_NUM_PREFIX_TOKENS = 5


class TokenizerError(Exception):
    """A tokenizer file that cannot be used, or a text that it cannot encode."""


class Tokenizer:
    """A fast tokenizer (`tokenizer.json`). Immutable after construction, so threads may share it."""

    def __init__(self, path: Path) -> None:
        """Raises `TokenizerError` where `path` is not a readable tokenizer file."""
        try:
            self._tokenizer = tokenizers.Tokenizer.from_file(str(path))
        except Exception as error:  # the library raises bare Exception
            raise TokenizerError(f"{path.name}: {error}") from None
        # A checkpoint may ship with training-time truncation or padding switched on; serving wants neither.
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        self._special_ids = frozenset(
            token_id
            for token_id, token in self._tokenizer.get_added_tokens_decoder().items()
            if token.special
        )

    @property
    def vocab_size(self) -> int:
        """One more than the largest token id."""
        return max(self._tokenizer.get_vocab(with_added_tokens=True).values()) + 1

    def token_id(self, token: str) -> int | None:
        """The id of a token given by its text, or `None`."""
        token_id: int | None = self._tokenizer.token_to_id(token)
        return token_id

    def is_special(self, token_id: int) -> bool:
        """Whether `generated_text` leaves the token out."""
        return token_id in self._special_ids

    def encode(self, text: str, *, add_special_tokens: bool = True) -> tokenizers.Encoding:
        """Token ids, texts and offsets. Releases the GIL: call it from a worker thread.

        Raises:
            TokenizerError: the tokenizer refuses the text.
        """
        try:
            return self._tokenizer.encode(text, add_special_tokens=add_special_tokens)
        except Exception as error:  # the library raises bare Exception
            raise TokenizerError(str(error)) from None

    def detokenizer(self, prompt_token_ids: Sequence[int]) -> Detokenizer:
        """A decoder of the tokens that will follow this prompt."""
        return Detokenizer(self._tokenizer, prompt_token_ids)


class Detokenizer:
    """Decodes one sequence token by token. Special tokens come out as text, as in TGI's stream."""

    def __init__(self, tokenizer: tokenizers.Tokenizer, prompt_token_ids: Sequence[int]) -> None:
        self._tokenizer = tokenizer
        self._stream = DecodeStream(
            ids=list(prompt_token_ids[-_NUM_PREFIX_TOKENS:]), skip_special_tokens=False
        )

    def step(self, token_id: int) -> str:
        """The text that `token_id` completes: empty while its bytes are an incomplete UTF-8 sequence."""
        text: str | None = self._stream.step(self._tokenizer, token_id)
        return text or ""
