"""When a reply ends because of its text."""

from __future__ import annotations


class StopSequences:
    """Watches one reply's text for its stop sequences, as TGI does on its own routes.

    A stop sequence counts where it ends exactly at the end of a token's text, one newline behind it allowed
    (TGI searches for the escaped sequence followed by `$`). It stays in the reply. The empty sequence matches
    at the first token.
    """

    def __init__(self, sequences: tuple[str, ...]) -> None:
        self._endings = tuple(ending for sequence in sequences for ending in (sequence, sequence + "\n"))
        self._tail = ""
        self._num_tail_characters = max((len(ending) for ending in self._endings), default=0)

    def is_reached(self, text: str) -> bool:
        """Take in the text of the next token, which may be empty, and say whether the reply ends with it."""
        if not self._endings:
            return False
        self._tail = (self._tail + text)[-self._num_tail_characters :]
        return self._tail.endswith(self._endings)
