"""Sequences get the tokens that transformers gives with their adapter's weights merged, whatever runs beside them."""

from __future__ import annotations

import copy
import json
import random
import re
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from bros_kernels.kernels import UnknownKernelsError
from bros_shard.checkpoint import CheckpointError
from bros_shard.lora import LoraAdapter
from bros_shard.model_config import UnsupportedModelError

_LLAMA = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
_NEOX = ("query_key_value", "dense", "dense_h_to_4h", "dense_4h_to_h")
#: For each model, the projections of an adapter that has all of them, and of one that has a few.
FAMILIES: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "llama-biases": (_LLAMA, ("k_proj", "up_proj")),
    "llama-mqa": (_LLAMA, ("v_proj", "o_proj")),
    "qwen3": (_LLAMA, ("q_proj", "v_proj")),
    "gemma2": (_LLAMA, ("q_proj", "gate_proj")),
    "phi3": (("qkv_proj", "o_proj", "gate_up_proj", "down_proj"), ("gate_up_proj",)),
    "starcoder2": (("q_proj", "k_proj", "v_proj", "o_proj", "c_fc", "c_proj"), ("c_fc",)),
    "opt": (("q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2"), ("v_proj", "fc1")),
    "gpt2": (("c_attn", "c_proj", "c_fc"), ("c_attn", "mlp.c_proj")),
    "gpt-bigcode": (("c_attn", "c_proj", "c_fc"), ("c_attn",)),
    "falcon": (_NEOX, ("query_key_value",)),
    "falcon-new": (_NEOX, ("query_key_value", "dense_4h_to_h")),
    "gpt-neox": (_NEOX, ("query_key_value",)),
    "mixtral": (_LLAMA[:4], ("q_proj", "v_proj")),
    "qwen2-moe-window": (_LLAMA[:4], ("o_proj",)),
}
NUM_PROMPTS = 3

#: Rank and alpha of a module.
SizeOf = Callable[[str], tuple[int, float]]


def write_adapter(
    folder: Path,
    model: Any,
    targets: tuple[str, ...],
    seed: int,
    size_of: SizeOf = lambda module: (4, 8.0),
    **config: Any,
) -> Any:
    """Save a random adapter as PEFT does. Returns the model with its weights merged."""
    merged = copy.deepcopy(model)
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for module, layer in merged.named_modules():
        if not module.endswith(tuple(f".{target}" for target in targets)):
            continue
        is_transposed = type(layer).__name__ == "Conv1D"
        out_features, in_features = layer.weight.T.shape if is_transposed else layer.weight.shape
        rank, alpha = size_of(module)
        down = 0.2 * torch.randn(rank, in_features, generator=generator)
        up = 0.2 * torch.randn(out_features, rank, generator=generator)
        tensors[f"base_model.model.{module}.lora_A.weight"] = down
        tensors[f"base_model.model.{module}.lora_B.weight"] = up
        delta = up @ down * (alpha / (rank**0.5 if config.get("use_rslora") else rank))
        with torch.no_grad():
            layer.weight += delta.T if is_transposed else delta
    save_adapter(folder, tensors, **config)
    return merged


def save_adapter(folder: Path, tensors: dict[str, Tensor], **config: Any) -> None:
    folder.mkdir(exist_ok=True)
    save_file(tensors, folder / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "bias": "none", "fan_in_fan_out": False} | config
    (folder / "adapter_config.json").write_text(json.dumps(config))


@dataclass(frozen=True)
class Adapted:
    """A model and two adapters of it: one has all projections, one a few."""

    path: Path
    #: By name, as ranks are told.
    folders: dict[str, Path]
    prompts: list[list[int]]
    #: What transformers makes of each prompt without an adapter, with the first, with the second.
    outputs: dict[int | None, list[list[int]]]

    @property
    def options(self) -> str:
        return json.dumps({name: str(folder) for name, folder in self.folders.items()})


@pytest.fixture(scope="session")
def adapted(reference, generate, tmp_path_factory) -> Callable[[str], Adapted]:
    """Get the adapters of one of `FAMILIES`, made once."""
    made: dict[str, Adapted] = {}

    def get(name: str) -> Adapted:
        if name not in made:
            base = reference(name)
            folders = {kind: tmp_path_factory.mktemp("adapter") for kind in ("all", "few")}
            all_targets, few_targets = FAMILIES[name]
            models = [
                write_adapter(folders["all"], base.model, all_targets, seed=1),
                write_adapter(
                    folders["few"],
                    base.model,
                    few_targets,
                    seed=2,
                    size_of=lambda module: (2, 5.0),
                    r=2,
                    lora_alpha=5,
                    use_rslora=True,
                ),
            ]
            prompts = [base.prompts[index] for index in (3, 9, 13)]
            outputs: dict[int | None, list[list[int]]] = {None: [generate(base.model, prompt) for prompt in prompts]}
            outputs |= {i: [generate(model, prompt) for prompt in prompts] for i, model in enumerate(models)}
            made[name] = Adapted(base.path, folders, prompts, outputs)
        return made[name]

    return get


def add_all(router: Any, expected: Adapted) -> list[list[int]]:
    """Queue every prompt with and without each adapter, in any order. Returns what is to come."""
    jobs = [(i, adapter) for i in range(NUM_PROMPTS) for adapter in (None, 0, 1)]
    random.Random(3).shuffle(jobs)
    for number, (i, adapter) in enumerate(jobs):
        router.add(expected.prompts[i], "forward" if number % 2 else "reversed", adapter=adapter)
    return [expected.outputs[adapter][i] for i, adapter in jobs]


@pytest.mark.parametrize("name", FAMILIES)
def test_adapters_and_the_base_model_in_one_batch(name, adapted, make_worker, scripted_router) -> None:
    expected = adapted(name)
    base, all_, few = expected.outputs.values()
    assert all(len({*map(tuple, outputs)}) == 3 for outputs in zip(base, all_, few, strict=True)), "they are all one"
    router = scripted_router(make_worker(expected.path, adapters=expected.options), chunk_size=16, shares_tails=True)
    outputs = add_all(router, expected)
    for preempted, to_host in ((2, True), (5, False), (7, True)):
        for _ in range(3):
            router.step()
        router.preempt(preempted, to_host)
    assert router.run() == outputs


@pytest.mark.parametrize("name", ["llama-biases", "gpt2", "mixtral"])
@pytest.mark.parametrize("adapter", [None, 0, 1])
def test_one_sequence_at_a_time(name, adapter, adapted, make_worker, scripted_router) -> None:
    expected = adapted(name)
    worker = make_worker(expected.path, adapters=expected.options)
    for prompt, output in zip(expected.prompts, expected.outputs[adapter], strict=True):
        router = scripted_router(worker)
        router.add(prompt, adapter=adapter)
        assert router.run() == [output]


@pytest.mark.parametrize("name", ["llama-biases", "opt"])
def test_step_in_the_middle_of_another_goes_through_its_own_adapters(
    name, adapted, make_worker, scripted_router
) -> None:
    expected = adapted(name)
    router = scripted_router(make_worker(expected.path, adapters=expected.options), chunk_size=8)
    outputs = []
    for adapter in (0, None):
        router.add(expected.prompts[0], adapter=adapter)
        outputs.append(expected.outputs[adapter][0])
    arriving = [(i, adapter) for i in range(1, NUM_PROMPTS) for adapter in (1, None, 0)]
    router.arriving = [(expected.prompts[i], adapter) for i, adapter in reversed(arriving)]
    assert router.run() == outputs + [expected.outputs[adapter][i] for i, adapter in arriving]
    assert sum(plan.is_interruption for plan in router.plans) == len(arriving)


@pytest.mark.parametrize("name", ["llama-mqa", "phi3", "gpt2"])
def test_ranks_together_equal_one(name, adapted, make_worker, scripted_router, run_ranks) -> None:
    """Real processes."""
    expected = adapted(name)
    worker = make_worker(expected.path, adapters=expected.options)
    router = scripted_router(worker, chunk_size=24)
    outputs = add_all(router, expected)
    assert router.run() == outputs
    of_ranks = run_ranks(worker.options, 2, router.plans)
    assert [of_ranks[str(index)] for index in range(len(outputs))] == outputs


@pytest.mark.parametrize("name", ["llama-biases", "qwen3", "phi3", "gpt2"])
@pytest.mark.parametrize("quantize", ["", "int8"])
def test_cpu_kernels_give_the_same_tokens_alone_and_in_any_batch(
    name, quantize, adapted, make_worker, scripted_router
) -> None:
    expected = adapted(name)
    options = {"kernels": "cpu", "dtype": "bfloat16", "quantize": quantize, "adapters": expected.options}
    try:
        worker = make_worker(expected.path, **options)
    except UnknownKernelsError as error:
        pytest.skip(str(error))
    alone: dict[int | None, list[list[int]]] = {None: [], 0: [], 1: []}
    for adapter, outputs in alone.items():
        for prompt in expected.prompts:
            router = scripted_router(worker)
            router.add(prompt, adapter=adapter)
            outputs += router.run()
    assert alone[None] != alone[0] != alone[1]
    router = scripted_router(worker, chunk_size=16)
    outputs = add_all(router, Adapted(expected.path, expected.folders, expected.prompts, alone))
    assert router.run() == outputs


def test_ranks_and_scales_of_single_modules(reference, generate, make_worker, scripted_router, tmp_path) -> None:
    """The first pattern that matches the end of a name counts, behind a dot."""
    base = reference("llama")

    def size_of(module: str) -> tuple[int, float]:
        if module == "model.layers.1.self_attn.q_proj":
            return 3, 8.0
        if module.endswith(".q_proj"):
            return 6, 12.0
        if module.endswith(("gate_proj", "up_proj")):
            return 4, 2.5
        return 4, 8.0

    merged = write_adapter(
        tmp_path / "a",
        base.model,
        _LLAMA,
        seed=5,
        size_of=size_of,
        rank_pattern={"layers.1.self_attn.q_proj": 3, "q_proj": 6, "proj": 1},
        alpha_pattern={"model.layers.1.self_attn.q_proj": 8, "q_proj": 12, r"mlp\.(gate|up)_proj": 2.5},
    )
    router = scripted_router(make_worker(base.path, adapters=json.dumps({"a": str(tmp_path / "a")})))
    for prompt in base.prompts[3:6]:
        router.add(prompt, adapter=0)
    assert router.run() == [generate(merged, prompt) for prompt in base.prompts[3:6]]


@pytest.mark.parametrize(("name", "outer"), [("gpt2", "transformer."), ("opt", "model.")])
def test_checkpoint_without_the_outer_module(name, outer, adapted, make_worker, scripted_router, tmp_path) -> None:
    expected = adapted(name)
    shutil.copytree(expected.path, tmp_path, dirs_exist_ok=True)
    tensors = load_file(tmp_path / "model.safetensors")
    save_file({key.removeprefix(outer): tensor for key, tensor in tensors.items()}, tmp_path / "model.safetensors")
    router = scripted_router(make_worker(tmp_path, adapters=expected.options))
    router.add(expected.prompts[0], adapter=0)
    assert router.run() == expected.outputs[0][:1]


Q_PROJ = "base_model.model.model.layers.0.self_attn.q_proj"


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"peft_type": "IA3"}, "peft_type = 'IA3': only LORA"),
        ({"use_dora": True}, "use_dora = True: only plain LoRA"),
        ({"lora_bias": True}, "lora_bias = True: only plain LoRA"),
        ({"bias": "all"}, "bias = 'all': biases"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save = ['lm_head']: whole modules"),
        ({"layer_replication": [[0, 2]]}, "layer_replication = [[0, 2]]: layers"),
        ({"trainable_token_indices": [5]}, "trainable_token_indices = [5]: embeddings"),
        ({"alora_invocation_tokens": [5]}, "alora_invocation_tokens = [5]: adapters"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights = 'pissa': the weights of the base model"),
        ({"r": 0}, "r = 0: must be at least 1"),
        ({"r": "4"}, "r = '4': is of the wrong type"),
        ({"lora_alpha": None}, "lora_alpha = None: the model needs this field"),
        ({"rank_pattern": {"q_(proj": 2}}, "rank_pattern.q_(proj = 2: is not named by a regular expression"),
        ({"alpha_pattern": {"q_proj": -2}}, "alpha_pattern.q_proj = -2: must be a positive number"),
    ],
)
def test_what_is_more_than_lora_is_refused(config: dict[str, Any], message: str, tmp_path: Path) -> None:
    save_adapter(tmp_path, {f"{Q_PROJ}.lora_A.weight": torch.zeros(4, 64)}, **config)
    with (
        pytest.raises(UnsupportedModelError, match=re.escape(f"adapter one: adapter_config.json: {message}")),
        LoraAdapter("one", tmp_path) as adapter,
    ):
        adapter.factors("model.layers.0.self_attn.q_proj")


@pytest.mark.parametrize(
    "config", [{"init_lora_weights": True}, {"init_lora_weights": "gaussian"}, {"modules_to_save": []}]
)
def test_what_asks_for_nothing_more_is_not(config: dict[str, Any], tmp_path: Path) -> None:
    save_adapter(tmp_path, {f"{Q_PROJ}.lora_A.weight": torch.zeros(4, 64)}, **config)
    with LoraAdapter("one", tmp_path) as adapter:
        assert adapter.factors("model.layers.0.self_attn.q_proj") is not None
        assert adapter.factors("model.layers.0.self_attn.k_proj") is None


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({f"{Q_PROJ}.lora_A.weight": (4, 64)}, f"tensor '{Q_PROJ}.lora_B.weight' is missing"),
        (
            {f"{Q_PROJ}.lora_A.weight": (8, 64), f"{Q_PROJ}.lora_B.weight": (64, 8)},
            f"adapter_model.safetensors: tensor '{Q_PROJ}.lora_A.weight' has shape [8, 64], the model needs [4, 64]",
        ),
        (
            {f"{Q_PROJ}.lora_A.weight": (4, 64), f"{Q_PROJ}.lora_B.weight": (32, 4)},
            f"adapter_model.safetensors: tensor '{Q_PROJ}.lora_B.weight' has shape [32, 4], the model needs [64, 4]",
        ),
        (
            {"base_model.model.lm_head.lora_A.weight": (4, 64), "base_model.model.lm_head.lora_B.weight": (131, 4)},
            "tensor 'base_model.model.lm_head.lora_A.weight' is not part of the model (2 such tensors)",
        ),
        (
            {"base_model.model.model.embed_tokens.lora_embedding_A": (4, 131)},
            "tensor 'base_model.model.model.embed_tokens.lora_embedding_A' is not part of the model",
        ),
        (
            {f"{Q_PROJ}.lora_A.weight": (4, 64), f"{Q_PROJ}.lora_B.weight": (64, 4), f"{Q_PROJ}.lora_B.bias": (64,)},
            f"tensor '{Q_PROJ}.lora_B.bias' is not part of the model",
        ),
    ],
)
def test_tensors_that_fit_no_projection_are_refused(
    tensors: dict[str, tuple[int, ...]], message: str, reference, make_worker, tmp_path
) -> None:
    save_adapter(tmp_path, {name: torch.zeros(shape) for name, shape in tensors.items()})
    with pytest.raises(CheckpointError, match=rf"^adapter org/one: .*{re.escape(message)}"):
        make_worker(reference("llama").path, adapters=json.dumps({"org/one": str(tmp_path)}))


def test_experts_are_not_adapted(reference, make_worker, tmp_path) -> None:
    name = "base_model.model.model.layers.0.mlp.experts.0.gate_proj"
    save_adapter(tmp_path, {f"{name}.lora_A.weight": torch.zeros(4, 64), f"{name}.lora_B.weight": torch.zeros(32, 4)})
    with pytest.raises(CheckpointError, match="is not part of the model"):
        make_worker(reference("qwen3-moe").path, adapters=json.dumps({"one": str(tmp_path)}))


def test_models_through_transformers_have_no_adapters(reference, make_worker, tmp_path) -> None:
    save_adapter(tmp_path, {f"{Q_PROJ}.lora_A.weight": torch.zeros(4, 64)})
    with pytest.raises(UnsupportedModelError, match="Olmo2ForCausalLM runs through transformers, and so without"):
        make_worker(reference("olmo2").path, adapters=json.dumps({"one": str(tmp_path)}))


def test_files_that_are_missing_or_of_another_kind(tmp_path: Path) -> None:
    with pytest.raises(UnsupportedModelError, match=r"adapter one: adapter_config\.json is missing or cannot be read"):
        LoraAdapter("one", tmp_path)
    (tmp_path / "adapter_config.json").write_text('{"peft_type": "LORA"}')
    (tmp_path / "adapter_model.bin").write_bytes(b"\x80\x02.")
    with pytest.raises(CheckpointError, match=r"adapter one: there is no adapter_model\.safetensors, and other"):
        LoraAdapter("one", tmp_path)
    (tmp_path / "adapter_model.safetensors").write_bytes(b"no header")
    with pytest.raises(CheckpointError, match=r"adapter one: adapter_model\.safetensors cannot be read"):
        LoraAdapter("one", tmp_path)
