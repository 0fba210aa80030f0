"""Chooses the next token of every row of a step's logits, on the logits' device.

A row's token depends on that row alone: its logits, parameters, history, seed and position. Rows are grouped by how
they are chosen, and no group's arithmetic depends on which rows share it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Final

import torch
from torch import Tensor

from bros_kernels.kernels import Kernels
from bros_shard.protocol import MAX_TOP_TOKENS, RankedToken, SamplingParams
from bros_shard.sampling.candidates import Candidates
from bros_shard.sampling.logits_processors import (
    apply_frequency_penalty,
    apply_logit_bias,
    apply_presence_penalty,
    apply_repetition_penalty,
    apply_temperature,
)
from bros_shard.sampling.mass import draw, log_mass, masses_of, shift_to_zero, total_mass
from bros_shard.sampling.random import uniforms
from bros_shard.sampling.top_tokens import likeliest_tokens
from bros_shard.sampling.watermark import apply_watermarks

#: How many candidates a filtered row is tried with before its whole vocabulary is sorted. Finding 128 of 49,152 tokens
#: costs about 1/30 of sorting them, finding 4,096 about 1/6.
_NUM_CANDIDATES: Final = (128, 4096)


@dataclass(frozen=True)
class SamplingBatch:
    """What the sampler must know of the rows of a step's logits. Built once per step."""

    #: One for each row.
    params: list[SamplingParams]
    #: int64 (num_rows, max_length): prompt and generated tokens of each row, padded with anything. Only rows whose
    #: parameters need history must be filled in; the width is 0 where none does.
    token_ids: Tensor
    #: int64 (num_rows,): tokens of each row so far, which is also the position of the token to be chosen.
    lengths: Tensor
    #: How many of them are the prompt. Only rows whose parameters need history must be told.
    num_prompt_tokens: list[int]


@dataclass(frozen=True)
class SampledTokens:
    """The chosen tokens, on the logits' device."""

    token_ids: Tensor  # int64 (num_rows,), always in range
    logprobs: Tensor  # float32 (num_rows,): log-softmax of the processed logits at the chosen token
    is_valid: Tensor  # bool (num_rows,): False where the logits held NaN or +inf, or no token was possible
    #: By row, for those that ask: the likeliest tokens by the processed logits, see `likeliest_tokens`.
    top_tokens: dict[int, list[RankedToken]] = field(default_factory=dict)


def needs_history(params: SamplingParams) -> bool:
    """Whether choosing a token takes the tokens before it."""
    return (
        params.repetition_penalty != 1.0
        or params.frequency_penalty != 0.0
        or params.presence_penalty != 0.0
        or params.watermark is not None
    )


def _changes_logits(params: SamplingParams) -> bool:
    """Whether the logits are not those that the model gave. A temperature changes the best token's log-probability."""
    return params.temperature != 1.0 or bool(params.logit_bias) or needs_history(params)


class Sampler:
    """Bias, mark, penalties, temperature, filters and choice, in TGI's order. Keeps nothing between calls."""

    def __init__(self, kernels: Kernels) -> None:
        self._kernels = kernels

    def sample(self, logits: Tensor, batch: SamplingBatch) -> SampledTokens:
        """Choose one token for each row.

        Args:
            logits: (num_rows, vocab_size), any float type, left as it is. -inf is a token that cannot be chosen.
            batch: for the same rows.
        """
        groups: dict[_Chooser, list[int]] = {}
        for row, params in enumerate(batch.params):
            groups.setdefault(self._chooser_for(params), []).append(row)
        if len(groups) == 1:
            (choose,) = groups
            return choose(logits, batch)
        sampled = _empty(len(batch.params), logits.device)
        for choose, rows in groups.items():
            index = torch.tensor(rows, device=logits.device)
            _put(sampled, rows, index, choose(logits.index_select(0, index), _take(batch, rows, index)))
        return sampled

    def _chooser_for(self, params: SamplingParams) -> _Chooser:
        if params.top_k > 0 or params.top_p < 1.0 or params.typical_p < 1.0:
            return _choose_filtered
        if params.do_sample:
            return _choose_drawn
        return self._choose_best if _changes_logits(params) else self._choose_plain

    def _choose_plain(self, logits: Tensor, batch: SamplingBatch) -> SampledTokens:
        """The most likely token of logits that nothing changes; the lowest id among equals."""
        token_ids, logprobs = self._kernels.most_likely(logits)
        top_tokens = {}
        if any(params.num_top_tokens for params in batch.params):
            best_logits = logits.gather(1, token_ids[:, None])[:, 0]
            top_tokens = _top_tokens(batch.params, logits, best_logits.double() - logprobs)
        return SampledTokens(token_ids, logprobs, logprobs.isfinite(), top_tokens)

    def _choose_best(self, logits: Tensor, batch: SamplingBatch) -> SampledTokens:
        """The most likely token; the lowest id among equals."""
        return self._choose_plain(_process(logits, batch), batch)


def _process(logits: Tensor, batch: SamplingBatch) -> Tensor:
    """Apply what changes logits over the whole vocabulary, and return them in float32; the input is left as it is."""
    logits = logits.float()
    device = logits.device
    biases = [params.logit_bias for params in batch.params]
    if any(biases):
        logits = apply_logit_bias(logits, biases)
    rows = [row for row, params in enumerate(batch.params) if needs_history(params)]
    if rows:
        index = torch.tensor(rows, device=device)
        adjusted = _adjust(logits.index_select(0, index), _take(batch, rows, index))
        logits = logits.index_copy(0, index, adjusted)
    temperatures = [params.temperature for params in batch.params]
    if any(temperature != 1.0 for temperature in temperatures):
        logits = apply_temperature(logits, torch.tensor(temperatures, dtype=torch.float32, device=device))
    return logits


def _adjust(logits: Tensor, batch: SamplingBatch) -> Tensor:
    """Apply marks and penalties: those that some row uses; for the others they are neutral."""
    history = batch.token_ids, batch.lengths
    watermarks = [params.watermark for params in batch.params]
    if any(watermark is not None for watermark in watermarks):
        previous = batch.token_ids.gather(1, batch.lengths[:, None] - 1)[:, 0]
        logits = apply_watermarks(logits, watermarks, previous)
    repetition = [params.repetition_penalty for params in batch.params]
    if any(penalty != 1.0 for penalty in repetition):
        penalties = torch.tensor(repetition, dtype=torch.float32, device=logits.device)
        logits = apply_repetition_penalty(logits, *history, penalties)
    frequency = [params.frequency_penalty for params in batch.params]
    if any(penalty != 0.0 for penalty in frequency):
        penalties = torch.tensor(frequency, dtype=torch.float32, device=logits.device)
        logits = apply_frequency_penalty(logits, *history, penalties)
    presence = [params.presence_penalty for params in batch.params]
    if any(penalty != 0.0 for penalty in presence):
        penalties = torch.tensor(presence, dtype=torch.float32, device=logits.device)
        num_prompt_tokens = torch.tensor(batch.num_prompt_tokens, device=logits.device)
        logits = apply_presence_penalty(logits, batch.token_ids, num_prompt_tokens, batch.lengths, penalties)
    return logits


_Chooser = Callable[[Tensor, SamplingBatch], SampledTokens]


def _choose_drawn(logits: Tensor, batch: SamplingBatch) -> SampledTokens:
    """A token drawn from the whole vocabulary."""
    logits, is_valid = shift_to_zero(_process(logits, batch))
    masses = masses_of(logits)
    token_ids = draw(masses, _uniforms_for(batch))
    top_tokens = {}
    if any(params.num_top_tokens for params in batch.params):
        top_tokens = _top_tokens(batch.params, logits, log_mass(total_mass(masses)))
    return SampledTokens(token_ids, _logprobs(logits, masses, token_ids), is_valid, top_tokens)


def _choose_filtered(logits: Tensor, batch: SamplingBatch) -> SampledTokens:
    """A token among those that top-k, top-p and typical-p leave.

    Each row is tried with few candidates; one for which they turn out to be too few goes on to the next size.
    """
    logits, is_valid = shift_to_zero(_process(logits, batch))
    total_masses = _total_masses(logits, batch)
    random_numbers = _uniforms_for(batch)
    sampled = _empty(len(batch.params), logits.device)
    sizes = [size for size in _NUM_CANDIDATES if size < logits.shape[-1]] + [logits.shape[-1]]
    rows: list[int] = []
    for size in sizes:
        rows += [row for row, params in enumerate(batch.params) if _first_size(params, sizes) == size]
        if not rows:
            continue
        index = torch.tensor(rows, device=logits.device)
        params = [batch.params[row] for row in rows]
        candidates = Candidates.select(logits.index_select(0, index), size)
        candidates, is_complete = _filter(candidates, total_masses[index], params)
        part = _choose_candidate(candidates, random_numbers[index], is_valid[index], params)
        _put(sampled, rows, index, part)
        if size < sizes[-1]:
            rows = [row for row, is_done in zip(rows, is_complete.tolist(), strict=True) if not is_done]
    return sampled


def _first_size(params: SamplingParams, sizes: list[int]) -> int:
    """The smallest number of candidates that may do."""
    return next((size for size in sizes if size > params.top_k), sizes[-1])


def _total_masses(logits: Tensor, batch: SamplingBatch) -> Tensor:
    """Mass of each row, float64 (num_rows,). Rows with top-k do not need it: candidates hold all that counts."""
    if all(params.top_k > 0 for params in batch.params):
        return torch.zeros(len(batch.params), dtype=torch.float64, device=logits.device)
    return total_mass(masses_of(logits))


def _filter(candidates: Candidates, total_masses: Tensor, params: list[SamplingParams]) -> tuple[Candidates, Tensor]:
    """Apply the filters that some row uses; the others' values are neutral.

    Returns:
        What is left, and for each row whether the same would be left of its whole vocabulary.
    """
    device, size = total_masses.device, candidates.logits.shape[-1]
    has_top_k = torch.tensor([p.top_k > 0 for p in params], device=device)
    # Where top-k is complete, nothing below the candidates counts any more.
    mass_below = (total_masses - total_mass(candidates.masses)).masked_fill_(has_top_k, 0)
    if any(p.top_k > 0 for p in params):
        top_k = [min(p.top_k, size) if p.top_k > 0 else size for p in params]
        candidates = candidates.keep_top_k(torch.tensor(top_k, device=device))
    # Judged after a row's first filter: the next works on what that one left.
    is_complete = candidates.is_least_massless
    if any(p.top_p < 1.0 for p in params):
        top_p = torch.tensor([p.top_p for p in params], dtype=torch.float64, device=device)
        candidates = candidates.keep_top_p(top_p, mass_below)
        is_complete = torch.where(has_top_k, is_complete, candidates.is_least_massless)
    if any(p.typical_p < 1.0 for p in params):
        typical_p = torch.tensor([p.typical_p for p in params], dtype=torch.float64, device=device)
        candidates = candidates.keep_typical(typical_p)
    return candidates, is_complete


def _choose_candidate(
    candidates: Candidates, random_numbers: Tensor, is_valid: Tensor, params: list[SamplingParams]
) -> SampledTokens:
    is_drawn = torch.tensor([p.do_sample for p in params], device=is_valid.device)
    # The first of the best: equal logits stand in order of id.
    left = candidates.logits.masked_fill(candidates.masses == 0, -torch.inf)
    best = left.argmax(-1)
    chosen = torch.where(is_drawn, draw(candidates.masses, random_numbers), best)
    token_ids = candidates.token_ids.gather(1, chosen[:, None])[:, 0]
    logprobs = _logprobs(candidates.logits, candidates.masses, chosen)
    top_tokens = {}
    if any(p.num_top_tokens for p in params):
        top_tokens = _top_tokens(params, left, log_mass(total_mass(candidates.masses)), candidates.token_ids)
    return SampledTokens(token_ids, logprobs, is_valid, top_tokens)


def _logprobs(logits: Tensor, masses: Tensor, chosen: Tensor) -> Tensor:
    return (logits.gather(1, chosen[:, None])[:, 0] - log_mass(total_mass(masses))).float()


def _top_tokens(
    params: list[SamplingParams], logits: Tensor, log_totals: Tensor, token_ids: Tensor | None = None
) -> dict[int, list[RankedToken]]:
    """The likeliest tokens of the rows that ask for them.

    Args:
        logits: (num_rows, num_tokens), -inf where a token cannot be chosen.
        log_totals: float64 (num_rows,): the log-probability of a token is its logit less this.
        token_ids: as in `likeliest_tokens`.
    """
    rows = [row for row, row_params in enumerate(params) if row_params.num_top_tokens]
    index = torch.tensor(rows, device=logits.device)
    logprobs = (logits.index_select(0, index) - log_totals[index][:, None]).float()
    counts = [params[row].num_top_tokens for row in rows]
    ids = None if token_ids is None else token_ids.index_select(0, index)
    return dict(zip(rows, likeliest_tokens(logprobs, counts, MAX_TOP_TOKENS, ids), strict=True))


def _uniforms_for(batch: SamplingBatch) -> Tensor:
    return uniforms([params.seed for params in batch.params], batch.lengths)


def _empty(num_rows: int, device: torch.device) -> SampledTokens:
    return SampledTokens(
        torch.empty(num_rows, dtype=torch.int64, device=device),
        torch.empty(num_rows, dtype=torch.float32, device=device),
        torch.empty(num_rows, dtype=torch.bool, device=device),
    )


def _take(batch: SamplingBatch, rows: list[int], index: Tensor) -> SamplingBatch:
    params = [batch.params[row] for row in rows]
    num_prompt_tokens = [batch.num_prompt_tokens[row] for row in rows]
    return SamplingBatch(params, batch.token_ids.index_select(0, index), batch.lengths[index], num_prompt_tokens)


def _put(sampled: SampledTokens, rows: list[int], index: Tensor, part: SampledTokens) -> None:
    sampled.token_ids[index] = part.token_ids
    sampled.logprobs[index] = part.logprobs
    sampled.is_valid[index] = part.is_valid
    sampled.top_tokens.update((rows[row], tokens) for row, tokens in part.top_tokens.items())
