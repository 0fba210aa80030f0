"""Fixtures of the shard's tests: tiny random checkpoints, what transformers generates with them, a scripted router."""

from __future__ import annotations

import itertools
import json
import os
import random
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any
from uuid import uuid4

import pytest
import torch
import transformers

from bros_shard.block_layout import block_of, num_blocks_for
from bros_shard.options import ShardOptions
from bros_shard.protocol import (
    HostCopy,
    NewSequence,
    RankedToken,
    SamplingParams,
    SequenceResult,
    SequenceStep,
    StepPlan,
    TailMove,
    encode,
)
from bros_shard.worker import OnProgress, Worker

VOCAB_SIZE = 131  # does not divide by 2 or 4
MAX_LENGTH = 128
NUM_NEW_TOKENS = 16
#: Keeps a random model from repeating itself, so that the outputs tell one computation from another.
SAMPLING = SamplingParams(repetition_penalty=2.0)

_LLAMA = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": MAX_LENGTH,
    "eos_token_id": None,
    "bos_token_id": None,
    "pad_token_id": None,
}
_EXPERTS = {"num_experts": 6, "num_experts_per_tok": 3, "moe_intermediate_size": 32}
_OPT = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 64,
    "ffn_dim": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "max_position_embeddings": MAX_LENGTH,
    "word_embed_proj_dim": 64,
    "eos_token_id": None,
    "bos_token_id": None,
    "pad_token_id": None,
}

_NEOX = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "max_position_embeddings": MAX_LENGTH,
    "eos_token_id": None,
    "bos_token_id": None,
    "pad_token_id": None,
}
_FALCON = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "max_position_embeddings": MAX_LENGTH,
    "eos_token_id": None,
    "bos_token_id": None,
    "pad_token_id": None,
}
_GPT2 = {
    "vocab_size": VOCAB_SIZE,
    "n_embd": 64,
    "n_layer": 3,
    "n_head": 4,
    "n_positions": MAX_LENGTH,
    "eos_token_id": None,
    "bos_token_id": None,
    "pad_token_id": None,
}
_SOME_WINDOWS = ["sliding_attention", "full_attention", "sliding_attention"]


def _rope(rope_type: str, **parameters: Any) -> dict[str, Any]:
    return {"rope_parameters": {"rope_type": rope_type, "rope_theta": 1000.0, **parameters}}


#: One model for each field of a config.json that changes the output.
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("Llama", _LLAMA),
    "llama-tied": ("Llama", _LLAMA | {"tie_word_embeddings": True}),
    "llama-mha": ("Llama", _LLAMA | {"num_key_value_heads": 4}),
    "llama-mqa": ("Llama", _LLAMA | {"num_key_value_heads": 1}),
    "llama-biases": ("Llama", _LLAMA | {"attention_bias": True, "mlp_bias": True}),
    "llama-head-dim": ("Llama", _LLAMA | {"head_dim": 32}),
    "llama-gelu-eps": ("Llama", _LLAMA | {"hidden_act": "gelu", "rms_norm_eps": 0.1}),
    "llama-rope-linear": ("Llama", _LLAMA | _rope("linear", factor=4.0)),
    "llama-rope-dynamic": ("Llama", _LLAMA | _rope("dynamic", factor=2.0)),
    "llama-rope-llama3": (
        "Llama",
        _LLAMA
        | _rope(
            "llama3",
            factor=8.0,
            low_freq_factor=1.0,
            high_freq_factor=4.0,
            original_max_position_embeddings=32,
        ),
    ),
    "llama-rope-yarn": (
        "Llama",
        _LLAMA | _rope("yarn", factor=4.0, original_max_position_embeddings=32, beta_fast=4.0),
    ),
    "mistral": ("Mistral", _LLAMA | {"sliding_window": None}),
    "mistral-window": ("Mistral", _LLAMA | {"sliding_window": 7}),
    "qwen2": ("Qwen2", _LLAMA),
    "qwen2-window": (
        "Qwen2",
        _LLAMA | {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 1},
    ),
    "qwen3": ("Qwen3", _LLAMA | {"head_dim": 16, "tie_word_embeddings": True}),
    "qwen3-window-bias": (
        "Qwen3",
        _LLAMA
        | {
            "head_dim": 32,
            "attention_bias": True,
            "use_sliding_window": True,
            "sliding_window": 6,
            "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
        },
    ),
    "mixtral": ("Mixtral", _LLAMA | {"num_local_experts": 4, "num_experts_per_tok": 2}),
    "mixtral-window": (
        "Mixtral",
        _LLAMA | {"num_local_experts": 6, "num_experts_per_tok": 3, "sliding_window": 7, "head_dim": 32},
    ),
    "qwen2-moe": ("Qwen2Moe", _LLAMA | _EXPERTS | {"shared_expert_intermediate_size": 48}),
    "qwen2-moe-window": (
        "Qwen2Moe",
        _LLAMA
        | _EXPERTS
        | {
            "shared_expert_intermediate_size": 48,
            "norm_topk_prob": True,
            "decoder_sparse_step": 2,
            "qkv_bias": False,
            "use_sliding_window": True,
            "sliding_window": 5,
        },
    ),
    "qwen3-moe": ("Qwen3Moe", _LLAMA | _EXPERTS | {"norm_topk_prob": True, "mlp_only_layers": [1]}),
    "qwen3-moe-window": (
        "Qwen3Moe",
        _LLAMA | _EXPERTS | {"head_dim": 32, "attention_bias": True, "use_sliding_window": True, "sliding_window": 7},
    ),
    "gemma": ("Gemma", _LLAMA | {"head_dim": 16}),
    "gemma-untied-biases": (
        "Gemma",
        _LLAMA | {"head_dim": 32, "hidden_act": "gelu", "attention_bias": True, "tie_word_embeddings": False},
    ),
    # Caps that scores and logits do reach.
    "gemma2": (
        "Gemma2",
        _LLAMA
        | {
            "head_dim": 32,
            "query_pre_attn_scalar": 16,
            "sliding_window": 7,
            "attn_logit_softcapping": 1.5,
            "final_logit_softcapping": 1.0,
        },
    ),
    "gemma2-uncapped": (
        "Gemma2",
        _LLAMA
        | {
            "head_dim": 16,
            "sliding_window": 5,
            "layer_types": ["full_attention", "sliding_attention", "sliding_attention"],
            "attn_logit_softcapping": None,
            "final_logit_softcapping": None,
            "hidden_activation": "silu",
        },
    ),
    "gemma3": (
        "Gemma3Text",
        _LLAMA
        | {
            "head_dim": 16,
            "query_pre_attn_scalar": 8,
            "sliding_window": 7,
            "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
            "rope_parameters": {
                "full_attention": {"rope_type": "linear", "factor": 4.0, "rope_theta": 1000.0},
                "sliding_attention": {"rope_type": "default", "rope_theta": 50.0},
            },
        },
    ),
    "gemma3-capped": (
        "Gemma3Text",
        _LLAMA
        | {
            "head_dim": 32,
            "num_hidden_layers": 6,
            "sliding_window": 5,
            "attention_bias": True,
            "final_logit_softcapping": 0.5,
            "tie_word_embeddings": False,
        },
    ),
    "phi3": ("Phi3", _LLAMA | {"sliding_window": 7}),
    "phi3-longrope": (
        "Phi3",
        _LLAMA
        | {"tie_word_embeddings": True, "original_max_position_embeddings": MAX_LENGTH}
        | _rope(
            "longrope",
            factor=4.0,
            partial_rotary_factor=0.75,
            short_factor=[1.0, 1.1, 1.3, 1.6, 2.0, 2.5],
            long_factor=[9.0] * 6,
        ),
    ),
    "starcoder2": ("Starcoder2", _LLAMA | {"sliding_window": 7}),
    "starcoder2-plain": (
        "Starcoder2",
        _LLAMA
        | {
            "num_key_value_heads": 1,
            "use_bias": False,
            "norm_epsilon": 0.1,
            "hidden_act": "relu",
            "tie_word_embeddings": False,
        },
    ),
    "opt": ("OPT", _OPT),
    "opt-350m-like": ("OPT", _OPT | {"do_layer_norm_before": False, "word_embed_proj_dim": 48}),
    "opt-plain": (
        "OPT",
        _OPT | {"enable_bias": False, "layer_norm_elementwise_affine": False, "activation_function": "gelu"},
    ),
    "opt-no-final-norm": ("OPT", _OPT | {"_remove_final_layer_norm": True, "tie_word_embeddings": False}),
    "gpt-neox": ("GPTNeoX", _NEOX),
    "gpt-neox-sequential": (
        "GPTNeoX",
        _NEOX
        | {
            "use_parallel_residual": False,
            "attention_bias": False,
            "tie_word_embeddings": True,
            "hidden_act": "gelu_new",
            "layer_norm_eps": 0.001,
            "rope_parameters": {"rope_type": "default", "rope_theta": 1000.0, "partial_rotary_factor": 1.0},
        },
    ),
    "falcon": ("Falcon", _FALCON),
    "falcon-mha": ("Falcon", _FALCON | {"multi_query": False, "bias": True, "tie_word_embeddings": False}),
    "falcon-sequential": ("Falcon", _FALCON | {"parallel_attn": False, "layer_norm_epsilon": 0.1}),
    "falcon-new": ("Falcon", _FALCON | {"new_decoder_architecture": True, "num_kv_heads": 2}),
    "falcon-new-one-norm": (
        "Falcon",
        _FALCON
        | {
            "new_decoder_architecture": True,
            "num_kv_heads": 2,
            "num_ln_in_parallel_attn": 1,
            "activation": "gelu_new",
            "ffn_hidden_size": 96,
        },
    ),
    "gpt-bigcode": ("GPTBigCode", _GPT2),
    "gpt-bigcode-mha": (
        "GPTBigCode",
        _GPT2 | {"multi_query": False, "scale_attn_weights": False, "tie_word_embeddings": False},
    ),
    "gpt2": ("GPT2", _GPT2),
    "gpt2-scales": ("GPT2", _GPT2 | {"scale_attn_weights": False, "scale_attn_by_inverse_layer_idx": True}),
    "gpt2-untied": (
        "GPT2",
        _GPT2 | {"n_inner": 96, "activation_function": "relu", "layer_norm_epsilon": 0.1, "tie_word_embeddings": False},
    ),
}

#: Those that have no decoder of their own: for each, what is special about its code in transformers.
BORROWED_MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "codegen": ("CodeGen", _GPT2 | {"rotary_dim": 8}),  # queries, values and keys in one tensor, in parts
    # Windows in some layers, those without are not rotated; scaled logits.
    "cohere2": ("Cohere2", _LLAMA | {"sliding_window": 7, "logit_scale": 0.25, "layer_types": _SOME_WINDOWS}),
    # Heads of values smaller than those of keys, experts that share groups.
    "deepseek-v3": (
        "DeepseekV3",
        _LLAMA
        | {
            "num_key_value_heads": 4,
            "kv_lora_rank": 16,
            "q_lora_rank": 24,
            "qk_rope_head_dim": 8,
            "qk_nope_head_dim": 16,
            "v_head_dim": 12,
            "n_routed_experts": 8,
            "n_group": 2,
            "topk_group": 1,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 32,
            "first_k_dense_replace": 1,
        },
    ),
    "diffllama": ("DiffLlama", _LLAMA | {"head_dim": 16}),  # attends twice in each layer
    "ernie4.5": ("Ernie4_5", _LLAMA | {"use_bias": True}),
    "glm4": ("Glm4", _LLAMA | {"head_dim": 16, "attention_bias": True}),  # neighbours rotated
    "gptj": ("GPTJ", _GPT2 | {"rotary_dim": 8}),  # a bias in the head
    "granite": (
        "Granite",
        _LLAMA
        | {
            "logits_scaling": 2.0,
            "embedding_multiplier": 3.0,
            "residual_multiplier": 0.5,
            "attention_multiplier": 0.5,
        },
    ),
    "helium": ("Helium", _LLAMA | {"head_dim": 16}),
    "olmo2": ("Olmo2", _LLAMA),  # norms after each part
    "olmoe": ("Olmoe", _LLAMA | {"num_experts": 6, "num_experts_per_tok": 3}),  # experts that are joined when loaded
    "phi": ("Phi", _LLAMA | {"partial_rotary_factor": 0.5, "qk_layernorm": True}),
    "smollm3": ("SmolLM3", _LLAMA | {"no_rope_layers": [1, 0, 1]}),
    # Capped scores and logits, windows.
    "vaultgemma": (
        "VaultGemma",
        _LLAMA
        | {
            "head_dim": 16,
            "query_pre_attn_scalar": 16,
            "sliding_window": 7,
            "attn_logit_softcapping": 1.5,
            "final_logit_softcapping": 1.0,
            "layer_types": _SOME_WINDOWS,
        },
    ),
}
MODELS |= BORROWED_MODELS


@dataclass(frozen=True)
class Reference:
    """A tiny checkpoint, and what transformers makes of it in float32."""

    path: Path
    model: Any
    prompts: list[list[int]]
    outputs: list[list[int]]  # greedy with SAMPLING's penalty, NUM_NEW_TOKENS each


def _make_model(kind: str, options: dict[str, Any]) -> Any:
    torch.manual_seed(0)
    config = getattr(transformers, f"{kind}Config")(**options)
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            is_norm_scale = ("norm" in name or "ln_" in name) and name.endswith("weight")
            # Small embeddings: a tied head would otherwise do no more than repeat the last token.
            scale = 0.05 if parameter is model.get_input_embeddings().weight else 0.2
            parameter.normal_(1.0 if is_norm_scale else 0.0, scale)
    model.tie_weights()
    return model


def _generate(model: Any, prompt: list[int]) -> list[int]:
    output = model.generate(
        torch.tensor([prompt]),
        attention_mask=torch.ones(1, len(prompt), dtype=torch.int64),
        do_sample=False,
        repetition_penalty=SAMPLING.repetition_penalty,
        max_new_tokens=NUM_NEW_TOKENS,
        pad_token_id=0,
    )
    return output[0, len(prompt) :].tolist()  # type: ignore[no-any-return]


@pytest.fixture(scope="session")
def reference(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Reference]:
    """Get the `Reference` of a model in `MODELS`, made once."""
    made: dict[str, Reference] = {}

    def get(name: str) -> Reference:
        if name not in made:
            model = _make_model(*MODELS[name])
            path = tmp_path_factory.mktemp(name)
            model.save_pretrained(path)
            generator = random.Random(7)
            prompts = [
                [generator.randrange(VOCAB_SIZE) for _ in range(length)]
                for length in (1, 2, 3, 15, 16, 17, 31, 32, 33, 40, 47, 9, 64, 5, 21, 12)
            ]
            made[name] = Reference(path, model, prompts, [_generate(model, prompt) for prompt in prompts])
        return made[name]

    return get


@pytest.fixture(scope="session")
def make_worker() -> Callable[..., Worker]:
    """Make the single rank that serves a checkpoint in float32, its region full of NaN."""

    def make(path: Path, on_progress: OnProgress = lambda *report: None, **options: Any) -> Worker:
        defaults = {"dtype": "float32", "block_size": 16, "kv_slots_limit": 64 * 16, "kv_memory_bytes": 2**30}
        options = defaults | {"num_threads": 1} | options
        worker = Worker(
            ShardOptions(endpoint="", rendezvous="", model_path=str(path), model_id="m", **options), on_progress
        )
        worker.cache.region.fill_(float("nan"))
        return worker

    return make


@dataclass
class _Scripted:
    """A sequence as the scripted router sees it."""

    new: NewSequence
    token_ids: list[int]
    signs: tuple[int, ...]  # of the entries it may be given: 1 forward, -1 reversed
    num_computed: int = 0
    num_room: int = 0  # tokens that its blocks are for, guesses included
    block_table: list[int] = field(default_factory=list)
    num_unchanged: int = 0  # entries that the rank has already
    host_blocks: list[int] = field(default_factory=list)  # where its blocks lie while it is swapped out

    @property
    def is_finished(self) -> bool:
        return len(self.token_ids) == self.new.max_total_tokens


class ScriptedRouter:
    """Plans steps for one worker: who runs, in which blocks and directions. Fills blocks that it frees with NaN.

    Where the worker may guess, it is told of fewer tokens than it has computed, as if their step were in flight.
    """

    def __init__(
        self, worker: Worker, chunk_size: int = MAX_LENGTH, shares_tails: bool = False, most_guesses: int = 0
    ) -> None:
        self.plans: list[StepPlan] = []
        self.num_moves = 0
        #: Guesses that the worker made, and those of them that were right.
        self.num_guesses = self.num_confirmed = 0
        self._most_guesses = most_guesses
        self._worker = worker
        self._chunk_size = chunk_size
        self._shares_tails = shares_tails
        self._block_size = worker.cache.block_size
        self._random = random.Random(0)
        self._free = self._random.sample(range(worker.num_blocks), worker.num_blocks)
        self._free_host = list(range(worker.cache.num_host_blocks))
        #: What was told of prompts: by sequence, a list for each position, which grows where it is told again.
        self.prompts: dict[int, dict[int, list[tuple[float | None, list[RankedToken]]]]] = {}
        self._sequences: dict[int, _Scripted] = {}
        self._known: set[int] = set()
        self._owners: dict[int, list[int]] = {}
        #: Prompts, and their adapters, that come in the middle of a step, one a step.
        self.arriving: list[tuple[list[int], int | None]] = []

    def add(
        self,
        prompt: list[int],
        direction: str = "forward",
        sampling: SamplingParams = SAMPLING,
        num_prompt_top_tokens: int | None = None,
        adapter: int | None = None,
    ) -> int:
        """Queue a sequence that generates NUM_NEW_TOKENS; direction is forward, reversed or mixed. Returns its id."""
        sequence_id = len(self._sequences)
        new = NewSequence(
            sequence_id,
            list(prompt),
            len(prompt) + NUM_NEW_TOKENS,
            sampling,
            num_prompt_top_tokens=num_prompt_top_tokens,
            adapter=adapter,
        )
        signs = {"forward": (1,), "reversed": (-1,), "mixed": (1, -1)}[direction]
        self._sequences[sequence_id] = _Scripted(new, list(prompt), signs)
        return sequence_id

    def output(self, sequence_id: int) -> list[int]:
        """The tokens generated so far."""
        sequence = self._sequences[sequence_id]
        return sequence.token_ids[len(sequence.new.token_ids) :]

    def run(self) -> list[list[int]]:
        """Step until every sequence has its tokens, then release them. Returns what each generated."""
        while any(not sequence.is_finished for sequence in self._sequences.values()):
            self.step()
        self._execute(releases=sorted(self._known))
        return [self.output(sequence_id) for sequence_id in self._sequences]

    def step(self) -> None:
        """Run every unfinished sequence: its next chunk, or its next token."""
        running = {i: sequence for i, sequence in self._sequences.items() if not sequence.is_finished}
        planned = {i: sequence.num_computed for i, sequence in self._sequences.items()}
        for i, sequence in running.items():
            planned[i] += min(self._chunk_size, len(sequence.token_ids) - sequence.num_computed)
            num_guesses = self._num_allowed(sequence, planned[i])
            sequence.num_room = max(sequence.num_room, planned[i] + num_guesses)
        room = {i: sequence.num_room for i, sequence in self._sequences.items()}
        moves = self._make_room_in_shared_blocks(room)
        for i in running:
            self._grow(i, room)
        results = self._execute(
            new_sequences=[sequence.new for i, sequence in running.items() if i not in self._known],
            tail_moves=moves,
            copies_in=[copy for sequence in running.values() for copy in self._restore(sequence)],
            sequences=[self._sequence_step(i, planned[i]) for i in running],
        )
        self._known.update(running)
        for result in results:
            sequence = running[result.sequence_id]
            sequence.num_computed = planned[result.sequence_id] + max(0, len(result.tokens) - 1)
            assert result.fault is None, f"sequence {result.sequence_id} read a slot that nobody wrote"
            sequence.token_ids += [token.token_id for token in result.tokens]
            self.num_guesses += result.num_speculative_tokens
            self.num_confirmed += max(0, len(result.tokens) - 1)
        for i, sequence in running.items():
            if sequence.is_finished:
                self._free_blocks(i)

    def preempt(self, sequence_id: int, to_host: bool = False) -> None:
        """Take a sequence's blocks. It comes back by recomputing them, or from copies in the host pool."""
        sequence = self._sequences[sequence_id]
        if to_host:
            num_blocks = num_blocks_for(sequence.num_computed, self._block_size)
            sequence.host_blocks = [self._free_host.pop() for _ in range(num_blocks)]
            self._execute(copies_out=self._host_copies(sequence))
        else:
            sequence.num_computed = 0
        self._free_blocks(sequence_id)

    def _execute(self, **parts: Any) -> list[SequenceResult]:
        plan = StepPlan(0, len(self.plans), **parts)
        self.plans.append(plan)
        if not (plan.sequences and self.arriving) or plan.is_interruption:
            output = self._worker.execute(plan)
        else:
            layers_left = itertools.count(self._random.randrange(self._worker.cache.region.shape[0]), -1)
            output = self._worker.execute(plan, lambda: self._interrupt() if next(layers_left) == 0 else 0.0)
        for prompt in output.prompts:
            told = self.prompts.setdefault(prompt.sequence_id, {})
            tops = prompt.top_tokens or [[] for _ in prompt.logprobs]
            for position, item in enumerate(zip(prompt.logprobs, tops, strict=True), start=prompt.first_position):
                told.setdefault(position, []).append(item)
        return output.sequences

    def _interrupt(self) -> float:
        """Run a whole prompt between two layers of a step."""
        prompt, adapter = self.arriving.pop()
        i = self.add(prompt, adapter=adapter)
        sequence = self._sequences[i]
        self._known.add(i)
        planned = {i: len(sequence.token_ids)}
        sequence.num_room = planned[i]
        self._grow(i, planned)
        (result,) = self._execute(
            new_sequences=[sequence.new], sequences=[self._sequence_step(i, planned[i])], is_interruption=True
        )
        sequence.num_computed = planned[i]
        sequence.token_ids += [token.token_id for token in result.tokens]
        return 0.25

    def _num_allowed(self, sequence: _Scripted, num_planned: int) -> int:
        """Guesses behind a run up to the last token that is known."""
        if num_planned < len(sequence.token_ids):
            return 0
        return min(self._most_guesses, sequence.new.max_total_tokens - 1 - num_planned)

    def _sequence_step(self, sequence_id: int, num_planned: int) -> SequenceStep:
        sequence = self._sequences[sequence_id]
        first_changed, sequence.num_unchanged = sequence.num_unchanged, len(sequence.block_table)
        num_tokens = num_planned - sequence.num_computed
        num_uncertain = 0
        if self._most_guesses and num_tokens == 1 and num_planned == len(sequence.token_ids):
            num_uncertain = self._random.randrange(1 + min(3, sequence.num_computed))
        return SequenceStep(
            sequence_id,
            sequence.num_computed - num_uncertain,
            num_tokens,
            first_changed,
            sequence.block_table[first_changed:],
            self._num_allowed(sequence, num_planned),
            num_uncertain,
        )

    def _grow(self, sequence_id: int, planned: dict[int, int]) -> None:
        sequence = self._sequences[sequence_id]
        while len(sequence.block_table) * self._block_size < planned[sequence_id]:
            need = planned[sequence_id] - len(sequence.block_table) * self._block_size
            entry = self._gap(sequence, need, planned) if self._shares_tails else None
            self._append(sequence_id, self._fresh_entry(sequence) if entry is None else entry)

    def _append(self, sequence_id: int, entry: int) -> None:
        self._sequences[sequence_id].block_table.append(entry)
        self._owners.setdefault(block_of(entry), []).append(sequence_id)

    def _fresh_entry(self, sequence: _Scripted) -> int:
        block = self._free.pop()
        return block if self._random.choice(sequence.signs) > 0 else ~block

    def _gap(self, sequence: _Scripted, need: int, planned: dict[int, int]) -> int | None:
        """The entry of a tail block that another sequence fills from the other end, with room for `need` tokens."""
        for other_id, other in self._sequences.items():
            if not other.block_table or other is sequence:
                continue
            entry = other.block_table[-1]
            sign = -1 if entry >= 0 else 1
            room = self._block_size - self._num_in_tail(other_id, planned)
            if sign in sequence.signs and len(self._owners[block_of(entry)]) == 1 and need + 4 <= room:
                return ~entry
        return None

    def _num_in_tail(self, sequence_id: int, planned: dict[int, int]) -> int:
        return planned[sequence_id] - (len(self._sequences[sequence_id].block_table) - 1) * self._block_size

    def _make_room_in_shared_blocks(self, planned: dict[int, int]) -> list[TailMove]:
        """Where two tails would meet this step, the reversed one moves to a block of its own."""
        moves = []
        for block, owners in list(self._owners.items()):
            if sum(self._num_in_tail(i, planned) for i in owners) <= self._block_size or len(owners) == 1:
                continue
            reversed_id = next(i for i in owners if self._sequences[i].block_table[-1] == ~block)
            sequence = self._sequences[reversed_id]
            num_tokens = sequence.num_computed - (len(sequence.block_table) - 1) * self._block_size
            sequence.block_table.pop()  # which may be there for guesses alone
            owners.remove(reversed_id)
            self._append(reversed_id, self._fresh_entry(sequence))
            sequence.num_unchanged = len(sequence.block_table) - 1
            if num_tokens > 0:
                moves.append(TailMove(~block, sequence.block_table[-1], num_tokens))
        self.num_moves += len(moves)
        return moves

    def _restore(self, sequence: _Scripted) -> list[HostCopy]:
        if not sequence.host_blocks:
            return []
        copies = self._host_copies(sequence)
        self._free_host += sequence.host_blocks
        sequence.host_blocks = []
        return copies

    def _host_copies(self, sequence: _Scripted) -> list[HostCopy]:
        copies = []
        for index, host_block in enumerate(sequence.host_blocks):
            num_tokens = min(self._block_size, sequence.num_computed - index * self._block_size)
            copies.append(HostCopy(sequence.block_table[index], host_block, num_tokens))
        return copies

    def _free_blocks(self, sequence_id: int) -> None:
        sequence = self._sequences[sequence_id]
        for entry in sequence.block_table:
            owners = self._owners[block_of(entry)]
            owners.remove(sequence_id)
            if not owners:
                del self._owners[block_of(entry)]
                self._free.append(block_of(entry))
                self._worker.cache.region[:, :, block_of(entry)] = float("nan")
        sequence.block_table = []
        sequence.num_unchanged = sequence.num_room = 0


@pytest.fixture(scope="session")
def generate() -> Callable[[Any, list[int]], list[int]]:
    """What a model of transformers answers to a prompt: NUM_NEW_TOKENS, greedy with SAMPLING's penalty."""
    return _generate


@pytest.fixture(scope="session")
def replay_ranks() -> Iterator[subprocess.Popen[str]]:
    """The process of `replay_ranks.py`. The library of numpy would start threads."""
    command = [sys.executable, str(Path(__file__).with_name("replay_ranks.py"))]
    environment = os.environ | {"OPENBLAS_NUM_THREADS": "1"}
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
    ) as process:
        yield process


@pytest.fixture
def run_ranks(tmp_path: Path, replay_ranks: subprocess.Popen[str]) -> Callable[..., dict[str, list[int]]]:
    """`run_ranks(options, world_size, plans)`: tokens of each sequence, from ranks in processes of their own."""

    def run(options: ShardOptions, world_size: int, plans: list[StepPlan]) -> dict[str, list[int]]:
        plans_path, results_path = tmp_path / "plans.json", tmp_path / "results.json"
        plans_path.write_text(json.dumps([encode(plan).hex() for plan in plans]))
        options = replace(options, world_size=world_size, rendezvous=f"file://{tmp_path}/{uuid4()}")
        files = [tmp_path / f"rank{rank}.txt" for rank in range(world_size)]
        job = {
            "environment": dict(os.environ),
            "plans": str(plans_path),
            "results": str(results_path),
            "timeout_s": 300,
            "ranks": [
                {"argv": replace(options, rank=rank).to_argv(), "file": str(file)} for rank, file in enumerate(files)
            ],
        }
        assert replay_ranks.stdin is not None and replay_ranks.stdout is not None
        print(json.dumps(job), file=replay_ranks.stdin, flush=True)
        statuses = json.loads(replay_ranks.stdout.readline())
        assert statuses == [0] * world_size, "\n".join(file.read_text() for file in files)
        outputs: dict[str, list[int]] = json.loads(results_path.read_text())
        return outputs

    return run


@pytest.fixture
def scripted_router() -> type[ScriptedRouter]:
    """The class that drives a worker."""
    return ScriptedRouter
