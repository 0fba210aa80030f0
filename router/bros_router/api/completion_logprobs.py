"""The log-probabilities of a completion as OpenAI's older route tells them: four lists, and the prompt in front."""

from __future__ import annotations

from collections.abc import Iterable

from bros_router.api.v1_replies import CompletionLogprobs
from bros_router.ranked_tokens import ranked_tokens
from bros_router.request import PromptDetails, Token
from bros_router.tokenizer import Tokenizer


def completion_logprobs(tokens: Iterable[Token], num_shown: int = 0) -> CompletionLogprobs:
    """Tell of some tokens.

    Args:
        num_shown: characters of the choice's text before them. Special tokens are no part of that text.
    """
    told = CompletionLogprobs([], [], [], [])
    for token in tokens:
        told.tokens.append(token.text)
        told.token_logprobs.append(token.logprob)
        told.top_logprobs.append(None if token.logprob is None else _by_text(token))
        told.text_offset.append(num_shown)
        num_shown += num_characters(token)
    return told


def _by_text(token: Token) -> dict[str, float | None]:
    """The likeliest first. Of tokens that look alike, the likeliest; the token itself looks as the reply shows it."""
    logprobs: dict[str, float | None] = {}
    for top in token.top_tokens:
        logprobs.setdefault(token.text if top.token_id == token.token_id else top.text, top.logprob)
    logprobs.setdefault(token.text, token.logprob)
    return logprobs


def num_characters(token: Token) -> int:
    """How many characters of the text are the token's."""
    return 0 if token.is_special else len(token.text)


def prompt_tokens(token_ids: Iterable[int], prompt: PromptDetails, tokenizer: Tokenizer) -> list[Token]:
    """A prompt's tokens as if they had been generated. Takes a while: call it from a worker thread."""
    token_ids = [*token_ids]
    return [
        Token(token_id, text, logprob, tokenizer.is_special(token_id), ranked_tokens(top_tokens, tokenizer))
        for token_id, text, logprob, top_tokens in zip(
            token_ids, tokenizer.stream_texts(token_ids), prompt.logprobs, prompt.top_tokens, strict=True
        )
    ]
