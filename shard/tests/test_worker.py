"""A rank's tokens are transformers' tokens, whatever the batch, chunks, block directions, preemptions and ranks."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from bros_shard.kv_cache import KVCache
from bros_shard.protocol import (
    HostCopy,
    NewSequence,
    SamplingParams,
    SequenceStep,
    StepPlan,
    TailMove,
    encode,
)
from bros_shard.sequences import PlanError
from bros_shard.worker import NO_TOKEN_FAULT

MODELS = (
    "llama",
    "llama-tied",
    "llama-mha",
    "llama-mqa",
    "llama-biases",
    "llama-head-dim",
    "llama-gelu-eps",
    "llama-rope-linear",
    "llama-rope-dynamic",
    "llama-rope-llama3",
    "llama-rope-yarn",
    "mistral",
    "mistral-window",
    "qwen2",
    "qwen2-window",
    "qwen3",
    "qwen3-window-bias",
    "opt",
    "opt-350m-like",
    "opt-plain",
    "opt-no-final-norm",
)
FAMILIES = ("llama", "mistral-window", "qwen2-window", "qwen3", "opt-350m-like")


@pytest.mark.parametrize("name", MODELS)
def test_batch_of_ragged_prompts_equals_generate(name, reference, make_worker, scripted_router) -> None:
    expected = reference(name)
    assert all(len(set(output)) >= 8 for output in expected.outputs), "the model cannot tell right from wrong"
    router = scripted_router(make_worker(expected.path))
    for prompt in expected.prompts:
        router.add(prompt)
    assert router.run() == expected.outputs


@pytest.mark.parametrize("name", FAMILIES)
def test_one_sequence_at_a_time_equals_generate(name, reference, make_worker, scripted_router) -> None:
    expected = reference(name)
    worker = make_worker(expected.path)
    for prompt, output in zip(expected.prompts[:8], expected.outputs, strict=False):
        router = scripted_router(worker)
        router.add(prompt)
        assert router.run() == [output]


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("chunk_size", [5, 16])
def test_chunked_prefill_equals_generate(name, chunk_size, reference, make_worker, scripted_router) -> None:
    expected = reference(name)
    router = scripted_router(make_worker(expected.path), chunk_size)
    for prompt in expected.prompts:
        router.add(prompt)
    assert router.run() == expected.outputs


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("direction", ["reversed", "mixed"])
def test_direction_of_blocks_does_not_matter(name, direction, reference, make_worker, scripted_router) -> None:
    expected = reference(name)
    router = scripted_router(make_worker(expected.path), chunk_size=20)
    for prompt in expected.prompts:
        router.add(prompt, direction)
    assert router.run() == expected.outputs


@pytest.mark.parametrize("name", FAMILIES)
def test_two_classes_share_blocks_and_tails_move(name, reference, make_worker, scripted_router) -> None:
    expected = reference(name)
    router = scripted_router(make_worker(expected.path), chunk_size=16, shares_tails=True)
    for index, prompt in enumerate(expected.prompts):
        router.add(prompt, "forward" if index % 2 else "reversed")
    assert router.run() == expected.outputs
    assert router.num_moves >= 4


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("to_host", [False, True], ids=["recompute", "swap"])
def test_preemption_does_not_change_the_output(name, to_host, reference, make_worker, scripted_router) -> None:
    expected = reference(name)
    router = scripted_router(make_worker(expected.path, num_host_blocks=48), chunk_size=24)
    directions = ("forward", "reversed", "mixed")
    ids = [router.add(prompt, directions[i % 3]) for i, prompt in enumerate(expected.prompts)]
    for preempted in (ids[4:12:2], ids[5:11:3], ids[:3]):
        for _ in range(5):
            router.step()
        for sequence_id in preempted:
            router.preempt(sequence_id, to_host)
    assert router.run() == expected.outputs
