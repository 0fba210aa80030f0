"""The most likely tokens of each row, in order, and the filters that remove some: top-k, top-p, typical-p.

Sorting a whole vocabulary costs more than the rest of sampling, and what a filter keeps is mostly a few tokens. So
filters work on each row's `n` most likely tokens, and whether that was enough is known afterwards: it was, if the
least likely of them, and their equals, ended up without mass, for then so would everything below.

The order is total: ascending logits and, among equal ones, ascending ids. Top-p, which may cut through equal logits,
so removes low ids first, like TGI's ascending sort.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Final

import torch
from torch import Tensor

from bros_shard.sampling.mass import cumulative_mass, masses_of, total_mass

_MASK_31: Final = 0x7FFFFFFF
_MASK_32: Final = 0xFFFFFFFF


@dataclass(frozen=True)
class Candidates:
    """Each row's most likely tokens in ascending order. A filter removes a token by taking its mass."""

    logits: Tensor  # float32 (num_rows, n), at most 0
    token_ids: Tensor  # int64 (num_rows, n)
    masses: Tensor  # float32 (num_rows, n), see `mass`

    @classmethod
    def select(cls, shifted_logits: Tensor, num_candidates: int) -> Candidates:
        """The most likely tokens of each row. Which of several that tie for the last place is left open.

        Args:
            shifted_logits: float32 (num_rows, vocab_size), row maximum 0.
            num_candidates: from 1 to vocab_size.
        """
        num_rows, vocab_size = shifted_logits.shape
        if num_candidates < vocab_size:
            logits, token_ids = shifted_logits.topk(num_candidates, sorted=False)
        else:
            logits = shifted_logits
            token_ids = torch.arange(vocab_size, device=logits.device).expand(num_rows, -1)
        token_ids = _sort_keys(logits, token_ids).sort(dim=-1).values & _MASK_32
        logits = shifted_logits.gather(-1, token_ids)
        return cls(logits, token_ids, masses_of(logits))

    @property
    def is_least_massless(self) -> Tensor:
        """bool (num_rows,): no candidate as likely as the least has mass, nor then would any token below."""
        return ((self.logits > self.logits[:, :1]) | (self.masses == 0)).all(-1)

    def keep_top_k(self, top_k: Tensor) -> Candidates:
        """Keep the k most likely tokens, and all that tie with the k-th.

        Args:
            top_k: int64 (num_rows,), from 1 to n; n keeps every candidate.
        """
        kth_index = self.logits.shape[-1] - top_k
        return self._remove(self.logits < self.logits.gather(-1, kth_index[:, None]))

    def keep_top_p(self, top_p: Tensor, mass_below: Tensor) -> Candidates:
        """Remove tokens from the least likely up while their cumulative probability is at most `1 - p`.

        The most likely token stays in any case.

        Args:
            top_p: float64 (num_rows,) in (0, 1]; 1 keeps everything that has mass.
            mass_below: float64 (num_rows,): mass of the tokens, not candidates, that earlier filters left.
        """
        cumulative = cumulative_mass(self.masses).add_(mass_below[:, None])
        is_removed = cumulative <= (1.0 - top_p)[:, None] * cumulative[:, -1:]
        is_removed[:, -1] = False
        return self._remove(is_removed)

    def keep_typical(self, typical_p: Tensor) -> Candidates:
        """Keep the tokens whose surprise is closest to the entropy, until they hold `typical_p` of the mass.

        Meister et al. 2022 (locally typical sampling). Surprise is `log(total) - logit` and entropy its mean, so their
        distance is the distance of the logit from the mean logit. All tokens at the last distance stay.

        Args:
            typical_p: float64 (num_rows,) in (0, 1]; 1 keeps everything that has mass.
        """
        has_mass = self.masses > 0
        logits = self.logits.double()
        total = total_mass(self.masses)[:, None]
        # Whole numbers again, so that the mean, too, is the same in any batch.
        moments = torch.where(has_mass, self.masses * logits, 0.0).round_()
        distances = torch.where(has_mass, (logits - total_mass(moments)[:, None] / total).abs(), torch.inf)
        ascending = distances.sort(dim=-1)
        cumulative = cumulative_mass(self.masses.gather(-1, ascending.indices))
        num_nearer = (cumulative < typical_p[:, None] * total).sum(-1, keepdim=True)
        last = num_nearer.clamp_(max=logits.shape[-1] - 1)
        return self._remove(distances > ascending.values.gather(-1, last))

    def _remove(self, is_removed: Tensor) -> Candidates:
        return replace(self, masses=self.masses.masked_fill(is_removed, 0.0))


def _sort_keys(logits: Tensor, token_ids: Tensor) -> Tensor:
    """Integers in the order of (logit, token id), the id in their low 32 bits.

    The bits of a float, its sign aside, grow with its size; the logits are at most 0. NaN comes before everything.
    """
    magnitude = (logits.view(torch.int32) & _MASK_31).long()
    return magnitude.neg_().bitwise_left_shift_(32).bitwise_or_(token_ids)
