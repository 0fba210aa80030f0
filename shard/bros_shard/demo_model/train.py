"""Trains the demo model on the text of the running Python and writes it beside this file.

    python -m bros_shard.demo_model.train --minutes 75

One interrupt (or SIGTERM) begins the learning-rate decay at once and still ends in a finished model; a killed
run goes on from its last checkpoint with --resume.
"""

from __future__ import annotations

import argparse
import platform
import signal
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Final

import torch
from tokenizers import Tokenizer
from torch.optim import Optimizer

from bros_shard.demo_model import DIRECTORY
from bros_shard.demo_model.batches import Rows, Sampler, TokenArray, encode
from bros_shard.demo_model.checkpoint import RunState, export_model, load_checkpoint, save_checkpoint
from bros_shard.demo_model.corpus import Document, build_corpus
from bros_shard.demo_model.model import CausalLM, ModelConfig
from bros_shard.demo_model.schedule import Budget, learning_rate_factor, row_length
from bros_shard.demo_model.tokenizer import save_tokenizer, train_tokenizer, write_json

SEED: Final = 20
#: Peak learning rate of both optimisers: Muon's updates are scaled to the size of AdamW's
#: (Liu et al. 2025, arXiv:2502.16982, section 2.2).
LEARNING_RATE: Final = 6e-3
WEIGHT_DECAY: Final = 0.05
MAX_GRAD_NORM: Final = 1.0
LOG_EVERY_STEPS: Final = 20
EVALUATE_EVERY_S: Final = 180.0
CHECKPOINT_EVERY_S: Final = 300.0
#: Validation during training: this many rows of this length, always the same.
VALIDATION_ROWS: Final = 64
VALIDATION_ROW_LENGTH: Final = 512
VALIDATION_BATCH: Final = 8


@dataclass(frozen=True)
class Options:
    """One run. Flags of the same names."""

    minutes: float  # wall-clock budget, unless `steps` is given
    steps: int | None  # budget in steps: repeatable to the bit on one machine
    tokens_per_step: int
    device: str  # "auto": CUDA if there is one
    threads: int  # of the CPU
    output: Path  # the Hugging Face folder to write
    work_dir: Path  # checkpoints
    resume: bool
    new_tokenizer: bool  # learn one even if the output folder already has one


def main() -> None:
    options = parse_options()
    torch.manual_seed(SEED)
    torch.set_num_threads(options.threads)
    options.output.mkdir(parents=True, exist_ok=True)
    config = ModelConfig()
    documents = build_corpus()
    tokenizer = prepare_tokenizer(options, documents, config)
    run = Run(options, config, documents, tokenizer)
    signal.signal(signal.SIGTERM, run.interrupt)
    signal.signal(signal.SIGINT, run.interrupt)
    run.train()
    export_model(run.model, options.output)
    write_json(options.output / "training.json", run.record())


def prepare_tokenizer(options: Options, documents: list[Document], config: ModelConfig) -> Tokenizer:
    """The tokenizer of the output folder, or a new one learnt from the training documents."""
    path = options.output / "tokenizer.json"
    if path.exists() and not options.new_tokenizer:
        return Tokenizer.from_file(str(path))
    texts = (document.text for document in documents if not document.is_validation)
    tokenizer = train_tokenizer(texts, config.vocab_size)
    save_tokenizer(tokenizer, options.output, config.max_position_embeddings)
    return tokenizer


class Run:
    """One training run: model, optimisers, data and clock."""

    def __init__(self, options: Options, config: ModelConfig, documents: list[Document], tokenizer: Tokenizer) -> None:
        self.options = options
        self.device = pick_device(options.device)
        self.budget = Budget(options.minutes * 60, options.steps)
        self.model = CausalLM(config).to(self.device)
        self.optimizers = build_optimizers(self.model)
        training = [document for document in documents if not document.is_validation]
        held_out = [document for document in documents if document.is_validation]
        encoded = encode(tokenizer, training)
        self.corpus_bytes = count_by_kind(training)
        self.validation = validation_rows(encode(tokenizer, held_out), self.device)
        self.sampler = Sampler(training, encoded, SEED)
        self.state = RunState()
        if options.resume:
            self.state = load_checkpoint(options.work_dir, self.model, self.optimizers)
            self.sampler.begin_pass(self.state.num_passes, self.state.row_length, self.state.num_rows)
        self.started_s = time.monotonic() - self.state.elapsed_s

    @property
    def elapsed_s(self) -> float:
        return time.monotonic() - self.started_s

    @property
    def progress(self) -> float:
        return self.budget.progress(self.elapsed_s, self.state.step)

    def interrupt(self, *_: object) -> None:
        """A second signal gets Python's own treatment."""
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        signal.signal(signal.SIGINT, signal.default_int_handler)
        self.budget.cut_short(self.elapsed_s, self.state.step)
        print("cut short: the learning rate now falls to zero", flush=True)

    def train(self) -> None:
        """Step until the budget is spent, then evaluate once more."""
        evaluated_s = saved_s = self.elapsed_s
        recent_loss = torch.zeros((), device=self.device)
        while self.progress < 1.0:
            recent_loss += self.train_step()
            if self.state.step % LOG_EVERY_STEPS == 0:
                self.log(recent_loss.item() / LOG_EVERY_STEPS)
                recent_loss.zero_()
            if self.elapsed_s - evaluated_s >= EVALUATE_EVERY_S:
                self.evaluate()
                evaluated_s = self.elapsed_s
            if self.elapsed_s - saved_s >= CHECKPOINT_EVERY_S:
                self.save()
                saved_s = self.elapsed_s
        self.evaluate()
        self.save()

    def train_step(self) -> torch.Tensor:
        """One optimiser step. Returns the loss before it, still on the device."""
        progress = self.progress
        length = row_length(progress)
        rows = self.sampler.next_rows(self.options.tokens_per_step // length, length, self.device)
        loss: torch.Tensor = self.model(rows.tokens, rows.targets)
        loss.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), MAX_GRAD_NORM)
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = LEARNING_RATE * learning_rate_factor(progress, self.state.step)
            optimizer.step()
            optimizer.zero_grad()
        self.state.step += 1
        self.state.num_tokens += rows.tokens.numel()
        return loss.detach()

    @torch.no_grad()
    def evaluate(self) -> None:
        """Add a point to the curve."""
        rows = self.validation
        batches = [slice(start, start + VALIDATION_BATCH) for start in range(0, VALIDATION_ROWS, VALIDATION_BATCH)]
        losses = [self.model(rows.tokens[batch], rows.targets[batch]).item() for batch in batches]
        point = {
            "minutes": round(self.elapsed_s / 60, 1),
            "step": self.state.step,
            "tokens": self.state.num_tokens,
            "row_length": self.sampler.length,
            "validation_loss": round(sum(losses) / len(losses), 4),
        }
        self.state.curve.append(point)
        print(point, flush=True)

    def save(self) -> None:
        self.state.elapsed_s = self.elapsed_s
        self.state.num_passes = self.sampler.num_passes
        self.state.num_rows = self.sampler.num_rows
        self.state.row_length = self.sampler.length
        save_checkpoint(self.options.work_dir, self.model, self.optimizers, self.state)

    def log(self, loss: float) -> None:
        rate = self.state.num_tokens / self.elapsed_s
        print(
            f"step {self.state.step} progress {self.progress:.3f} rows of {self.sampler.length} "
            f"pass {self.sampler.num_passes} loss {loss:.3f} {rate:.0f} tokens/s",
            flush=True,
        )

    def record(self) -> dict[str, object]:
        """What the documentation says about this run."""
        return {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "device": torch.cuda.get_device_name() if self.device.type == "cuda" else "cpu",
            "threads": self.options.threads,
            "seed": SEED,
            "parameters": sum(parameter.numel() for parameter in self.model.parameters()),
            "steps": self.state.step,
            "tokens_per_step": self.options.tokens_per_step,
            "tokens": self.state.num_tokens,
            "passes": self.sampler.num_passes,
            "minutes": round(self.elapsed_s / 60, 1),
            "training_bytes": self.corpus_bytes,
            "model": asdict(self.model.config),
            "curve": self.state.curve,
        }


def build_optimizers(model: CausalLM) -> list[Optimizer]:
    """Muon for the matrices inside the layers, AdamW for the embedding and the norms."""
    inner = [parameter for name, parameter in model.named_parameters() if name.endswith("_proj.weight")]
    other = [parameter for name, parameter in model.named_parameters() if not name.endswith("_proj.weight")]
    return [
        torch.optim.Muon(inner, lr=LEARNING_RATE, weight_decay=WEIGHT_DECAY, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(other, lr=LEARNING_RATE, betas=(0.9, 0.95), weight_decay=0.0, fused=True),
    ]


def validation_rows(encoded: list[TokenArray], device: torch.device) -> Rows:
    """Evenly spread rows of the held-out documents."""
    stream = torch.cat([torch.from_numpy(tokens.astype("int64")) for tokens in encoded])
    starts = torch.linspace(0, len(stream) - VALIDATION_ROW_LENGTH - 1, VALIDATION_ROWS).long()
    return Rows.cut(stream.numpy().astype("uint16"), starts.tolist(), VALIDATION_ROW_LENGTH, device)


def count_by_kind(documents: list[Document]) -> dict[str, int]:
    """UTF-8 bytes of one copy of each document."""
    counts: dict[str, int] = {}
    for document in documents:
        size = len(document.text.encode())
        counts[document.kind.label] = counts.get(document.kind.label, 0) + size
    return counts


def pick_device(name: str) -> torch.device:
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    return torch.device(name)


def parse_options(arguments: list[str] | None = None) -> Options:
    parser = argparse.ArgumentParser(prog="python -m bros_shard.demo_model.train", description=__doc__)
    parser.add_argument("--minutes", type=float, default=75.0, help="wall-clock budget")
    parser.add_argument("--steps", type=int, help="budget in steps, instead of minutes; repeatable to the bit")
    parser.add_argument("--tokens-per-step", type=int, default=4096)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--output", type=Path, default=DIRECTORY, help="folder of the finished model")
    parser.add_argument("--work-dir", type=Path, default=Path(".demo-model"), help="folder of the checkpoint")
    parser.add_argument("--resume", action="store_true", help="go on from the checkpoint")
    parser.add_argument("--new-tokenizer", action="store_true", help="also train the tokenizer again")
    return Options(**vars(parser.parse_args(arguments)))


if __name__ == "__main__":
    main()
