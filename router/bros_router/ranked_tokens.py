"""The likeliest tokens of one place, from ids to what clients see."""

from __future__ import annotations

from collections.abc import Sequence

from bros_router.request import Token
from bros_router.tokenizer import Tokenizer
from bros_shard.protocol import RankedToken


def ranked_tokens(top_tokens: Sequence[RankedToken], tokenizer: Tokenizer) -> tuple[Token, ...]:
    """Each has its text on its own: what a text that it ended would show of it is not known."""
    texts = tokenizer.texts([token_id for token_id, _ in top_tokens])
    return tuple(
        Token(token_id, text, logprob, tokenizer.is_special(token_id))
        for text, (token_id, logprob) in zip(texts, top_tokens, strict=True)
    )
