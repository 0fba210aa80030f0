"""`bros_shard.sampling.sampler`: TGI's stages in TGI's order against a plain reference, and rows on their own."""

from __future__ import annotations

import math
from collections import Counter
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from msgspec.structs import replace
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from bros_kernels.torch_kernels import TorchKernels
from bros_shard.protocol import SamplingParams, Watermark
from bros_shard.sampling.sampler import SampledTokens, Sampler, SamplingBatch, needs_history

INF = math.inf

devices = pytest.mark.parametrize(
    "device",
    [
        "cpu",
        pytest.param(
            "cuda", marks=[pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA")]
        ),
    ],
)


def sample(
    logits: Tensor,
    params: list[SamplingParams],
    histories: list[list[int]] | None = None,
    num_prompt_tokens: list[int] | None = None,
) -> SampledTokens:
    """Sample with these histories, all prompt unless told; without any, every row is at position 10."""
    if histories is None:
        token_ids, lengths = torch.zeros(len(params), 0, dtype=torch.int64), torch.full((len(params),), 10)
    else:
        width = max(len(history) for history in histories)
        token_ids = torch.tensor([history + [-1] * (width - len(history)) for history in histories])
        lengths = torch.tensor([len(history) for history in histories])
    device = logits.device
    return Sampler(TorchKernels(torch.float32)).sample(
        logits, SamplingBatch(params, token_ids.to(device), lengths.to(device), num_prompt_tokens or lengths.tolist())
    )


# --- the reference: one row, one token at a time ----------------------------------------------------------------------


class Ambiguous(Exception):
    """A filter's boundary falls within rounding of a token."""


def reference_logprobs(
    logits: list[float], params: SamplingParams, history: list[int], num_prompt_tokens: int, margin: float
) -> dict[int, float]:
    """Logprobs of the tokens that are left. Logits in float32, as specified; probabilities in float64.

    Raises `Ambiguous` where a probability comes closer than `margin` to a filter's boundary.
    """
    scores = np.array(logits, dtype=np.float32)
    for token_id, bias in params.logit_bias:
        scores[token_id] += np.float32(bias)
    if params.repetition_penalty != 1.0:
        penalty = np.float32(params.repetition_penalty)
        for token_id in set(history):
            scores[token_id] = scores[token_id] * penalty if scores[token_id] < 0 else scores[token_id] / penalty
    if params.frequency_penalty != 0.0:
        for token_id, count in Counter(history).items():
            scores[token_id] -= np.float32(params.frequency_penalty) / np.float32(len(history)) * np.float32(count)
    for token_id in set(history[num_prompt_tokens:]):
        scores[token_id] -= np.float32(params.presence_penalty)
    if params.temperature != 1.0:
        scores = (scores - scores.max()) / np.float32(params.temperature)
    left = {token_id: float(score) for token_id, score in enumerate(scores) if score > -INF}
    if params.top_k > 0:
        kth = sorted(left.values(), reverse=True)[min(params.top_k, len(left)) - 1]
        left = {token_id: score for token_id, score in left.items() if score >= kth}
    if params.top_p < 1.0:
        left = reference_top_p(left, params.top_p, margin)
    if params.typical_p < 1.0:
        left = reference_typical_p(left, params.typical_p, margin)
    return log_softmax(left)


def log_softmax(left: dict[int, float]) -> dict[int, float]:
    best = max(left.values())
    log_total = best + math.log(math.fsum(math.exp(score - best) for score in left.values()))
    return {token_id: score - log_total for token_id, score in left.items()}


def reference_top_p(left: dict[int, float], top_p: float, margin: float) -> dict[int, float]:
    logprobs = log_softmax(left)
    ascending = sorted(left, key=lambda token_id: (left[token_id], token_id))
    cumulative = 0.0
    for index, token_id in enumerate(ascending[:-1]):
        cumulative += math.exp(logprobs[token_id])
        if abs(cumulative - (1.0 - top_p)) < margin:
            raise Ambiguous
        if cumulative > 1.0 - top_p:
            return {kept: left[kept] for kept in ascending[index:]}
    return {ascending[-1]: left[ascending[-1]]}


def reference_typical_p(left: dict[int, float], typical_p: float, margin: float) -> dict[int, float]:
    logprobs = log_softmax(left)
    entropy = -math.fsum(math.exp(logprob) * logprob for logprob in logprobs.values())
    distances = {token_id: abs(-logprob - entropy) for token_id, logprob in logprobs.items()}
    nearest_first = sorted(left, key=lambda token_id: (distances[token_id], token_id))
    cumulative = 0.0
    for token_id in nearest_first:
        cumulative += math.exp(logprobs[token_id])
        if abs(cumulative - typical_p) < margin:
            raise Ambiguous
        if cumulative >= typical_p:
            break
    bound = distances[token_id]
    if any(abs(distances[other] - bound) < margin and left[other] != left[token_id] for other in left):
        raise Ambiguous
    return {other: score for other, score in left.items() if distances[other] <= bound or score == left[token_id]}


# --- the sampler against the reference --------------------------------------------------------------------------------

# Half precision: no two logits so close that the reference's logprobs are equal.
score = st.floats(-30.0, 30.0, width=16) | st.integers(-3, 3).map(float) | st.just(-INF)
score_rows = st.lists(score, min_size=1, max_size=30).filter(lambda row: max(row) > -INF)
sampling_params = st.builds(
    SamplingParams,
    do_sample=st.booleans(),
    temperature=st.sampled_from([1e-3, 0.1, 0.7, 1.0, 1.0, 2.0, 1e3]),
    top_k=st.sampled_from([0, 0, 1, 2, 5, 50]),
    top_p=st.just(1.0) | st.floats(1e-3, 1.0),
    typical_p=st.just(1.0) | st.floats(1e-3, 1.0),
    repetition_penalty=st.sampled_from([1.0, 1.0, 0.5, 1.3]),
    frequency_penalty=st.sampled_from([0.0, 0.0, -2.0, 0.5, 2.0]),
    presence_penalty=st.sampled_from([0.0, 0.0, -2.0, 0.5, 2.0]),
    logit_bias=st.sampled_from([[], [], [(0, 5.0)], [(0, -100.0)]]),
    num_top_tokens=st.sampled_from([0, 0, 1, 4]),
    seed=st.integers(0, 2**64 - 1),
)


def agrees_with_reference(
    tokens: SampledTokens,
    row: int,
    logits: list[float],
    params: SamplingParams,
    history: list[int],
    margin: float,
    num_prompt_tokens: int = 0,
) -> None:
    expected = reference_logprobs(logits, params, history, num_prompt_tokens, margin)
    token_id, logprob = int(tokens.token_ids[row]), float(tokens.logprobs[row])
    assert tokens.is_valid[row]
    assert token_id in expected
    assert logprob == pytest.approx(expected[token_id], rel=1e-5, abs=1e-5)
    if not params.do_sample:
        assert token_id == min(expected, key=lambda candidate: (-expected[candidate], candidate))
    lists_the_likeliest(tokens.top_tokens.get(row, []), expected, params.num_top_tokens)
    assert dict(tokens.top_tokens.get(row, [])).get(token_id, logprob) == logprob


def lists_the_likeliest(listed: list[tuple[int, float]], expected: dict[int, float], count: int) -> None:
    descending = sorted(expected.values(), reverse=True)
    nth = descending[min(count, len(descending)) - 1] if count else INF
    # A token of less than 2**-34 of the best one's probability counts as impossible to filters.
    certain = {i for i, logprob in expected.items() if logprob >= nth + 1e-4 and logprob > descending[0] - 23.0}
    assert certain <= {token_id for token_id, _ in listed}
    for token_id, logprob in listed:
        assert logprob == pytest.approx(expected[token_id], rel=1e-5, abs=1e-5)
        assert logprob >= nth - 1e-4 - 1e-5 * abs(nth)


@settings(max_examples=300)
@given(st.data())
def test_tokens_and_logprobs_are_those_of_the_reference(data: st.DataObject) -> None:
    logits = data.draw(score_rows)
    history_tokens = st.lists(st.integers(0, len(logits) - 1), min_size=1, max_size=12)
    params = data.draw(st.lists(sampling_params, min_size=1, max_size=6))
    histories = [data.draw(history_tokens) for _ in params]
    num_prompt_tokens = [data.draw(st.integers(0, len(history))) for history in histories]
    tokens = sample(torch.tensor([logits] * len(params)), params, histories, num_prompt_tokens)
    for row, (row_params, history) in enumerate(zip(params, histories, strict=True)):
        try:
            agrees_with_reference(tokens, row, logits, row_params, history, 1e-5, num_prompt_tokens[row])
        except Ambiguous:
            continue


@pytest.mark.parametrize(
    "params",
    [
        SamplingParams(do_sample=True, top_p=0.9),
        SamplingParams(do_sample=True, top_p=0.995, temperature=1.5),
        SamplingParams(do_sample=True, top_k=40),
        SamplingParams(do_sample=True, top_k=128),
        SamplingParams(do_sample=True, top_k=100, top_p=0.5),  # in "tied", more than 128 tie with the 100th
        SamplingParams(do_sample=True, top_k=2000, top_p=0.95),
        SamplingParams(do_sample=True, top_k=6000, typical_p=0.9),
        SamplingParams(do_sample=True, typical_p=0.5),
        SamplingParams(do_sample=True, top_p=0.9, typical_p=0.5),
        SamplingParams(top_p=0.9),
    ],
    ids=str,
)
@pytest.mark.parametrize("shape", ["steep", "medium", "flat", "tied"])
def test_any_number_of_candidates_gives_the_reference(params: SamplingParams, shape: str) -> None:
    generator = torch.Generator().manual_seed(17)
    noise = torch.randn(6001, generator=generator)
    ranks = torch.randperm(6001, generator=generator) + 1.0
    logits = {
        "steep": -3.0 * ranks.log() + noise,  # the first few tokens hold nearly everything
        "medium": -0.9 * ranks.log() + noise,  # a few thousand do
        "flat": 0.01 * noise,
        "tied": noise.round(),
    }[shape]
    rows = [replace(params, seed=seed, num_top_tokens=seed) for seed in range(8)]
    tokens = sample(logits.expand(8, -1), rows)
    for row, row_params in enumerate(rows):
        agrees_with_reference(tokens, row, logits.tolist(), row_params, [], margin=0.0)


def test_greedy_takes_the_lowest_of_equal_ids() -> None:
    logits = torch.tensor([[0.0, 5.0, 1.0, 5.0]])
    for params in (
        SamplingParams(),
        SamplingParams(temperature=2.0),
        SamplingParams(top_k=3),
        SamplingParams(top_p=0.9),
    ):
        assert sample(logits, [params]).token_ids.tolist() == [1]


def test_greedy_logprob_is_the_log_softmax() -> None:
    logits = torch.randn(5, 4099, generator=torch.Generator().manual_seed(3)) * 6
    tokens = sample(logits, [SamplingParams()] * 5)
    expected = logits.double().log_softmax(-1).max(-1)
    assert torch.equal(tokens.token_ids, expected.indices)
    torch.testing.assert_close(tokens.logprobs.double(), expected.values, rtol=0, atol=2e-6)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_logits_of_other_types_are_sampled_as_float32_and_left_as_they_are(dtype: torch.dtype) -> None:
    logits = torch.randn(4, 301, generator=torch.Generator().manual_seed(5)).to(dtype)
    before = logits.clone()
    params = [
        SamplingParams(),
        SamplingParams(do_sample=True, seed=1),
        SamplingParams(do_sample=True, top_p=0.8, seed=2),
        SamplingParams(temperature=0.5, repetition_penalty=1.2),
    ]
    histories = [[1], [2], [3], [4, 5]]
    tokens, expected = sample(logits, params, histories), sample(logits.float(), params, histories)
    assert torch.equal(tokens.token_ids, expected.token_ids)
    assert torch.equal(tokens.logprobs, expected.logprobs)
    assert torch.equal(logits, before)


def test_float32_logits_are_left_as_they_are() -> None:
    logits = torch.randn(3, 50, generator=torch.Generator().manual_seed(5))
    before = logits.clone()
    for params in (
        SamplingParams(repetition_penalty=2.0, frequency_penalty=1.0),
        SamplingParams(do_sample=True, temperature=0.5),
        SamplingParams(do_sample=True, top_k=5, typical_p=0.5),
    ):
        sample(logits, [params] * 3, [[1, 2], [3], [4]])
        assert torch.equal(logits, before)


def test_no_rows_give_no_tokens() -> None:
    tokens = sample(torch.zeros(0, 100), [])
    assert tokens.token_ids.shape == tokens.logprobs.shape == tokens.is_valid.shape == (0,)


@pytest.mark.parametrize(
    ("params", "expected"),
    [
        (SamplingParams(do_sample=True, temperature=0.5, top_k=3, top_p=0.5, typical_p=0.5, seed=9), False),
        (SamplingParams(logit_bias=[(3, 1.0)], num_top_tokens=5), False),
        (SamplingParams(presence_penalty=1.0), True),
        (SamplingParams(watermark=Watermark(0.5, 2.0)), True),
        (SamplingParams(repetition_penalty=1.1), True),
        (SamplingParams(frequency_penalty=-0.5), True),
    ],
)
def test_only_penalties_and_marks_need_history(params: SamplingParams, expected: bool) -> None:
    assert needs_history(params) is expected


# --- randomness -------------------------------------------------------------------------------------------------------

NUM_DRAWS = 20_000


def chi_square(token_ids: Tensor, probabilities: Tensor) -> float:
    expected = probabilities.double() * len(token_ids)
    counts = torch.bincount(token_ids, minlength=len(probabilities))
    assert not counts[expected == 0].any()
    terms = (counts - expected) ** 2 / expected
    return float(terms[expected > 0].sum())


@pytest.mark.parametrize("vary", ["seed", "position"])
@pytest.mark.parametrize("params", [SamplingParams(do_sample=True), SamplingParams(do_sample=True, top_k=15)], ids=str)
def test_draws_follow_the_processed_probabilities(params: SamplingParams, vary: str) -> None:
    logits = torch.linspace(0.0, 3.0, 20)[torch.randperm(20, generator=torch.Generator().manual_seed(1))]
    probabilities = logits.softmax(0)
    if params.top_k:
        probabilities = torch.where(logits >= logits.topk(15).values[-1], probabilities, 0.0)
        probabilities /= probabilities.sum()
    ascending = torch.arange(NUM_DRAWS)
    seeds = ascending.tolist() if vary == "seed" else [7] * NUM_DRAWS
    rows = [SamplingParams(do_sample=True, top_k=params.top_k, seed=seed) for seed in seeds]
    lengths = torch.full((NUM_DRAWS,), 3) if vary == "seed" else ascending
    batch = SamplingBatch(rows, torch.zeros(NUM_DRAWS, 0, dtype=torch.int64), lengths, [0] * NUM_DRAWS)
    tokens = Sampler(TorchKernels(torch.float32)).sample(logits.expand(NUM_DRAWS, -1), batch)
    assert chi_square(tokens.token_ids, probabilities) < 43.8  # 0.999 quantile, 19 degrees of freedom


def mixed_params() -> list[SamplingParams]:
    kinds: list[dict[str, Any]] = [
        {},
        {"do_sample": True},
        {"do_sample": True, "temperature": 0.7},
        {"do_sample": True, "top_p": 0.9, "temperature": 1.3},
        {"do_sample": True, "top_k": 20, "top_p": 0.95},
        {"do_sample": True, "top_k": 300},
        {"do_sample": True, "typical_p": 0.8},
        {"do_sample": True, "top_p": 0.95, "typical_p": 0.95},
        {"repetition_penalty": 1.3},
        {"do_sample": True, "frequency_penalty": 0.7, "repetition_penalty": 0.9},
        {"temperature": 3.0},
        {"top_k": 5, "frequency_penalty": -1.0},
        {"num_top_tokens": 3},
        {"do_sample": True, "num_top_tokens": 7, "presence_penalty": 1.5},
        {"do_sample": True, "top_k": 30, "num_top_tokens": 4, "logit_bias": [(3, 2.5), (256, -100.0)]},
        {"logit_bias": [(5, 30.0)]},
        {"watermark": Watermark(0.5, 2.0)},
        {"do_sample": True, "watermark": Watermark(0.25, 4.0), "top_p": 0.8, "repetition_penalty": 1.2},
    ]
    # Every kind with several seeds, and the full range of one.
    return [SamplingParams(**kinds[row % len(kinds)], seed=2**64 - 1 - row) for row in range(36)]


# Rows of an odd vocabulary start at any alignment; 65,537 is more than torch sums in one piece.
@devices
@pytest.mark.parametrize("vocab_size", [257, 4999, 65_537])
def test_a_row_gets_the_same_token_alone_and_in_any_batch(vocab_size: int, device: str) -> None:
    generator = torch.Generator().manual_seed(vocab_size)
    logits = (torch.randn(36, vocab_size, generator=generator) * 2).to(device)
    histories = [torch.randint(vocab_size, (1 + row,), generator=generator).tolist() for row in range(36)]
    params = mixed_params()
    together = sample(logits, params, histories)
    backwards = sample(logits.flip(0), params[::-1], histories[::-1])
    assert torch.equal(backwards.token_ids.flip(0), together.token_ids)
    for row in range(36):
        alone = sample(logits[row : row + 1].clone(), [params[row]], [histories[row]])
        assert torch.equal(alone.token_ids[0], together.token_ids[row])
        torch.testing.assert_close(
            alone.logprobs[0], together.logprobs[row], rtol=0, atol=0 if device == "cpu" else 1e-5
        )
        if device == "cpu":
            assert alone.top_tokens.get(0) == together.top_tokens.get(row)


class _Operations(TorchDispatchMode):
    """Writes down what PyTorch is asked to do."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.append(str(function))
        return function(*args, **(kwargs or {}))


def test_what_nobody_asks_for_costs_nothing() -> None:
    logits = torch.randn(4, 100)
    batch = SamplingBatch([SamplingParams()] * 4, torch.zeros(4, 0, dtype=torch.int64), torch.full((4,), 9), [9] * 4)
    kernels = TorchKernels(torch.float32)
    with _Operations() as needed:
        kernels.most_likely(logits)
        torch.zeros(4).isfinite()
    with _Operations() as done:
        Sampler(kernels).sample(logits, batch)
    assert len(done.names) == len(needed.names) - 1  # but for the zeros


def test_the_token_depends_on_seed_and_position() -> None:
    logits = torch.zeros(1, 1000)
    histories = [[0] * length for length in range(1, 40)]
    by_position = {int(sample(logits, [SamplingParams(do_sample=True)], [h]).token_ids) for h in histories}
    by_seed = {int(sample(logits, [SamplingParams(do_sample=True, seed=s)]).token_ids) for s in range(39)}
    assert len(by_position) > 30
    assert len(by_seed) > 30


# --- unusable rows ----------------------------------------------------------------------------------------------------

UNUSABLE = {"nan": [1.0, math.nan, 3.0], "inf": [1.0, INF, 3.0], "both": [math.nan, INF, -INF], "nothing": [-INF] * 3}


@devices
@pytest.mark.parametrize("kind", UNUSABLE)
def test_an_unusable_row_is_marked_and_leaves_the_others_alone(kind: str, device: str) -> None:
    generator = torch.Generator().manual_seed(11)
    logits = torch.randn(36, 700, generator=generator)
    if kind == "nothing":
        bad = torch.full((700,), -INF)
    else:
        bad = torch.randn(700, generator=generator)
        bad[[0, 350, 699]] = torch.tensor(UNUSABLE[kind])
    params = mixed_params()
    histories = [[1, 2, 3]] * 36
    clean = sample(logits.to(device), params, histories)
    assert clean.is_valid.all()
    for bad_row in range(18):  # each kind of parameters once
        spoilt = logits.clone()
        spoilt[bad_row] = bad
        tokens = sample(spoilt.to(device), params, histories)
        others = [row for row in range(36) if row != bad_row]
        assert tokens.is_valid.tolist() == [row != bad_row for row in range(36)]
        assert 0 <= int(tokens.token_ids[bad_row]) < 700
        assert torch.equal(tokens.token_ids[others], clean.token_ids[others])
        assert torch.equal(tokens.logprobs[others], clean.logprobs[others])


def test_one_possible_token_is_chosen_with_certainty() -> None:
    logits = torch.full((12, 333), -INF)
    logits[torch.arange(12), torch.arange(12) * 30] = -5.0
    tokens = sample(logits, mixed_params()[:12], [[7]] * 12)
    assert tokens.is_valid.all()
    assert tokens.token_ids.tolist() == [30 * row for row in range(12)]
    assert tokens.logprobs.tolist() == [0.0] * 12
