"""`make bench-peers`: this server and others, same weights, same load, in turn, with the floor of the machine.

Peers are installed into virtual environments of their own below the folder of results, the first time: gigabytes from
PyPI. In each round every engine is started anew, warmed up and measured, one after the other. All clients start at
once, with prompts of 128 random tokens and 64 new ones, end-of-text ignored; no prefix cache.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Final

from rich.console import Console
from rich.progress import Progress

from bros_benchmarks.checkpoint import SMOLLM2_135M, make_checkpoint
from bros_benchmarks.peers.bros import Bros
from bros_benchmarks.peers.engine import Engine, EngineError
from bros_benchmarks.peers.floor import Floor, measure_machine
from bros_benchmarks.peers.openvino import OpenVino
from bros_benchmarks.peers.report import Record, draw, ratio_table, speed_table, write_csv
from bros_benchmarks.peers.turn import take_turn
from bros_benchmarks.peers.vllm import Vllm

#: By the argument that names it; environments lie in the folder.
_ENGINES: Final[dict[str, Callable[[Path], Engine]]] = {
    "bros": lambda folder: Bros(),
    "bros-int8": lambda folder: Bros("int8"),
    "vllm": Vllm,
    "openvino": lambda folder: OpenVino(folder, "bf16"),
    "openvino-int8": lambda folder: OpenVino(folder, "int8"),
}


def prepare(engines: Sequence[Engine], model: Path, record: Record, console: Console) -> list[Engine]:
    """Those that could be installed; why the others could not is recorded."""
    ready = []
    for engine in engines:
        with console.status(f"installing {engine.name}"):
            try:
                engine.prepare(model)
                ready.append(engine)
            except EngineError as error:
                record.failures[engine.name] = str(error)
    return ready


def main() -> None:
    """Run the rounds; print the tables; write a CSV and a figure."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peers", nargs="+", choices=list(_ENGINES), default=list(_ENGINES), help="in this order")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--clients", type=int, nargs="+", default=[1, 4, 16, 32])
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--folder", type=Path, default=Path("benchmarks/results"))
    arguments = parser.parse_args()
    console = Console(width=180)
    folder = arguments.folder / "peers"
    folder.mkdir(parents=True, exist_ok=True)
    model = make_checkpoint(SMOLLM2_135M, arguments.folder).absolute()
    engines = [_ENGINES[name](folder) for name in arguments.peers]
    record = Record(engines, arguments.clients)
    ready = prepare(engines, model, record, console)
    with Progress(console=Console(stderr=True)) as progress:
        task = progress.add_task("", total=arguments.rounds * len(ready) * (1 + len(arguments.clients)))
        for number in range(arguments.rounds):
            record.floors[number] = Floor(SMOLLM2_135M, measure_machine(arguments.threads))
            for engine in ready:
                progress.update(task, description=f"round {number + 1}, {engine.name}")
                log = folder / f"{engine.name.replace(', ', '-').replace(' ', '-')}.log"
                try:
                    record.turns[engine.name, number] = take_turn(
                        engine, model, arguments.threads, arguments.clients, log, lambda: progress.advance(task)
                    )
                except EngineError as error:
                    record.failures[engine.name] = f"round {number + 1}: {error}"
    for number, floor in record.floors.items():
        machine = floor.machine
        console.print(
            f"round {number + 1}: memory {machine.bandwidth / 1e9:.1f} GB/s, bf16 {machine.peak / 1e9:.0f} GFLOP/s"
        )
    console.print(speed_table(record))
    console.print(ratio_table(record))
    write_csv(record, folder / "peers.csv")
    draw(record, folder / "peers.png")
    console.print(f"{folder / 'peers.csv'}, {folder / 'peers.png'}")


if __name__ == "__main__":
    main()
