"""Runs many simulations, several at once, and keeps what each gave."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import replace
from multiprocessing import get_context
from pathlib import Path
from types import TracebackType
from typing import TypeAlias

from rich.progress import Progress

from bros_benchmarks.evaluation.result import Label, Result
from bros_benchmarks.evaluation.simulation import Simulation, code_digest

#: Labels, and what to run. `experiment` and `policy` are among the labels.
Task: TypeAlias = tuple[dict[str, Label], Simulation]


class Simulations:
    """A pool of processes and a folder of results. Leaving the `with` block ends the processes.

    A simulation that was run before, by the same code, is not run again, whichever experiment asks for it.
    """

    def __init__(self, folder: Path, num_processes: int, progress: Progress) -> None:
        """Results go below `folder`, into a folder for this version of the code."""
        self.folder = folder / code_digest()
        self._progress = progress
        # Not by forking: this process has threads, which draw the progress bar.
        self._pool = ProcessPoolExecutor(num_processes, mp_context=get_context("spawn"))

    def __enter__(self) -> Simulations:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._pool.shutdown(cancel_futures=True)

    def run(self, description: str, tasks: Sequence[Task]) -> list[Result]:
        """Results in the order of the tasks, each with its labels, `seed` among them."""
        bar = self._progress.add_task(description, total=len(tasks))
        cached: dict[str, Result] = {}
        missing: dict[str, Simulation] = {}
        for _, simulation in tasks:
            path = self._cache_path(simulation)
            if path.exists():
                cached[simulation.digest] = Result.read(path)
                self._progress.advance(bar)
            else:
                missing[simulation.digest] = simulation
        futures = {self._pool.submit(simulation.execute): simulation for simulation in missing.values()}
        for future in as_completed(futures):
            simulation, result = futures[future], future.result()
            result.write(self._cache_path(simulation))
            cached[simulation.digest] = result
            self._progress.advance(bar)
        self._progress.remove_task(bar)
        return self.keep(
            replace(cached[simulation.digest], labels={**labels, "seed": simulation.seed})
            for labels, simulation in tasks
        )

    def keep(self, results: Iterable[Result]) -> list[Result]:
        """Put results where figures look for them: a folder each, named by experiment and labels."""
        kept = list(results)
        for result in kept:
            name = "-".join(str(value) for key, value in result.labels.items() if key != "experiment")
            folder = self.folder / str(result.labels["experiment"]) / name.replace("/", "_").replace(" ", "_")
            result.write(folder / "result.json")
        return kept

    def _cache_path(self, simulation: Simulation) -> Path:
        return self.folder / "runs" / f"{simulation.digest}.json"
