"""Compiles grammars with llguidance: first in the router's helper, which vets them, then on rank 0, which uses them.

A grammar is llguidance's own notation, as the helper wrote it. Torch-free: the router's helper imports this module.
"""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path
from typing import Final

from llguidance import LLMatcher, LLParserLimits, LLTokenizer

#: A sequence whose grammar goes beyond these has no next token. They bound what a token costs the others: with them one
#: mask takes some milliseconds at worst, and a matcher some ten megabytes. The library's speeds: 14,000 units of lexer
#: fuel a millisecond, 20,000 items a millisecond, 1 to 2 kB a lexer state.
_LIMITS: Final = LLParserLimits(
    step_lexer_fuel=100_000,
    step_max_items=50_000,
    max_lexer_states=10_000,
    verbose_errors=False,
)
#: Why a matcher that has not failed takes no further token.
_GOOD_ENDS: Final = ("NotStopped", "NoExtension", "NoExtensionBias", "EndOfSentence")


class GrammarError(Exception):
    """A grammar cannot be compiled. The message is public."""


class GrammarCompiler:
    """Makes matchers for one tokenizer."""

    def __init__(self, tokenizer: Path, vocab_size: int, eos_token_ids: Collection[int]) -> None:
        """Read the tokenizer, which may take a second.

        Args:
            tokenizer: a `tokenizer.json`.
            vocab_size: number of logits; not less than the tokenizer's tokens.
            eos_token_ids: at least one. They are allowed where what was generated is complete.

        Raises:
            GrammarError: the library cannot use the tokenizer.
        """
        try:
            self._tokenizer = LLTokenizer(str(tokenizer), n_vocab=vocab_size, eos_token=sorted(eos_token_ids))
        except Exception as error:  # the library raises bare exceptions of its own and Rust's
            raise GrammarError(str(error)) from None

    def compile(self, grammar: str) -> LLMatcher:
        """A matcher at the beginning of the text. Releases the GIL.

        Raises:
            GrammarError: `grammar` is none, or goes beyond the limits.
        """
        matcher = LLMatcher(self._tokenizer, grammar, log_level=0, limits=_LIMITS)
        if matcher.is_error():
            raise GrammarError(matcher.get_error())
        return matcher


def is_broken(matcher: LLMatcher) -> bool:
    """Whether the matcher has failed: at a limit, at a token that it did not allow, or where nothing can follow what
    was generated and it is not complete."""
    if matcher.stop_reason() not in _GOOD_ENDS or matcher.is_error():
        return True
    return matcher.is_stopped() and matcher.stop_reason() == "NoExtensionBias" and not matcher.is_accepting()
