"""How a rank is started: its options, and the command line that carries them from the supervisor to the rank.

Torch-free: the router's supervisor imports this module.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import MISSING, dataclass, field, fields
from pathlib import Path
from typing import Any


def _option(help_text: str, default: Any = MISSING) -> Any:
    return field(default=default, metadata={"help": help_text})


@dataclass(frozen=True, kw_only=True)
class ShardOptions:
    """Everything a rank needs to know before its first message. Ranks of a group differ in `rank` alone."""

    endpoint: str = _option("ZeroMQ endpoint of the router (ipc://… or tcp://…)")
    rendezvous: str = _option("init_method of torch.distributed (file://…), unused by a single rank")
    model_path: str = _option("folder with config.json and safetensors")
    model_id: str = _option("name of the model as clients know it")
    model_sha: str = _option("commit of the model on the hub, if known", "")
    tokenizer_path: str = _option("tokenizer.json that grammars are compiled for; empty: nothing is guided", "")
    eos_token_ids: str = _option("ids of the tokens that may end a guided reply, separated by commas", "")
    group: str = _option("name of the tensor-parallel group", "g0")
    rank: int = _option("this rank, from 0", 0)
    world_size: int = _option("ranks in the group", 1)
    generation: int = _option("how often the group was started", 0)
    device: str = _option("auto, cpu or cuda", "auto")
    dtype: str = _option("auto, float16, bfloat16 or float32", "auto")
    kernels: str = _option("auto, cpu or torch", "auto")
    quantize: str = _option("int8; empty: weights are served as the dtype says", "")
    block_size: int = _option("slots in a KV block: a power of two from 16 to 256", 64)
    kv_memory_bytes: int = _option("bytes of this rank's KV region; 0: measure what is free", 0)
    kv_slots_limit: int = _option("most slots of the KV region; 0: no limit", 0)
    gpu_memory_fraction: float = _option("share of a GPU's memory that the rank may use", 1.0)
    host_memory_bytes: int = _option("bytes of this rank's host pool; 0: as much as the region, if free; -1: none", 0)
    max_length: int = _option("most tokens a sequence may hold; 0: what the model was made for", 0)
    max_batch_tokens: int = _option("most tokens in a step (sizes the warm-up)", 512)
    profile_grid: str = _option("step times to measure, unless they are known: quick or full", "quick")
    rope_scaling: str = _option("linear or dynamic, overriding the model's; empty: as the model says", "")
    rope_factor: float = _option("factor of rope_scaling", 1.0)
    adapters: str = _option("JSON object: folders of LoRA adapters by name, in the order of their indices", "{}")
    num_threads: int = _option("CPU threads of this rank; 0: cores divided by ranks", 0)

    @property
    def adapter_folders(self) -> dict[str, Path]:
        """What `adapters` says."""
        return {name: Path(folder) for name, folder in json.loads(self.adapters).items()}

    def to_argv(self) -> list[str]:
        """The command-line arguments that `from_argv` turns back into these options."""
        argv = []
        for option in fields(self):
            argv += [f"--{option.name.replace('_', '-')}", str(getattr(self, option.name))]
        return argv

    @classmethod
    def from_argv(cls, argv: list[str]) -> ShardOptions:
        """Parse a command line; ends the process with status 2 and a usage message where it is wrong."""
        parser = argparse.ArgumentParser(prog="bros-shard", description="One tensor-parallel rank of bros.")
        types: dict[str, type] = {"str": str, "int": int, "float": float}
        for option in fields(cls):
            is_required = option.default is MISSING
            parser.add_argument(
                f"--{option.name.replace('_', '-')}",
                type=types[str(option.type)],
                required=is_required,
                default=None if is_required else option.default,
                help=option.metadata["help"],
            )
        return cls(**vars(parser.parse_args(argv)))
