"""Masks of guided sequences: exact beside free ones, after a restart, and where a grammar fails."""

import random
import re
from pathlib import Path

import pytest
import torch
from llguidance import LLMatcher
from tokenizers import Tokenizer

from bros_shard import demo_model
from bros_shard.grammar_compiler import GrammarCompiler
from bros_shard.guidance import GuidedSequences
from bros_shard.protocol import NewSequence, SamplingParams, StepPlan

TOKENIZER = Path(next(iter(demo_model.__path__))) / "tokenizer.json"
EOS_IDS = {0, 2}
#: Wider than the tokenizer, as models are.
VOCAB_SIZE = 4096 + 40
REGEX = "[ab]{3}(é|[0-9]+!)"
PROMPT = [5, 6, 7]


@pytest.fixture(scope="module")
def guided() -> GuidedSequences:
    return GuidedSequences(lambda: GrammarCompiler(TOKENIZER, VOCAB_SIZE, EOS_IDS))


def new(sequence_id: int, regex: str | None, generated: list[int] = []) -> NewSequence:  # noqa: B006
    grammar = None if regex is None else LLMatcher.grammar_from_regex(regex)
    return NewSequence(sequence_id, PROMPT + generated, 100, SamplingParams(), len(generated), grammar=grammar)


def masked(guided: GuidedSequences, sequence_ids: list[int], dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Logits of a step's rows, all 1 before the masks."""
    logits = torch.ones(len(sequence_ids), VOCAB_SIZE, dtype=dtype)
    masks = guided.begin_masks(sequence_ids)
    if masks is not None:
        masks.apply(logits)
    return logits


def allowed(guided: GuidedSequences, sequence_id: int) -> list[int]:
    return masked(guided, [sequence_id])[0].isfinite().nonzero()[:, 0].tolist()


@pytest.mark.parametrize("seed", range(8))
def test_any_walk_along_the_masks_is_a_match(guided, seed):
    generator, tokenizer = random.Random(seed), Tokenizer.from_file(str(TOKENIZER))
    guided.apply(StepPlan(0, 0, new_sequences=[new(1, REGEX), new(2, REGEX)]))
    token_ids: list[int] = []
    while True:
        choice = generator.choice(allowed(guided, 1))
        guided.advance(1, choice)
        if choice in EOS_IDS:
            break
        token_ids.append(choice)
        # A rank that is told of what was generated stands where this one does.
        guided.apply(StepPlan(0, 0, new_sequences=[new(3, REGEX, token_ids)]))
        assert allowed(guided, 3) == allowed(guided, 1)
        guided.apply(StepPlan(0, 0, releases=[3]))
        if len(token_ids) > 20 and set(allowed(guided, 1)) & EOS_IDS:
            break
    assert re.fullmatch(REGEX, tokenizer.decode(token_ids))
    allowed(guided, 1)  # the step that is in flight when the reply ends
    assert allowed(guided, 2) == allowed(guided, 2) != []
    guided.apply(StepPlan(0, 0, releases=[1, 2]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rows_without_a_grammar_are_left_alone(guided, dtype):
    guided.apply(StepPlan(0, 0, new_sequences=[new(1, None), new(2, "a"), new(3, None)]))
    logits = masked(guided, [3, 2, 1], dtype)
    assert (logits[0] == 1).all() and (logits[2] == 1).all()
    assert logits[1].isfinite().sum() == 1
    assert (logits[1] == 1).sum() == 1
    guided.apply(StepPlan(0, 0, releases=[1, 2, 3]))
    assert guided.begin_masks([1, 2, 3]) is None


def test_a_grammar_that_fails_forbids_every_token_of_its_sequence_alone(guided):
    broken = NewSequence(1, PROMPT, 100, SamplingParams(), grammar="{")
    astray = new(2, "abc", [19, 19, 19])
    guided.apply(StepPlan(0, 0, new_sequences=[broken, astray, new(3, "abc")]))
    logits = masked(guided, [1, 2, 3])
    assert [int(row.isfinite().sum()) for row in logits[:2]] == [0, 0]
    assert int(logits[2].isfinite().sum()) > 0
    assert not masked(guided, [1]).isfinite().any()
    guided.apply(StepPlan(0, 0, releases=[1, 2, 3]))


def test_a_rank_that_does_not_sample_guides_nothing():
    other = GuidedSequences(None)
    other.apply(StepPlan(0, 0, new_sequences=[new(1, REGEX)]))
    assert other.begin_masks([1]) is None
    other.advance(1, 5)
    other.apply(StepPlan(0, 0, releases=[1]))
