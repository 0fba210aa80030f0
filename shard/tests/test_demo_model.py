"""The demo model's files hang together, its output is not noise, and its training text is repeatable."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from tokenizers import Tokenizer

from bros_shard.demo_model import DIRECTORY, conversations
from bros_shard.demo_model.batches import Sampler, encode
from bros_shard.demo_model.checkpoint import (
    RunState,
    export_model,
    hugging_face_config,
    load_checkpoint,
    save_checkpoint,
)
from bros_shard.demo_model.corpus import Document, Kind, build_corpus
from bros_shard.demo_model.model import CausalLM, ModelConfig, fused_attention, grouped_attention
from bros_shard.demo_model.schedule import DECAY_FROM, Budget, learning_rate_factor, row_length
from bros_shard.demo_model.stdlib import clean_docstring, clean_source, is_table, parse_module
from bros_shard.demo_model.tokenizer import CHAT_TEMPLATE, EOS_TOKEN_IDS, SPECIAL_TOKENS
from bros_shard.demo_model.train import build_optimizers

MAX_WEIGHTS_BYTES = 16 * 1024 * 1024
#: Written for this test, in the manner of documentation.
SENTENCE = (
    "Return a new list containing all items from the given sequence. If the optional argument is not given, "
    "the function returns the default value. Raises a ValueError if the string is not found."
)
SMALL = ModelConfig(
    vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, head_dim=16, max_position_embeddings=64,
)  # fmt: skip
SAMPLE_MODULE = '''\
"""Queues of jobs.

Copyright (c) 2001 Somebody. All rights reserved.
"""

class Queue:
    """A first-in, first-out queue."""

    def put(self, item, *, timeout=None):
        """Add an item.

        Details:
            indented
        """
        return item

def helper(self):
    pass
'''


def read(name: str) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((DIRECTORY / name).read_text("utf-8"))
    return content


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.from_file(str(DIRECTORY / "tokenizer.json"))


@pytest.fixture(scope="module")
def auto_tokenizer() -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(DIRECTORY)


@pytest.fixture(scope="module")
def auto_model() -> Any:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(DIRECTORY, dtype="auto")
    return model.requires_grad_(False)


class TestFiles:
    def test_weights_are_small_bf16_and_exactly_those_the_config_describes(self) -> None:
        path = DIRECTORY / "model.safetensors"
        assert path.stat().st_size <= MAX_WEIGHTS_BYTES
        with torch.device("meta"):
            expected = {name: tensor.shape for name, tensor in CausalLM(ModelConfig()).state_dict().items()}
        with safe_open(path, framework="pt") as file:
            found = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a dict
        assert {name: tensor.shape for name, tensor in found.items()} == expected
        assert {tensor.dtype for tensor in found.values()} == {torch.bfloat16}
        assert all(tensor.isfinite().all() for tensor in found.values())

    def test_config_is_the_one_the_trainer_writes(self) -> None:
        assert read("config.json") == hugging_face_config(ModelConfig())

    def test_config_and_tokenizer_agree(self, tokenizer: Tokenizer) -> None:
        config = read("config.json")
        assert tokenizer.get_vocab_size() == config["vocab_size"]
        assert [tokenizer.token_to_id(token) for token in SPECIAL_TOKENS] == [0, 1, 2]
        assert config["eos_token_id"] == read("generation_config.json")["eos_token_id"] == list(EOS_TOKEN_IDS)
        assert read("tokenizer_config.json")["eos_token"] == SPECIAL_TOKENS[EOS_TOKEN_IDS[0]]
        assert read("tokenizer_config.json")["model_max_length"] == config["max_position_embeddings"]

    def test_heads_suit_tensor_parallelism_and_attention_kernels(self) -> None:
        config = read("config.json")
        assert config["head_dim"] % 16 == 0
        assert config["num_attention_heads"] % config["num_key_value_heads"] == 0
        assert config["num_key_value_heads"] % 2 == 0


class TestTokenizer:
    @given(text=st.text(max_size=200))
    @settings(max_examples=200, deadline=None)
    def test_round_trips_any_text(self, tokenizer: Tokenizer, text: str) -> None:
        assert tokenizer.decode(tokenizer.encode(text).ids, skip_special_tokens=False) == text

    def test_adds_no_special_tokens_of_its_own(self, tokenizer: Tokenizer) -> None:
        assert tokenizer.encode("").ids == []
        assert min(tokenizer.encode("Return a list.").ids) >= len(SPECIAL_TOKENS)

    def test_special_tokens_are_single_tokens_and_hidden_when_skipped(self, tokenizer: Tokenizer) -> None:
        ids = tokenizer.encode("a<|im_end|>b").ids
        assert ids[1] == 2
        assert tokenizer.decode(ids) == "ab"


class TestChatTemplate:
    def test_renders_a_conversation_as_the_training_did(self, auto_tokenizer: Any) -> None:
        messages = [
            {"role": "system", "content": "Answer briefly."},
            {"role": "user", "content": "What is a list?"},
            {"role": "assistant", "content": "A mutable sequence."},
        ]
        text = auto_tokenizer.apply_chat_template(messages, tokenize=False)
        assert text == conversations.render([("What is a list?", "A mutable sequence.")], "Answer briefly.")

    def test_generation_prompt_opens_the_answer(self, auto_tokenizer: Any) -> None:
        messages = [{"role": "user", "content": "Hi"}]
        text = auto_tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        assert text == "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"

    def test_keeps_the_text_of_chunks_and_accepts_empty_content(self, auto_tokenizer: Any) -> None:
        chunks = [{"type": "text", "text": "Hi"}, {"type": "image_url", "image_url": {"url": "x"}}]
        messages = [{"role": "user", "content": chunks}, {"role": "assistant", "content": None}]
        text = auto_tokenizer.apply_chat_template(messages, tokenize=False)
        assert text == "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n<|im_end|>\n"

    def test_the_file_holds_the_template_of_the_code(self) -> None:
        assert read("tokenizer_config.json")["chat_template"] == CHAT_TEMPLATE


class TestQuality:
    """Bounds far from the measured values: they catch broken files, not a slightly worse model."""

    def logits(self, model: Any, ids: list[int]) -> torch.Tensor:
        logits: torch.Tensor = model(torch.tensor([ids])).logits[0].float()
        return logits

    def test_predicts_documentation_far_better_than_chance(self, auto_model: Any, auto_tokenizer: Any) -> None:
        ids = [auto_tokenizer.eos_token_id, *auto_tokenizer(SENTENCE)["input_ids"]]
        logits, labels = self.logits(auto_model, ids[:-1]), torch.tensor(ids[1:])
        loss = torch.nn.functional.cross_entropy(logits, labels).item()
        accuracy = (logits.argmax(-1) == labels).float().mean().item()
        assert loss < 0.5 * math.log(auto_model.config.vocab_size)
        assert accuracy > 0.25

    def test_greedy_continuation_has_words_and_variety(self, auto_model: Any, auto_tokenizer: Any) -> None:
        encoded = auto_tokenizer("Return a list of the", return_tensors="pt")
        output = auto_model.generate(**encoded, max_new_tokens=24, do_sample=False)
        text = auto_tokenizer.decode(output[0, encoded["input_ids"].shape[1] :])
        assert len(set(text.split())) >= 6

    def test_a_full_context_is_no_worse_than_a_short_one(self, auto_model: Any, auto_tokenizer: Any) -> None:
        """The last tokens of a full context are predicted as well as with only their neighbours before them."""
        length, tail = auto_model.config.max_position_embeddings, 256
        text = (DIRECTORY / "conversations.py").read_text("utf-8")
        ids = auto_tokenizer(text, truncation=True, max_length=length)["input_ids"]
        assert len(ids) == length, "the sample must fill the context"
        labels = torch.tensor(ids[-tail:])
        long = self.logits(auto_model, ids[:-1])[-tail:]
        short = self.logits(auto_model, ids[-2 * tail : -1])[-tail:]
        cross_entropy = torch.nn.functional.cross_entropy
        assert cross_entropy(long, labels) < cross_entropy(short, labels) + 0.1


class TestCorpus:
    def write_sample(self, folder: Path) -> Path:
        (folder / "test").mkdir()
        (folder / "test" / "test_jobs.py").write_text(SAMPLE_MODULE)
        (folder / "jobs.py").write_text(SAMPLE_MODULE)
        (folder / "copies.py").write_text(SAMPLE_MODULE)
        (folder / "tables.py").write_text("TABLE = {\n" + "    1: 'one',\n" * 50 + "}\n")
        (folder / "broken.py").write_text("def (:\n")
        return folder

    def test_is_deterministic(self, tmp_path: Path) -> None:
        root = self.write_sample(tmp_path)
        assert build_corpus(root) == build_corpus(root)

    def test_leaves_out_tests_tables_and_what_does_not_parse(self, tmp_path: Path) -> None:
        origins = {document.origin for document in build_corpus(self.write_sample(tmp_path))}
        assert origins == {"jobs", "copies", "bros"}

    def test_documents_each_docstring_once(self, tmp_path: Path) -> None:
        corpus = build_corpus(self.write_sample(tmp_path))
        pages = [document.text for document in corpus if document.kind is Kind.REFERENCE]
        assert sum("A first-in, first-out queue." in page for page in pages) == 1

    def test_holds_back_whole_modules(self) -> None:
        origins = [f"package.module_{number}" for number in range(400)]
        documents = [Document(kind, origin, "") for origin in origins for kind in (Kind.SOURCE, Kind.CHAT)]
        held_out = {document.origin for document in documents if document.is_validation}
        trained = {document.origin for document in documents if not document.is_validation}
        assert not held_out & trained
        assert 5 < len(held_out) < 60

    def test_parses_definitions_with_their_names_signatures_and_sources(self) -> None:
        queue, put = parse_module("jobs", SAMPLE_MODULE).definitions
        assert (queue.name, queue.signature) == ("jobs.Queue", "")
        assert (put.name, put.signature) == ("jobs.Queue.put", "(item, *, timeout=None)")
        assert put.source.startswith("def put(self") and put.source.endswith("\n    return item")
        assert put.docstring == "Add an item.\n\nDetails:\n    indented"

    def test_drops_legal_notices(self) -> None:
        assert parse_module("jobs", SAMPLE_MODULE).docstring == "Queues of jobs."
        assert clean_docstring("Copyright (c) 2001 Somebody") == ""
        assert clean_source("# Licensed to nobody.\n# No warranty.\n\nx = 1\n") == "x = 1\n"

    def test_tells_tables_from_code(self) -> None:
        assert is_table("T = [\n" + "    ('a', 1),\n" * 9 + "]\n")
        assert not is_table(SAMPLE_MODULE)

    def test_conversations_ask_and_answer_from_the_docstring(self) -> None:
        (_, text), *_ = conversations.about_modules([parse_module("jobs", SAMPLE_MODULE)])
        assert text.startswith(("<|im_start|>user\n", "<|im_start|>system\n"))
        assert "Queues of jobs.<|im_end|>" in text


class TestTraining:
    def sampler(self, tokenizer: Tokenizer) -> Sampler:
        documents = [Document(Kind.SOURCE, str(number), f"x = {number}\n" * 9) for number in range(20)]
        return Sampler(documents, encode(tokenizer, documents), seed=1)

    def test_batches_repeat_and_resume(self, tokenizer: Tokenizer) -> None:
        device = torch.device("cpu")
        first, second = self.sampler(tokenizer), self.sampler(tokenizer)
        for _ in range(3):
            first.next_rows(4, 32, device)
        second.begin_pass(first.num_passes, first.length, first.num_rows)
        expected, found = first.next_rows(4, 32, device), second.next_rows(4, 32, device)
        assert torch.equal(expected.tokens, found.tokens)
        assert torch.equal(found.tokens[:, 1:], found.targets[:, :-1])

    def test_both_attentions_agree(self) -> None:
        generator = torch.Generator().manual_seed(0)
        q = torch.randn(2, 4, 24, 16, generator=generator)
        k, v = torch.randn(2, 2, 2, 24, 16, generator=generator)
        torch.testing.assert_close(grouped_attention(q, k, v), fused_attention(q, k, v), rtol=1e-4, atol=1e-4)

    def test_exported_model_computes_the_same_loss_in_transformers(self, tmp_path: Path) -> None:
        from transformers import AutoModelForCausalLM

        torch.manual_seed(0)
        model = CausalLM(SMALL)
        for parameter in model.parameters():
            torch.nn.init.normal_(parameter, std=0.2)
        export_model(model, tmp_path)
        exported: Any = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
        tokens = torch.randint(3, SMALL.vocab_size, (2, 33))
        expected = exported(tokens, labels=tokens).loss.item()
        assert model(tokens[:, :-1], tokens[:, 1:]).item() == pytest.approx(expected, rel=0.02)

    def test_learns_and_resumes_where_it_stopped(self, tmp_path: Path) -> None:
        torch.manual_seed(0)
        tokens = torch.randint(3, SMALL.vocab_size, (2, 17))
        model = CausalLM(SMALL)
        optimizers = build_optimizers(model)

        def step(model: CausalLM, optimizers: list[torch.optim.Optimizer]) -> float:
            loss = model(tokens[:, :-1], tokens[:, 1:])
            loss.backward()
            for optimizer in optimizers:
                optimizer.step()
                optimizer.zero_grad()
            value: float = loss.item()
            return value

        first_loss = step(model, optimizers)
        for _ in range(4):
            step(model, optimizers)
        save_checkpoint(tmp_path, model, optimizers, RunState(step=5))
        restored = CausalLM(SMALL)
        restored_optimizers = build_optimizers(restored)
        state = load_checkpoint(tmp_path, restored, restored_optimizers)
        assert state == RunState(step=5)
        expected = [step(model, optimizers) for _ in range(2)]
        assert [step(restored, restored_optimizers) for _ in range(2)] == pytest.approx(expected, rel=1e-3)
        assert expected[-1] < first_loss

    def test_schedule_warms_up_holds_and_falls_to_zero(self) -> None:
        assert learning_rate_factor(0.0, 0) < 0.1
        assert learning_rate_factor(DECAY_FROM, 1000) == 1.0
        assert learning_rate_factor(1.0, 1000) == 0.0
        lengths = [row_length(progress / 100) for progress in range(101)]
        assert lengths == sorted(lengths)
        assert lengths[-1] == ModelConfig().max_position_embeddings

    def test_a_budget_cut_short_goes_straight_to_the_decay(self) -> None:
        timed = Budget(seconds=1000.0, steps=None)
        timed.cut_short(elapsed_s=60.0, step=7)
        assert timed.progress(60.0, 7) == pytest.approx(DECAY_FROM)
        counted = Budget(seconds=1000.0, steps=100)
        counted.cut_short(elapsed_s=0.0, step=30)
        assert counted.progress(0.0, 30) == pytest.approx(DECAY_FROM)
        counted.cut_short(elapsed_s=0.0, step=40)
        assert counted.steps == 50
