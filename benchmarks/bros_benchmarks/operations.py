"""Single operations of the C kernels beside what the machine can do: `python -m bros_benchmarks.operations`.

Products of one layer's shapes with weights in each format, over so many copies that none lies in a cache, and attention
of decodes. Formats are measured in turn; what is read of weights, or of keys and values, is compared with the bandwidth
of a sum over as much memory.
"""

from __future__ import annotations

import argparse
import os
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Final

import torch
from rich.console import Console
from rich.table import Table

from bros_benchmarks.checkpoint import SMOLLM2_135M
from bros_benchmarks.rank_process import become_rank, rank_options
from bros_kernels.attn_meta import AttnMeta
from bros_kernels.kernels import select_kernels
from bros_kernels.paged_attention import AttentionLayer

_CPU: Final = torch.device("cpu")
_BLOCK_SIZE: Final = 64
#: Bytes read in a round, well beyond any cache.
_WORKING_SET_BYTES: Final = 192 * 2**20
#: Bytes of a weight's number, by format.
FORMATS: Final = {"bfloat16": 2, "int8": 1, "float32": 4}
#: (out_features, in_features) of a layer of SmolLM2-135M.
SHAPES: Final = ((960, 576), (576, 576), (3072, 576), (576, 1536))
NUM_ROWS: Final = (1, 4, 16, 32, 64, 512)
#: (sequences, context)
DECODES: Final = ((1, 512), (1, 4096), (2, 4096), (4, 4096), (16, 4096), (64, 512))


def seconds_of(run: Callable[[], object]) -> float:
    started_s = time.perf_counter()
    run()
    return time.perf_counter() - started_s


def measure(runs: dict[str, Callable[[], object]], num_rounds: int) -> dict[str, float]:
    """Median seconds of each, run in turn; one more round warms up."""
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for number in range(num_rounds + 1):
        for name, run in runs.items():
            taken_s = seconds_of(run)
            if number > 0:
                seconds[name].append(taken_s)
    return {name: statistics.median(values) for name, values in seconds.items()}


def read_bandwidth(num_rounds: int, num_threads: int) -> float:
    """Bytes a second of a sum over memory that no cache holds."""
    memory = torch.ones(_WORKING_SET_BYTES // 4)
    torch.set_num_threads(num_threads)
    seconds = measure({"sum": memory.sum}, num_rounds)["sum"]
    torch.set_num_threads(1)
    return _WORKING_SET_BYTES / seconds


def product_table(num_rounds: int, num_threads: int) -> Table:
    """All products of a layer, one after the other, over as many layers as fill the working set."""
    num_weights = sum(rows * columns for rows, columns in SHAPES)
    table = Table("rows", *(f"{name}: us, GB/s, GOP/s" for name in FORMATS), "bfloat16 / int8")
    linears = {}
    for name, num_bytes in FORMATS.items():
        dtype = torch.float32 if name == "float32" else torch.bfloat16
        kernels = select_kernels("cpu", _CPU, dtype, num_threads, has_int8_weights=name == "int8")
        num_layers = -(-_WORKING_SET_BYTES // num_bytes // num_weights)
        linears[name] = [[kernels.linear(torch.randn(shape).to(dtype)) for shape in SHAPES] for _ in range(num_layers)]
    for num_rows in NUM_ROWS:
        runs = {}
        for name in FORMATS:
            dtype = torch.float32 if name == "float32" else torch.bfloat16
            inputs = [torch.randn(num_rows, columns).to(dtype) for _, columns in SHAPES]
            num_layers = min(len(linears[name]), max(8, 4096 // num_rows))

            def run(name: str = name, inputs: Sequence[torch.Tensor] = inputs, num_layers: int = num_layers) -> None:
                for layer in linears[name][:num_layers]:
                    for linear, x in zip(layer, inputs, strict=True):
                        linear(x)

            runs[name] = (run, num_layers)
        seconds = measure({name: run for name, (run, _) in runs.items()}, num_rounds)
        per_layer_s = {name: seconds[name] / runs[name][1] for name in FORMATS}
        columns = [
            f"{1e6 * per_layer_s[name]:.0f}, {num_weights * num_bytes / per_layer_s[name] / 1e9:.1f}, "
            f"{2 * num_weights * num_rows / per_layer_s[name] / 1e9:.0f}"
            for name, num_bytes in FORMATS.items()
        ]
        table.add_row(str(num_rows), *columns, f"{per_layer_s['bfloat16'] / per_layer_s['int8']:.2f}")
    return table


def decode_run(num_sequences: int, context: int, num_threads: int) -> tuple[Callable[[], object], int]:
    """Attention of decodes in each of many layers, and the bytes of keys and values that are read."""
    shape = SMOLLM2_135M
    head_dim = shape.hidden_size // shape.num_heads
    layer = AttentionLayer(
        num_heads=shape.num_heads, num_kv_heads=shape.num_kv_heads, head_dim=head_dim, scale=head_dim**-0.5
    )
    kernels = select_kernels("cpu", _CPU, torch.bfloat16, num_threads)
    width = -(-context // _BLOCK_SIZE)
    num_blocks = num_sequences * width
    layer_bytes = 2 * num_blocks * _BLOCK_SIZE * shape.num_kv_heads * head_dim * 2
    num_layers = -(-_WORKING_SET_BYTES // layer_bytes)
    regions = torch.randn(num_layers, 2, num_blocks, _BLOCK_SIZE, shape.num_kv_heads, head_dim, dtype=torch.bfloat16)
    table = torch.randperm(num_blocks, dtype=torch.int32).view(num_sequences, width)
    meta = AttnMeta(
        block_table=table,
        seq_lens=torch.full((num_sequences,), context, dtype=torch.int32),
        cu_q=torch.arange(num_sequences + 1, dtype=torch.int32),
        slot_mapping=table[:, -1].long() * _BLOCK_SIZE + (context - 1) % _BLOCK_SIZE,
        max_q=1,
        max_k=context,
        n_decode=num_sequences,
        block_size=_BLOCK_SIZE,
    )
    attention = kernels.attention(meta)
    qkv = torch.randn(num_sequences, (shape.num_heads + 2 * shape.num_kv_heads) * head_dim, dtype=torch.bfloat16)

    def run() -> None:
        for region in regions:
            attention.attend(layer, qkv, None, region[0], region[1])

    return run, num_layers * layer_bytes


def decode_table(bandwidth: float, num_rounds: int, num_threads: int) -> Table:
    """How much of the memory's bandwidth attention of decodes reaches."""
    table = Table("sequences", "context", "GB/s", "of the bandwidth")
    for num_sequences, context in DECODES:
        run, num_bytes = decode_run(num_sequences, context, num_threads)
        rate = num_bytes / measure({"run": run}, num_rounds)["run"]
        table.add_row(str(num_sequences), str(context), f"{rate / 1e9:.1f}", f"{100 * rate / bandwidth:.0f} %")
    return table


def main() -> None:
    """Measure, and print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--only", choices=("products", "attention"), help="measure these alone")
    parser.add_argument("--folder", type=Path, default=Path("benchmarks/results"))
    arguments = parser.parse_args()
    num_rounds, num_threads = arguments.rounds, arguments.threads
    become_rank("bros_benchmarks.operations", rank_options(arguments.folder, num_threads))
    console = Console(width=140)
    bandwidth = read_bandwidth(num_rounds, num_threads)
    console.print(f"reading memory: {bandwidth / 1e9:.1f} GB/s")
    if arguments.only != "attention":
        console.print(product_table(num_rounds, num_threads))
    if arguments.only != "products":
        console.print(decode_table(bandwidth, num_rounds, num_threads))


if __name__ == "__main__":
    main()
