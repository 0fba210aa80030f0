"""What LoRA adapters cost a step: `python -m bros_benchmarks.adapters`, or `make bench-adapters`.

Ranks with SmolLM2-135M's shape and random weights, one without adapters and one with four of rank 16 on all
projections, run the same made-up steps, one after the other.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Final

import msgspec
import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table
from safetensors.torch import save_file

from bros_benchmarks.checkpoint import SMOLLM2_135M, Shape
from bros_benchmarks.rank_process import become_rank, rank_options
from bros_shard.protocol import StepPlan
from bros_shard.rehearsal import Rehearsal, chunk, decodes
from bros_shard.worker import StepOutput, Worker

_NUM_ADAPTERS: Final = 4
_RANK: Final = 16
#: Which adapter a sequence goes through, by what the table calls it.
_ROUTES: Final[dict[str, Callable[[int], int | None]]] = {
    "no adapter named": lambda sequence_id: None,
    "all through one": lambda sequence_id: 0,
    "through four": lambda sequence_id: sequence_id % _NUM_ADAPTERS,
}
_SCENES: Final = {
    "1 decode, context 128": decodes(1, 128),
    "4 decodes, context 128": decodes(4, 128),
    "32 decodes, context 160": decodes(32, 160),
    "prompt of 512": chunk(0, 512),
    "20 decodes, context 300, and a prompt of 200": decodes(20, 300) + chunk(0, 200),
}


def write_adapter(folder: Path, shape: Shape, seed: int) -> None:
    """A random adapter of all projections, as PEFT saves it."""
    generator = torch.Generator().manual_seed(seed)
    head_dim = shape.hidden_size // shape.num_heads
    kv_size = shape.num_kv_heads * head_dim
    sizes = {
        "self_attn.q_proj": (shape.hidden_size, shape.hidden_size),
        "self_attn.k_proj": (kv_size, shape.hidden_size),
        "self_attn.v_proj": (kv_size, shape.hidden_size),
        "self_attn.o_proj": (shape.hidden_size, shape.hidden_size),
        "mlp.gate_proj": (shape.intermediate_size, shape.hidden_size),
        "mlp.up_proj": (shape.intermediate_size, shape.hidden_size),
        "mlp.down_proj": (shape.hidden_size, shape.intermediate_size),
    }
    tensors = {}
    for layer in range(shape.num_layers):
        for projection, (out_features, in_features) in sizes.items():
            name = f"base_model.model.model.layers.{layer}.{projection}"
            tensors[f"{name}.lora_A.weight"] = torch.randn(_RANK, in_features, generator=generator)
            tensors[f"{name}.lora_B.weight"] = torch.randn(out_features, _RANK, generator=generator)
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors, folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": _RANK, "lora_alpha": _RANK}))


def routed(worker: Worker, route: Callable[[int], int | None]) -> Callable[[StepPlan], StepOutput]:
    """`worker.execute`, of sequences that go through adapters."""

    def execute(plan: StepPlan) -> StepOutput:
        new = [msgspec.structs.replace(each, adapter=route(each.sequence_id)) for each in plan.new_sequences]
        return worker.execute(msgspec.structs.replace(plan, new_sequences=new))

    return execute


def main() -> None:
    """Measure, and print the table: median times, and the medians of the rounds' ratios to the plain rank's."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--folder", type=Path, default=Path("benchmarks/results"))
    arguments = parser.parse_args()
    options = replace(rank_options(arguments.folder, arguments.threads), host_memory_bytes=-1)
    become_rank("bros_benchmarks.adapters", options)
    folders = {f"a{index}": arguments.folder / "adapters" / f"a{index}" for index in range(_NUM_ADAPTERS)}
    for index, folder in enumerate(folders.values()):
        write_adapter(folder, SMOLLM2_135M, index)
    plain = Worker(options)
    adapted = Worker(replace(options, adapters=json.dumps({name: str(path) for name, path in folders.items()})))
    runs: dict[str, tuple[Worker, Callable[[StepPlan], StepOutput]]] = {"no adapters": (plain, plain.execute)}
    runs |= {name: (adapted, routed(adapted, route)) for name, route in _ROUTES.items()}
    seconds: dict[str, dict[str, list[float]]] = {title: {name: [] for name in runs} for title in _SCENES}
    for number in track(range(arguments.rounds + 1), "rounds", console=Console(stderr=True)):
        for title, scene in _SCENES.items():
            for name, (worker, execute) in runs.items():
                worker.cache.touch(scene.num_blocks(worker.cache.block_size))
                taken_s = Rehearsal(execute, worker.num_blocks, worker.cache.block_size).measure(scene)
                if number > 0:
                    seconds[title][name].append(taken_s)
    table = Table("step", *(f"{name}: ms" for name in runs), *(f"{name} / no adapters" for name in _ROUTES))
    for title, times in seconds.items():
        medians = [f"{1e3 * statistics.median(times[name]):.1f}" for name in runs]
        ratios = [
            statistics.median(x / y for x, y in zip(times[name], times["no adapters"], strict=True)) for name in _ROUTES
        ]
        table.add_row(title, *medians, *(f"{ratio:.2f}" for ratio in ratios))
    Console(width=180).print(table)


if __name__ == "__main__":
    main()
