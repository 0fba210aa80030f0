"""A rank's tokens are transformers' tokens, whatever the batch, chunks, block directions, preemptions and ranks."""

from __future__ import annotations

import contextlib
import json
import math
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import bros_shard.worker as worker_module
from bros_kernels import reference_attention
from bros_kernels.kernels import UnknownKernelsError
from bros_kernels.reference_attention import ReferenceAttention
from bros_shard import speculation
from bros_shard.batch import StepBatch, build_batch
from bros_shard.host_pool import HostPool
from bros_shard.kv_cache import KVCache
from bros_shard.memory import InsufficientMemoryError
from bros_shard.protocol import (
    HostCopy,
    NewSequence,
    SamplingParams,
    SequenceStep,
    StepPlan,
    StepShape,
    TailMove,
)
from bros_shard.worker import NO_TOKEN_FAULT, Worker

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
    "mixtral",
    "mixtral-window",
    "qwen2-moe",
    "qwen2-moe-window",
    "qwen3-moe",
    "qwen3-moe-window",
    "gemma",
    "gemma-untied-biases",
    "gemma2",
    "gemma2-uncapped",
    "gemma3",
    "gemma3-capped",
    "phi3",
    "phi3-longrope",
    "starcoder2",
    "starcoder2-plain",
    "opt",
    "opt-350m-like",
    "opt-plain",
    "opt-no-final-norm",
    "falcon",
    "falcon-mha",
    "falcon-sequential",
    "falcon-new",
    "falcon-new-one-norm",
    "gpt2",
    "gpt2-scales",
    "gpt2-untied",
    "gpt-bigcode",
    "gpt-bigcode-mha",
    "gpt-neox",
    "gpt-neox-sequential",
)
#: Those that have no decoder of their own.
BORROWED = (
    "codegen",
    "cohere2",
    "deepseek-v3",
    "diffllama",
    "ernie4.5",
    "glm4",
    "gptj",
    "granite",
    "helium",
    "olmo2",
    "olmoe",
    "phi",
    "smollm3",
    "vaultgemma",
)
#: One of each family.
FAMILIES = (
    "llama",
    "mistral-window",
    "qwen2-window",
    "qwen3",
    "mixtral",
    "qwen2-moe",
    "qwen3-moe",
    "gemma",
    "gemma2",
    "gemma3",
    "phi3",
    "starcoder2",
    "opt-350m-like",
    "falcon",
    "falcon-new",
    "gpt2",
    "gpt-bigcode",
    "gpt-neox",
)
#: Those that attend differently, for what no other part of a model has to do with.
ATTENTIONS = ("llama", "mistral-window", "qwen2-window", "qwen3", "gemma2", "gpt-neox", "opt-350m-like")
BORROWED_ATTENTIONS = ("cohere2", "deepseek-v3", "diffllama", "vaultgemma")


@pytest.fixture(autouse=True)
def cache_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Step times are kept for the time of a test."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.mark.parametrize("kernels", ["auto", "torch"])
@pytest.mark.parametrize("name", [*MODELS, *BORROWED])
def test_batch_of_ragged_prompts_equals_generate(name, kernels, reference, make_worker, scripted_router) -> None:
    expected = reference(name)
    assert all(len(set(output)) >= 8 for output in expected.outputs), "the model cannot tell right from wrong"
    router = scripted_router(make_worker(expected.path, kernels=kernels))
    for prompt in expected.prompts:
        router.add(prompt)
    assert router.run() == expected.outputs


@pytest.mark.parametrize("name", ATTENTIONS)
def test_one_sequence_at_a_time_equals_generate(name, reference, make_worker, scripted_router) -> None:
    expected = reference(name)
    worker = make_worker(expected.path)
    for prompt, output in zip(expected.prompts[:8], expected.outputs, strict=False):
        router = scripted_router(worker)
        router.add(prompt)
        assert router.run() == [output]


@pytest.mark.parametrize("name", [*FAMILIES, *BORROWED_ATTENTIONS])
@pytest.mark.parametrize("chunk_size", [5, 16])
def test_chunked_prefill_equals_generate(name, chunk_size, reference, make_worker, scripted_router) -> None:
    expected = reference(name)
    router = scripted_router(make_worker(expected.path), chunk_size)
    for prompt in expected.prompts:
        router.add(prompt)
    assert router.run() == expected.outputs


@pytest.mark.parametrize("name", [*FAMILIES, *BORROWED_ATTENTIONS])
@pytest.mark.parametrize("direction", ["reversed", "mixed"])
def test_direction_of_blocks_does_not_matter(name, direction, reference, make_worker, scripted_router) -> None:
    expected = reference(name)
    router = scripted_router(make_worker(expected.path), chunk_size=20)
    for prompt in expected.prompts:
        router.add(prompt, direction)
    assert router.run() == expected.outputs


@pytest.mark.parametrize("name", [*ATTENTIONS, *BORROWED_ATTENTIONS])
def test_two_classes_share_blocks_and_tails_move(name, reference, make_worker, scripted_router) -> None:
    expected = reference(name)
    router = scripted_router(make_worker(expected.path), chunk_size=16, shares_tails=True)
    for index, prompt in enumerate(expected.prompts):
        router.add(prompt, "forward" if index % 2 else "reversed")
    assert router.run() == expected.outputs
    assert router.num_moves >= 4


@pytest.mark.parametrize("name", [*ATTENTIONS, *BORROWED_ATTENTIONS])
@pytest.mark.parametrize("to_host", [False, True], ids=["recompute", "swap"])
def test_preemption_does_not_change_the_output(name, to_host, reference, make_worker, scripted_router) -> None:
    expected = reference(name)
    router = scripted_router(make_worker(expected.path), chunk_size=24)
    directions = ("forward", "reversed", "mixed")
    ids = [router.add(prompt, directions[i % 3]) for i, prompt in enumerate(expected.prompts)]
    for preempted in (ids[4:12:2], ids[5:11:3], ids[:3]):
        for _ in range(5):
            router.step()
        for sequence_id in preempted:
            router.preempt(sequence_id, to_host)
    assert router.run() == expected.outputs


@pytest.mark.parametrize("name", [*ATTENTIONS, *BORROWED_ATTENTIONS])
def test_step_in_the_middle_of_another_changes_neither(name, reference, make_worker, scripted_router) -> None:
    expected = reference(name)
    router = scripted_router(make_worker(expected.path), chunk_size=16)
    for prompt in expected.prompts[:6]:
        router.add(prompt)
    router.arriving = [(prompt, None) for prompt in expected.prompts[:5:-1]]  # taken from the end
    assert router.run() == expected.outputs
    assert sum(plan.is_interruption for plan in router.plans) == 10


def test_time_of_other_steps_does_not_count_for_the_step_that_they_interrupt(reference, make_worker) -> None:
    worker = make_worker(reference("llama").path)
    assert worker.can_interrupt
    new = NewSequence(0, [5], 4, SamplingParams())
    plan = StepPlan(0, 0, [SequenceStep(0, 0, 1, 0, [0])], [new])
    output = worker.execute(plan, between_layers=lambda: 1000.0)
    assert output.interrupted_s == 3000.0  # three layers
    assert output.forward_s < 0.0  # it took less than what the others are said to have taken


@pytest.mark.parametrize("quantize", ["", "int8"])
@pytest.mark.parametrize("name", ["llama-head-dim", "qwen3-window-bias", "mixtral-window", "gemma2"])
def test_cpu_kernels_give_the_same_tokens_alone_and_in_any_batch(
    name, quantize, reference, make_worker, scripted_router
) -> None:
    """In bfloat16 they are not those of float32, but what runs beside a sequence changes no bit of it."""
    prompts = reference(name).prompts
    try:
        worker = make_worker(reference(name).path, kernels="cpu", dtype="bfloat16", quantize=quantize)
    except UnknownKernelsError as error:
        pytest.skip(str(error))
    alone = []
    for prompt in prompts:
        router = scripted_router(worker)
        router.add(prompt)
        alone += router.run()
    assert all(len(set(output)) >= 8 for output in alone), "the model cannot tell right from wrong"
    router = scripted_router(worker, chunk_size=16, shares_tails=True)
    for index, prompt in enumerate(prompts):
        router.add(prompt, "forward" if index % 2 else "reversed")
    for preempted, to_host in ((5, True), (6, False), (9, True)):
        for _ in range(4):
            router.step()
        router.preempt(preempted, to_host)
    assert router.run() == alone


@pytest.mark.parametrize(
    ("name", "kernels", "dtype"),
    [
        *((name, "auto", "float32") for name in ("llama", "qwen2-window", "gemma2", "gpt2")),
        ("llama", "torch", "float32"),
        ("llama", "cpu", "bfloat16"),
    ],
)
def test_guesses_change_nothing_but_the_number_of_steps(
    name, kernels, dtype, reference, make_worker, scripted_router, monkeypatch
) -> None:
    """Greedy with a penalty, which asks for the tokens before each; two out of three guesses are right."""
    prompts = reference(name).prompts
    try:
        worker = make_worker(reference(name).path, kernels=kernels, dtype=dtype)
    except UnknownKernelsError as error:
        pytest.skip(str(error))
    plain = scripted_router(worker)
    for prompt in prompts:
        plain.add(prompt)
    expected = plain.run()
    texts = [[*prompt, *output] for prompt, output in zip(prompts, expected, strict=True)]

    def guess(history: np.ndarray, num_tokens: int) -> list[int]:
        text = next(text for text in texts if text[: len(history)] == history.tolist())
        tokens = text[len(history) : len(history) + num_tokens]
        return [token if (len(history) + i) % 3 else 7 for i, token in enumerate(tokens)]

    monkeypatch.setattr(speculation, "guess_next", guess)
    router = scripted_router(worker, chunk_size=24, shares_tails=True, most_guesses=4)
    for index, prompt in enumerate(prompts):
        router.add(prompt, "forward" if index % 2 else "reversed")
    for preempted, to_host in ((5, True), (6, False), (9, True)):
        router.step()
        router.preempt(preempted, to_host)
    assert router.run() == expected
    assert router.num_moves >= 4
    assert router.num_guesses > router.num_confirmed > len(texts) * 4


@pytest.mark.parametrize(("name", "world_size"), [*((name, 2) for name in FAMILIES), ("qwen3-window-bias", 4)])
def test_ranks_together_equal_one(name, world_size, reference, make_worker, scripted_router, run_ranks) -> None:
    """Real processes. With 4 ranks, pairs of them hold the same of the 2 key-value heads."""
    expected = reference(name)
    worker = make_worker(expected.path)
    router = scripted_router(worker, chunk_size=24, shares_tails=True)
    for index, prompt in enumerate(expected.prompts):
        router.add(prompt, "forward" if index % 2 else "reversed")
    for _ in range(4):
        router.step()
    router.preempt(5, to_host=True)
    router.preempt(6)
    assert router.run() == expected.outputs

    outputs = run_ranks(worker.options, world_size, router.plans)
    assert [outputs[str(index)] for index in range(len(expected.prompts))] == expected.outputs


@pytest.mark.parametrize("name", ["llama-biases", "qwen2-moe", "gemma2", "gpt2"])
@pytest.mark.parametrize("world_size", [1, 2])
def test_int8_of_the_cpu_kernels_gives_the_tokens_of_pytorch(
    name, world_size, reference, make_worker, scripted_router, run_ranks
) -> None:
    """In float32, so that nothing but the rounding to int8, which is exact, could tell them apart."""
    outputs = []
    for kernels in ("torch", "cpu"):
        try:
            worker = make_worker(reference(name).path, kernels=kernels, quantize="int8")
        except UnknownKernelsError as error:
            pytest.skip(str(error))
        router = scripted_router(worker, chunk_size=24, shares_tails=True)
        for index, prompt in enumerate(reference(name).prompts):
            router.add(prompt, "forward" if index % 2 else "reversed")
        outputs.append(router.run())
        if world_size > 1:
            ranks_outputs = run_ranks(worker.options, world_size, router.plans)
            outputs[-1] = [ranks_outputs[str(index)] for index in range(len(outputs[-1]))]
    assert outputs[0] == outputs[1]
    assert outputs[0] != reference(name).outputs, "int8 changed nothing"


def test_ranks_agree_on_what_rank_0_remembers(reference, make_worker, run_ranks, cache_home) -> None:
    options = make_worker(reference("llama").path).options
    assert run_ranks(options, 2, []) == {}
    (kept,) = cache_home.rglob("*.json")
    content = kept.read_bytes()
    assert run_ranks(options, 2, []) == {}
    assert kept.read_bytes() == content


def _flip_rotation(monkeypatch: pytest.MonkeyPatch) -> None:
    rotate = reference_attention.rotate
    monkeypatch.setattr(reference_attention, "rotate", lambda x, cos, sin: rotate(x, cos, -sin))


def _shift_positions_of_decodes(monkeypatch: pytest.MonkeyPatch) -> None:
    def shifted(*arguments: Any) -> StepBatch:
        batch = build_batch(*arguments)
        batch.positions[: batch.attention.n_decode] += 1
        return batch

    monkeypatch.setattr(worker_module, "build_batch", shifted)


def _skip_tail_moves(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(KVCache, "move_tails", lambda self, moves: None)


def _skip_copies_in(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(HostPool, "copy_in", lambda self, copies: None)


def _widen_windows(monkeypatch: pytest.MonkeyPatch) -> None:
    groups_of = ReferenceAttention._groups_of
    monkeypatch.setattr(ReferenceAttention, "_groups_of", lambda self, window: groups_of(self, window and window + 1))


def _forget_score_caps(monkeypatch: pytest.MonkeyPatch) -> None:
    attend = reference_attention._softmax_attention
    monkeypatch.setattr(
        reference_attention,
        "_softmax_attention",
        lambda q, k, v, group, layer: attend(q, k, v, group, replace(layer, softcap=None)),
    )


@pytest.mark.parametrize(
    ("name", "plant"),
    [
        ("llama", _flip_rotation),
        ("llama", _shift_positions_of_decodes),
        ("opt-350m-like", _shift_positions_of_decodes),
        ("llama", _skip_tail_moves),
        ("llama", _skip_copies_in),
        ("mistral-window", _widen_windows),
        ("gemma2", _widen_windows),
        ("gemma2", _forget_score_caps),
    ],
)
def test_these_tests_notice_a_planted_fault(name, plant, reference, make_worker, scripted_router, monkeypatch) -> None:
    expected = reference(name)
    plant(monkeypatch)
    router = scripted_router(make_worker(expected.path, kernels="torch"), chunk_size=16, shares_tails=True)
    for index, prompt in enumerate(expected.prompts):
        router.add(prompt, "forward" if index % 2 else "reversed")
    outputs = None
    with contextlib.suppress(AssertionError):  # the router's own: a sequence read a slot that nobody wrote
        for _ in range(4):
            router.step()
        router.preempt(6, to_host=True)
        outputs = router.run()
    assert outputs != expected.outputs


def test_nan_of_one_sequence_is_its_own_fault(reference, make_worker) -> None:
    expected = reference("llama")
    worker = make_worker(expected.path)
    prompts = expected.prompts[:4]
    new = [NewSequence(i, prompt, 64, SamplingParams()) for i, prompt in enumerate(prompts)]
    steps = [SequenceStep(i, 0, len(prompt), 0, [i]) for i, prompt in enumerate(prompts)]
    healthy = worker.execute(StepPlan(0, 0, sequences=steps, new_sequences=new)).sequences
    worker.cache.region[0, 0, 2, 1] = float("nan")  # a key of sequence 2
    steps = [SequenceStep(i, len(prompt), 1, 1, []) for i, prompt in enumerate(prompts)]
    broken = worker.execute(StepPlan(0, 1, sequences=steps)).sequences
    assert all(len(result.tokens) == 1 and result.fault is None for result in healthy)
    assert [result.fault for result in broken] == [None, None, NO_TOKEN_FAULT, None]
    assert [len(result.tokens) for result in broken] == [1, 1, 0, 1]


def test_only_a_run_that_ends_at_the_last_known_token_is_sampled(reference, make_worker) -> None:
    worker = make_worker(reference("llama").path)
    new = [NewSequence(0, [1] * 20, 30, SamplingParams()), NewSequence(1, [2] * 5, 30, SamplingParams())]
    chunk = [SequenceStep(0, 0, 16, 0, [3, 4]), SequenceStep(1, 0, 5, 0, [5])]
    first = worker.execute(StepPlan(0, 0, sequences=chunk, new_sequences=new)).sequences
    rest = worker.execute(StepPlan(0, 1, sequences=[SequenceStep(0, 16, 4, 2, [])])).sequences
    assert [len(result.tokens) for result in first] == [0, 1]
    assert first[0].fault is None
    assert [len(result.tokens) for result in rest] == [1]


def test_logprobs_are_those_of_transformers(reference, make_worker) -> None:
    expected = reference("qwen3")
    worker = make_worker(expected.path)
    for index, prompt in enumerate(expected.prompts[:6]):
        with torch.inference_mode():
            logprobs = expected.model(torch.tensor([prompt])).logits[0, -1].log_softmax(-1)
        step = SequenceStep(index, 0, len(prompt), 0, [0, 1, 2, 3])
        new = NewSequence(index, prompt, 100, SamplingParams())
        (result,) = worker.execute(StepPlan(0, index, sequences=[step], new_sequences=[new])).sequences
        (token,) = result.tokens
        assert token.token_id == int(logprobs.argmax())
        assert token.logprob == pytest.approx(float(logprobs.max()), abs=2e-5)


def test_copies_run_out_then_tails_then_in(reference, make_worker) -> None:
    """Each copy overwrites what the one before it read."""
    worker = make_worker(reference("llama").path)
    region, host = worker.cache.region, worker.cache.host_pool.blocks
    for block in range(3):
        region[:, :, block] = block
    host.fill_(9)
    plan = StepPlan(
        0,
        0,
        copies_out=[HostCopy(1, 0, 16)],
        tail_moves=[TailMove(0, 1, 16)],
        copies_in=[HostCopy(0, 1, 16), HostCopy(2, 0, 16)],
    )
    assert worker.execute(plan).sequences == []
    assert [float(region[:, :, block].unique()) for block in range(3)] == [9, 0, 1]


def test_region_is_zero_and_sized_by_bytes_then_slots(reference, make_worker) -> None:
    path = reference("llama").path
    block_bytes = 2 * 3 * 16 * 2 * 16 * 4  # keys and values, layers, slots, heads, head size, float32
    by_bytes = make_worker(path, kv_memory_bytes=10 * block_bytes + 5, kv_slots_limit=0)
    by_slots = make_worker(path, kv_slots_limit=100)
    assert by_bytes.block_bytes == block_bytes
    assert (by_bytes.num_blocks, by_slots.num_blocks) == (10, 6)
    measured = Worker(replace(by_slots.options, kv_memory_bytes=0))
    assert measured.num_blocks == 6
    assert not measured.cache.region.any()
    with pytest.raises(InsufficientMemoryError, match="hold no KV block"):
        make_worker(path, kv_memory_bytes=block_bytes - 1)


def test_what_hello_says(reference, make_worker) -> None:
    worker = make_worker(reference("opt").path)
    assert (worker.vocab_size, worker.max_length, worker.num_blocks) == (131, 128, 64)
    assert (worker.dtype_name, worker.device_name) == ("float32", "cpu")
    assert make_worker(reference("llama").path, max_length=99).max_length == 99


@pytest.mark.parametrize(
    ("made_in", "asked_for", "served_in"),
    [
        ("float32", "auto", "float32"),
        ("bfloat16", "auto", "bfloat16"),
        ("float16", "auto", "bfloat16"),
        ("float16", "float16", "float16"),
        ("float32", "bfloat16", "bfloat16"),
    ],
)
def test_dtype_on_a_cpu(made_in, asked_for, served_in, reference, make_worker, tmp_path) -> None:
    path = reference("llama").path
    shutil.copytree(path, tmp_path, dirs_exist_ok=True)
    config = json.loads((path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"dtype": made_in}))
    assert make_worker(tmp_path, dtype=asked_for, device="cpu").dtype_name == served_in


def test_warm_up_measures_steps_and_leaves_nothing(reference, make_worker, scripted_router) -> None:
    expected = reference("llama")
    progress: list[tuple[str, int, int]] = []
    worker = make_worker(expected.path, on_progress=lambda *report: progress.append(report), max_batch_tokens=48)
    points = worker.warm_up()
    assert all(seconds > 0 for _, seconds in points)
    shapes = [shape for shape, _ in points]
    assert StepShape(num_decode_sequences=1, decode_context_tokens=64) in shapes
    assert StepShape(48, 1, 0, 48 * 24) in shapes
    assert all(shape.num_prefill_tokens <= 48 and shape.num_decode_sequences <= 48 for shape in shapes)
    assert [phase for phase, _, _ in progress] == sorted(phase for phase, _, _ in progress)
    assert progress[-1][1] == progress[-1][2]
    assert any(shape.num_copied_tokens > 0 for shape in shapes)
    router = scripted_router(worker)
    router.add(expected.prompts[3])
    assert router.run() == [expected.outputs[3]]


def test_a_second_start_measures_nothing_and_says_the_same(reference, make_worker, monkeypatch) -> None:
    monkeypatch.setattr(worker_module, "_LARGEST_CHANGE", math.inf)  # however busy the machine is by then
    path = reference("llama").path
    first = make_worker(path).warm_up()
    assert make_worker(path).warm_up() == first
    assert make_worker(path, block_size=32).warm_up() != first
    full = make_worker(path, profile_grid="full").warm_up()
    assert len(full) > len(first)
    assert make_worker(path).warm_up() == full


def test_step_times_that_no_longer_hold_are_measured_anew(reference, make_worker, cache_home) -> None:
    path = reference("llama").path
    first = make_worker(path).warm_up()
    (kept,) = cache_home.rglob("*.json")
    measured = json.loads(kept.read_bytes())
    slow = [[shape, 1000.0 * seconds] for shape, seconds in measured["points"]]
    kept.write_text(json.dumps(measured | {"points": slow}))
    second = make_worker(path).warm_up()
    assert sum(seconds for _, seconds in second) < 500 * sum(seconds for _, seconds in first)
    assert json.loads(kept.read_bytes())["points"] != slow


def test_host_pool_is_sized_by_bytes_or_as_the_region(reference, make_worker) -> None:
    path = reference("llama").path
    block_bytes = make_worker(path).block_bytes
    assert make_worker(path, host_memory_bytes=5 * block_bytes + 1).cache.num_host_blocks == 5
    assert make_worker(path).cache.num_host_blocks == 64
    assert make_worker(path, host_memory_bytes=-1).cache.num_host_blocks == 0
