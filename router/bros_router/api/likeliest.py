"""Which of several replies to one prompt is the best: TGI's `best_of`, and OpenAI's."""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import fmean

from bros_router.api.call import WholeReply


def likeliest_first(replies: Sequence[WholeReply]) -> list[WholeReply]:
    """By the mean log-probability of their tokens, as TGI and OpenAI judge; among equals, the first comes first."""
    return sorted(replies, key=_mean_logprob, reverse=True)


def _mean_logprob(reply: WholeReply) -> float:
    """A token without a finite log-probability makes the whole reply the least likely."""
    return fmean(-math.inf if token.logprob is None else token.logprob for token in reply.tokens)
