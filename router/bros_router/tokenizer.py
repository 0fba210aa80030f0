"""The model's tokenizer: text to token ids, and token ids back to text as they arrive."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate
from pathlib import Path
from typing import Final

import tokenizers

#: TGI's decoding window starts this many tokens before the end of the prompt (its `initialize`).
_NUM_CONTEXT_TOKENS: Final = 5
#: What an incomplete UTF-8 sequence decodes to, and what bytes that are no UTF-8 at all do.
_REPLACEMENT: Final = "\N{REPLACEMENT CHARACTER}"
#: An incomplete UTF-8 sequence has at most three bytes, so it spans at most as many tokens.
_MAX_INCOMPLETE_TOKENS: Final = 3


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
            token_id for token_id, token in self._tokenizer.get_added_tokens_decoder().items() if token.special
        )

    def save(self, path: Path) -> None:
        """Write the tokenizer as a `tokenizer.json`."""
        self._tokenizer.save(str(path), pretty=False)

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

    def texts(self, token_ids: Sequence[int]) -> list[str]:
        """Each token's text on its own, that of special ones too."""
        return [self._tokenizer.decode([token_id], skip_special_tokens=False) for token_id in token_ids]

    def stream_texts(self, token_ids: Sequence[int]) -> list[str]:
        """What each token adds to the text of those before it, as in a stream."""
        detokenizer = self.detokenizer(())
        return [detokenizer.step(token_id) for token_id in token_ids]

    def encode(self, text: str, *, add_special_tokens: bool = True) -> tokenizers.Encoding:
        """Token ids, texts and offsets (in characters). Releases the GIL: call it from a worker thread.

        Raises:
            TokenizerError: the tokenizer refuses the text.
        """
        try:
            return self._tokenizer.encode(text, add_special_tokens=add_special_tokens)
        except Exception as error:  # the library raises bare Exception
            raise TokenizerError(str(error)) from None

    def encode_truncated(self, text: str, num_tokens: int) -> tokenizers.Encoding:
        """At most `num_tokens` tokens: the special tokens, and the end of the text, as TGI's shard truncates.

        Releases the GIL: call it from a worker thread.

        Raises:
            TokenizerError: the tokenizer refuses the text.
        """
        encoding = self.encode(text, add_special_tokens=False)
        num_special_tokens = self._tokenizer.num_special_tokens_to_add(is_pair=False)
        encoding.truncate(max(0, num_tokens - num_special_tokens), direction="left")
        encoding = self._tokenizer.post_process(encoding)
        encoding.truncate(num_tokens)  # special tokens alone may be more
        return encoding

    def detokenizer(self, prompt_token_ids: Sequence[int]) -> Detokenizer:
        """A decoder of the tokens that will follow this prompt."""
        return Detokenizer(self._tokenizer, prompt_token_ids)


class Detokenizer:
    """Decodes one sequence token by token. Special tokens come out as text, as in TGI's stream.

    A token's text depends on its neighbours: sentencepiece drops the space of a first word, a character may span
    tokens. So a window is decoded:

        | context: its text is out | pending: its text is not |  <- next token

    The text of the window beyond that of the context is what came anew. It is held back while it may end in the
    middle of a character. The library's `DecodeStream` does nearly this, but it raises where a byte-fallback
    decoder changes its mind about bytes already out, repeats a prompt that ends in U+FFFD, and holds a run of
    invalid bytes back for ever.
    """

    def __init__(self, tokenizer: tokenizers.Tokenizer, prompt_token_ids: Sequence[int]) -> None:
        self._tokenizer = tokenizer
        self._context = self._context_of(prompt_token_ids)
        self._context_text = self._decode(self._context)
        self._pending: list[int] = []

    def step(self, token_id: int) -> str:
        """The text that `token_id` completes: empty while its bytes are an incomplete UTF-8 sequence."""
        self._pending.append(token_id)
        text = self._decode(self._context + self._pending)
        if not text.endswith(_REPLACEMENT):
            return self._release(text, len(self._pending))
        # What lies further back than any incomplete character reaches is not going to become one: unless what
        # follows it changed it, which is a character that only now is complete.
        num_settled = len(self._pending) - _MAX_INCOMPLETE_TOKENS
        if num_settled <= 0:
            return ""
        settled_text = self._decode(self._context + self._pending[:num_settled])
        return self._release(settled_text, num_settled) if text.startswith(settled_text) else ""

    def _release(self, text: str, num_settled: int) -> str:
        """Move `num_settled` pending tokens, with which the window reads `text`, into the context."""
        settled, self._pending = self._pending[:num_settled], self._pending[num_settled:]
        if text == self._context_text:
            return ""  # tokens without a text: the context stays what it was
        # Where the decoder now reads the context differently, what is out stays out.
        is_continued = text.startswith(self._context_text)
        new_text = text[len(self._context_text) :] if is_continued else self._decode(settled)
        self._context = settled
        self._context_text = self._decode(settled)
        return new_text

    def _context_of(self, prompt_token_ids: Sequence[int]) -> list[int]:
        """The end of the prompt, from the beginning of a character on."""
        for num_more in range(_MAX_INCOMPLETE_TOKENS + 1):
            context = list(prompt_token_ids[-(_NUM_CONTEXT_TOKENS + num_more) :])
            if not self._decode(context).startswith(_REPLACEMENT):
                return context
        return list(prompt_token_ids[-_NUM_CONTEXT_TOKENS:])

    def _decode(self, token_ids: list[int]) -> str:
        text: str = self._tokenizer.decode(token_ids, skip_special_tokens=False)
        return text


def byte_offsets(text: str) -> list[int]:
    """Where each character of `text`, and its end, lie in its UTF-8 bytes."""
    return [0, *accumulate(len(character.encode()) for character in text)]
