"""`bros_shard.sampling.watermark`: the lists of TGI and `transformers`, and a mark that its statistic finds."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from transformers import WatermarkLogitsProcessor

from bros_kernels.torch_kernels import TorchKernels
from bros_shard.protocol import SamplingParams, Watermark
from bros_shard.sampling.sampler import Sampler, SamplingBatch
from bros_shard.sampling.watermark import apply_watermarks, green_token_ids

CPU = torch.device("cpu")


@pytest.mark.parametrize("gamma", [0.25, 0.5, 0.9])
@pytest.mark.parametrize("previous", [0, 1, 17, 150_000])
def test_lists_and_bias_are_those_of_transformers(gamma: float, previous: int) -> None:
    logits = torch.randn(1, 331, generator=torch.Generator().manual_seed(2))
    processor = WatermarkLogitsProcessor(
        vocab_size=331, device="cpu", greenlist_ratio=gamma, bias=2.0, hashing_key=15485863, seeding_scheme="lefthash"
    )
    expected = processor(torch.tensor([[3, previous]]), logits.clone())
    marked = apply_watermarks(logits, [Watermark(gamma, 2.0)], torch.tensor([previous]))
    assert torch.equal(marked, expected)


def test_green_tokens_written_out() -> None:
    """As TGI computes them: `torch.randperm` of a generator that is seeded with 15485863 times the token before."""
    assert green_token_ids(7, 12, 0.5, CPU).tolist() == [9, 1, 8, 7, 6, 3]
    assert green_token_ids(0, 12, 0.25, CPU).tolist() == [8, 0, 5]


def test_rows_without_a_mark_and_the_input_are_left_as_they_are() -> None:
    logits = torch.randn(3, 50, generator=torch.Generator().manual_seed(2))
    before = logits.clone()
    marked = apply_watermarks(logits, [None, Watermark(0.5, 1.0), None], torch.tensor([1, 2, 3]))
    assert torch.equal(logits, before)
    assert torch.equal(marked[[0, 2]], before[[0, 2]])
    assert (marked[1] - before[1]).count_nonzero() == 25


def test_the_statistic_of_the_paper_finds_the_mark_and_nothing_else() -> None:
    def z_score(watermark: Watermark | None) -> float:
        sampler, vocab_size, gamma = Sampler(TorchKernels(torch.float32)), 400, 0.5
        token_ids = [5]
        for position in range(1, 201):
            params = SamplingParams(do_sample=True, seed=3, watermark=watermark)
            history = torch.tensor([token_ids])
            batch = SamplingBatch([params], history, torch.tensor([position]), [1])
            token_ids.append(int(sampler.sample(torch.zeros(1, vocab_size), batch).token_ids))
        pairs = itertools.pairwise(token_ids)
        num_green = sum(token in green_token_ids(before, vocab_size, gamma, CPU).tolist() for before, token in pairs)
        return (num_green - gamma * 200) / math.sqrt(200 * gamma * (1 - gamma))

    assert z_score(Watermark(0.5, 2.0)) > 8
    assert abs(z_score(None)) < 3
