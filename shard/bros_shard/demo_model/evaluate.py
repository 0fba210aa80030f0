"""Measures the finished files, loaded as any user would load them: held-out loss, loss by position, samples.

    python -m bros_shard.demo_model.evaluate

It prints the tables and samples of docs/demo-model.md, and shares no model code with the training.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, Final

import torch
import torch.nn.functional as F
from transformers import AutoModelForCausalLM, AutoTokenizer

from bros_shard.demo_model import DIRECTORY
from bros_shard.demo_model.corpus import Document, Kind, build_corpus

SEED: Final = 7
MAX_NEW_TOKENS: Final = 90
#: Loss by position is reported for [0, 256), [256, 512), ...: it must not rise beyond the training lengths.
POSITION_EDGES: Final = (0, 64, 256, 512, 1024, 2048)
PROMPTS: Final = (
    "Return a list of the",
    "# Reading files\n\nThe module provides",
    "def read_lines(path):\n",
    "class Queue:\n",
)
QUESTIONS: Final = ("Who are you?", "What does os.path.join do?", "Write a function that reads a file.")


@dataclass
class Score:
    """A sum of losses, in nats, over tokens and over the bytes that they spell."""

    nats: float = 0.0
    num_tokens: int = 0
    num_bytes: int = 0

    def add(self, losses: torch.Tensor, num_bytes: int) -> None:
        self.nats += losses.sum().item()
        self.num_tokens += losses.numel()
        self.num_bytes += num_bytes

    def __str__(self) -> str:
        bits_per_byte = self.nats / math.log(2) / self.num_bytes
        return f"{self.num_tokens} tokens, {self.nats / self.num_tokens:.3f} nats/token, {bits_per_byte:.3f} bits/byte"


class Evaluator:
    """The files of a folder, through transformers."""

    def __init__(self, folder: Path) -> None:
        self.tokenizer: Any = AutoTokenizer.from_pretrained(folder)
        self.model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype="auto")
        self.model.requires_grad_(False)
        self.max_length: int = self.model.config.max_position_embeddings

    @torch.inference_mode()
    def token_losses(self, document: Document) -> Iterator[torch.Tensor]:
        """Loss of each token of each window; the first of a window has the end-of-text token before it."""
        ids = self.tokenizer(document.text)["input_ids"]
        for start in range(0, len(ids), self.max_length - 1):
            window = torch.tensor([self.tokenizer.eos_token_id, *ids[start : start + self.max_length - 1]])
            logits = self.model(window[None, :-1]).logits[0].float()
            yield F.cross_entropy(logits, window[1:], reduction="none")

    @torch.inference_mode()
    def generate(self, prompt: str, do_sample: bool) -> str:
        """The continuation alone. Sampled at temperature 0.7, top-p 0.95."""
        torch.manual_seed(SEED)
        encoded = self.tokenizer(prompt, return_tensors="pt")
        how = {"do_sample": True, "temperature": 0.7, "top_p": 0.95} if do_sample else {"do_sample": False}
        output = self.model.generate(**encoded, max_new_tokens=MAX_NEW_TOKENS, **how)
        text: str = self.tokenizer.decode(output[0, encoded["input_ids"].shape[1] :], skip_special_tokens=True)
        return text

    def ask(self, question: str, do_sample: bool) -> str:
        messages = [{"role": "user", "content": question}]
        prompt = self.tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
        return self.generate(prompt, do_sample)


def score(evaluator: Evaluator, documents: Iterable[Document]) -> tuple[dict[Kind, Score], dict[int, Score]]:
    """Held-out loss by kind of document, and by position in documents long enough to fill every bucket."""
    by_kind: dict[Kind, Score] = {}
    by_position = {edge: Score() for edge in POSITION_EDGES[:-1]}
    for document in documents:
        num_bytes = len(document.text.encode())
        losses = list(evaluator.token_losses(document))
        by_kind.setdefault(document.kind, Score()).add(torch.cat(losses), num_bytes)
        for window in losses:
            if len(window) == evaluator.max_length - 1:
                for start, end in pairwise(POSITION_EDGES):
                    by_position[start].add(window[start:end], 1)
    return by_kind, by_position


def print_scores(evaluator: Evaluator) -> None:
    held_out = [document for document in build_corpus() if document.is_validation]
    by_kind, by_position = score(evaluator, held_out)
    for kind, value in by_kind.items():
        print(f"{kind.label}: {value}")
    total = Score(
        sum(value.nats for value in by_kind.values()),
        sum(value.num_tokens for value in by_kind.values()),
        sum(value.num_bytes for value in by_kind.values()),
    )
    print(f"all: {total}")
    for start, value in by_position.items():
        if value.num_tokens:
            print(f"positions from {start}: {value.nats / value.num_tokens:.3f} nats/token")


def print_samples(evaluator: Evaluator) -> None:
    for do_sample in (False, True):
        print("\n=== " + ("sampled" if do_sample else "greedy"))
        for prompt in PROMPTS:
            print(f"\n--- {prompt!r}\n{prompt}{evaluator.generate(prompt, do_sample)}")
        for question in QUESTIONS:
            print(f"\n--- chat: {question}\n{evaluator.ask(question, do_sample)}")


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m bros_shard.demo_model.evaluate", description="Measure the demo model's files."
    )
    parser.add_argument("--model", type=Path, default=DIRECTORY, help="Hugging Face folder")
    parser.add_argument("--samples-only", action="store_true", help="skip the held-out loss")
    options = parser.parse_args()
    evaluator = Evaluator(options.model)
    if not options.samples_only:
        print_scores(evaluator)
    print_samples(evaluator)


if __name__ == "__main__":
    main()
