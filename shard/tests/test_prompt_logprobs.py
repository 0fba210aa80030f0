"""`bros_shard.prompt_logprobs`: what a forward pass of `transformers` says, however the prompt came to be computed."""

from __future__ import annotations

import pytest
import torch

import bros_shard.prompt_logprobs as prompt_logprobs_module
from bros_shard.protocol import NewSequence, SamplingParams, SequenceStep, StepPlan


def expected_logprobs(model, prompt: list[int]) -> torch.Tensor:
    """Log-softmax at each position but the first, (len(prompt) - 1, vocab_size)."""
    with torch.inference_mode():
        return model(torch.tensor([prompt])).logits[0, :-1].float().log_softmax(-1)


def check(router, model, sequence_id: int, prompt: list[int], num_top: int) -> None:
    expected = expected_logprobs(model, prompt)
    told = router.prompts.get(sequence_id, {})
    assert sorted(told) == list(range(1, len(prompt)))
    for position, items in told.items():
        row = expected[position - 1]
        for logprob, top in items:
            assert logprob == pytest.approx(float(row[prompt[position]]), abs=1e-4)
            values = row.topk(num_top).values if num_top else torch.empty(0)
            assert [value for _, value in top] == pytest.approx(values.tolist(), abs=1e-4)
            assert all(value == pytest.approx(float(row[token_id]), abs=1e-4) for token_id, value in top)


@pytest.mark.parametrize("name", ["llama", "gemma2", "opt-350m-like", "gpt-neox"])
@pytest.mark.parametrize("num_top", [0, 3])
def test_prompts_in_chunks_beside_others(name, num_top, reference, make_worker, scripted_router, monkeypatch) -> None:
    monkeypatch.setattr(prompt_logprobs_module, "_MAX_LOGITS_BYTES", 4 * 131 * 7)  # seven rows at a time
    expected = reference(name)
    router = scripted_router(make_worker(expected.path), chunk_size=20)
    prompts = expected.prompts
    for i, prompt in enumerate(prompts):
        router.add(prompt, "mixed", num_prompt_top_tokens=num_top if i % 2 == 0 else None)
    assert router.run() == expected.outputs
    assert {*router.prompts} <= {*range(0, len(prompts), 2)}
    for i in range(0, len(prompts), 2):
        check(router, expected.model, i, prompts[i], num_top)


@pytest.mark.parametrize("to_host", [False, True], ids=["recompute", "swap"])
def test_preempted_prompts_are_told_again_alike(to_host, reference, make_worker, scripted_router) -> None:
    expected = reference("llama")
    router = scripted_router(make_worker(expected.path), chunk_size=10)
    ids = [router.add(prompt, num_prompt_top_tokens=2) for prompt in expected.prompts]
    for _ in range(2):  # amid the longer prompts
        router.step()
    for sequence_id in ids[5:]:
        router.preempt(sequence_id, to_host)
    for _ in range(9):  # behind them
        router.step()
    for sequence_id in ids[:12]:
        router.preempt(sequence_id, to_host)
    assert router.run() == expected.outputs
    for sequence_id, prompt in zip(ids, expected.prompts, strict=True):
        check(router, expected.model, sequence_id, prompt, 2)
    most_told = max(len(items) for told in router.prompts.values() for items in told.values())
    assert most_told == (1 if to_host else 3)


def test_what_was_generated_before_a_restart_is_no_prompt(reference, make_worker) -> None:
    expected = reference("llama")
    token_ids = expected.prompts[3] + expected.outputs[3]
    new = NewSequence(0, token_ids, 64, SamplingParams(), num_generated_tokens=16, num_prompt_top_tokens=0)
    worker = make_worker(expected.path)
    output = worker.execute(StepPlan(0, 0, [SequenceStep(0, 0, len(token_ids), 0, [0, 1])], [new]))
    (told,) = output.prompts
    row = expected_logprobs(expected.model, expected.prompts[3])
    values = row.gather(1, torch.tensor(expected.prompts[3])[1:, None])[:, 0]
    assert told.first_position == 1
    assert told.logprobs == pytest.approx(values.tolist(), abs=1e-4)
    assert told.top_tokens == []
