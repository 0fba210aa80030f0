"""Tables, a CSV and a figure of what the turns said."""

from __future__ import annotations

import csv
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final, TypeAlias

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from rich.table import Table

from bros_benchmarks.peers.engine import Engine
from bros_benchmarks.peers.floor import Floor
from bros_benchmarks.peers.turn import NUM_LONG_PROMPT_TOKENS, NUM_NEW_TOKENS, NUM_PROMPT_TOKENS, Turn

#: A number of a turn.
Value: TypeAlias = Callable[[Turn], float]
_COLUMNS: Final = (
    *("engine", "round", "clients", "tokens_per_s", "ttft_p50_ms", "tpot_p50_ms"),
    *("prefill_tokens_per_s", "other_load"),
)


@dataclass(frozen=True, slots=True)
class Speed:
    """Tokens a second, of a turn and of the floor under it."""

    title: str
    of_turn: Value
    of_floor: Callable[[Floor], float]


PREFILL: Final = Speed(
    "prefill",
    lambda turn: turn.prefill_tokens_per_s,
    lambda floor: NUM_LONG_PROMPT_TOKENS / floor.prefill_s(NUM_LONG_PROMPT_TOKENS),
)


def output_speed(clients: int) -> Speed:
    """Output with so many clients, prefill included."""
    return Speed(
        f"{clients} client{'s' * (clients > 1)}",
        lambda turn: turn.loads[clients].tokens_per_s,
        lambda floor: floor.tokens_per_s(clients, NUM_PROMPT_TOKENS, NUM_NEW_TOKENS),
    )


@dataclass
class Record:
    """What happened so far."""

    engines: Sequence[Engine]
    clients: Sequence[int]
    #: By engine and round.
    turns: dict[tuple[str, int], Turn] = field(default_factory=dict)
    #: By round.
    floors: dict[int, Floor] = field(default_factory=dict)
    #: Why an engine has fewer turns than there were rounds, or none.
    failures: dict[str, str] = field(default_factory=dict)

    def median(self, name: str, value: Value) -> float | None:
        """Over an engine's turns; nothing if it had none."""
        values = [value(turn) for (engine, _), turn in self.turns.items() if engine == name]
        return statistics.median(values) if values else None

    def ratio(self, name: str, other: str, value: Value) -> float | None:
        """Median of the ratios within each round in which both had their turn."""
        ratios = [
            value(turn) / value(self.turns[other, number])
            for (engine, number), turn in self.turns.items()
            if engine == name and (other, number) in self.turns
        ]
        return statistics.median(ratios) if ratios else None

    def of_floor(self, name: str, speed: Speed) -> float | None:
        """Median over an engine's turns of what it reached of the best that its round's machine allowed."""
        ratios = [
            speed.of_turn(turn) / speed.of_floor(self.floors[number])
            for (engine, number), turn in self.turns.items()
            if engine == name
        ]
        return statistics.median(ratios) if ratios else None

    def best(self, speed: Speed) -> float:
        """The floor's, median over the rounds."""
        return statistics.median(map(speed.of_floor, self.floors.values()))

    def speeds(self) -> list[Speed]:
        """What engines are compared by."""
        return [PREFILL, *map(output_speed, self.clients)]


def speed_table(record: Record) -> Table:
    """Medians over the rounds."""
    levels = [f"{output_speed(clients).title}: tok/s, TTFT / TPOT ms" for clients in record.clients]
    table = Table("engine", f"prompt of {NUM_LONG_PROMPT_TOKENS}: tok/s", *levels, "rounds", "others' load")
    for engine in record.engines:
        num_turns = sum(name == engine.name for name, _ in record.turns)
        if num_turns:
            others = max(turn.other_load for (name, _), turn in record.turns.items() if name == engine.name)
            cells = [_level(record, engine.name, clients) for clients in record.clients]
            prefill = _text(record.median(engine.name, PREFILL.of_turn), "{:,.0f}")
            table.add_row(engine.name, prefill, *cells, str(num_turns), f"{100 * others:.0f} %")
        if engine.name in record.failures:
            table.add_row(f"{engine.name}: {record.failures[engine.name]}")
    table.add_row("floor, bf16", *(f"{record.best(speed):,.0f}" for speed in record.speeds()))
    return table


def ratio_table(record: Record) -> Table:
    """Speeds of this server by those of each peer with the same weights, and by the floor, where they are bfloat16."""
    table = Table("ratio", *(speed.title for speed in record.speeds()))
    ours = {engine.weights: engine.name for engine in record.engines if engine.name.startswith("bros")}
    for engine in record.engines:
        own = ours.get(engine.weights, engine.name)
        if own != engine.name:
            ratios = [record.ratio(own, engine.name, speed.of_turn) for speed in record.speeds()]
            table.add_row(f"{own} / {engine.name}", *(_text(ratio, "{:.2f}") for ratio in ratios))
    for engine in record.engines:
        if engine.weights == "bf16":
            shares = [record.of_floor(engine.name, speed) for speed in record.speeds()]
            table.add_row(f"{engine.name} / floor", *(_text(share, "{:.2f}") for share in shares))
    return table


def write_csv(record: Record, path: Path) -> None:
    """A row for each turn and number of clients; the floor is an engine."""
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(_COLUMNS)
        for (name, number), turn in record.turns.items():
            for clients, load in turn.loads.items():
                speeds = (load.tokens_per_s, load.ttft_ms(50), load.tpot_ms(50), turn.prefill_tokens_per_s)
                writer.writerow(
                    (name, number, clients, *(f"{speed:.2f}" for speed in speeds), f"{turn.other_load:.3f}")
                )
        for number, floor in record.floors.items():
            for clients in record.clients:
                output, prefill = (speed.of_floor(floor) for speed in (output_speed(clients), PREFILL))
                writer.writerow(("floor", number, clients, f"{output:.2f}", "", "", f"{prefill:.2f}", ""))


def draw(record: Record, path: Path) -> None:
    """Output, TTFT and TPOT over the number of clients; medians of the rounds."""
    panels: list[tuple[str, Callable[[int], Value]]] = [
        ("output tokens / s", lambda clients: output_speed(clients).of_turn),
        ("TTFT p50 (ms)", ttft_ms),
        ("TPOT p50 (ms)", tpot_ms),
    ]
    figure, all_axes = plt.subplots(1, len(panels), figsize=(13, 4))
    for axes, (title, value) in zip(all_axes, panels, strict=True):
        for engine in record.engines:
            medians = [record.median(engine.name, value(clients)) for clients in record.clients]
            points = [(x, y) for x, y in zip(record.clients, medians, strict=True) if y is not None]
            if points:
                axes.plot(*zip(*points, strict=True), marker="o", label=engine.name)
        axes.set_xscale("log", base=2)
        axes.set_xticks(record.clients, [str(clients) for clients in record.clients])
        axes.set_xlabel("clients")
        axes.set_ylabel(title)
        axes.set_ylim(bottom=0)
    bests = [record.best(output_speed(clients)) for clients in record.clients]
    all_axes[0].plot(record.clients, bests, "k--", label="floor, bf16")
    all_axes[0].legend()
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    plt.close(figure)


def ttft_ms(clients: int) -> Value:
    """Median over the requests."""
    return lambda turn: turn.loads[clients].ttft_ms(50)


def tpot_ms(clients: int) -> Value:
    """Median over the requests."""
    return lambda turn: turn.loads[clients].tpot_ms(50)


def _level(record: Record, name: str, clients: int) -> str:
    values = (output_speed(clients).of_turn, ttft_ms(clients), tpot_ms(clients))
    output, ttft, tpot = (record.median(name, value) for value in values)
    return f"{_text(output, '{:.1f}')}, {_text(ttft, '{:,.0f}')} / {_text(tpot, '{:.0f}')}"


def _text(value: float | None, form: str) -> str:
    return "" if value is None else form.format(value)
