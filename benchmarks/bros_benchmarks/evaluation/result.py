"""What a run gave, with the labels by which tables and figures find it, and what several seeds say together."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Final, TypeAlias

from bros_benchmarks.evaluation.recorder import read_json, write_json
from bros_router.simulation.record import Summary

Label: TypeAlias = str | float | bool | None


@dataclass(frozen=True, slots=True)
class Result:
    """One run."""

    #: `experiment`, `policy`, `rate`, `seed` and whatever else tells it from others.
    labels: dict[str, Label]
    summary: Summary
    #: Further figures, by name with unit.
    extra: dict[str, float | None] = field(default_factory=dict)
    #: Columns of equal length, where an experiment is about the course of a run.
    series: dict[str, list[float]] = field(default_factory=dict)

    def matches(self, **labels: Label) -> bool:
        """Whether it has all these labels."""
        return all(self.labels.get(name) == value for name, value in labels.items())

    def figure(self, name: str) -> float | None:
        """A field of the summary that is a number, or an extra figure."""
        if name in self.extra:
            return self.extra[name]
        value = getattr(self.summary, name)
        return None if value is None else float(value)

    def write(self, path: Path) -> None:
        """As JSON."""
        write_json(path, asdict(self))

    @classmethod
    def read(cls, path: Path) -> Result:
        """What `write` wrote."""
        fields: dict[str, Any] = read_json(path)
        return cls(fields["labels"], Summary(**fields["summary"]), fields["extra"], fields["series"])


def read_results(folder: Path) -> list[Result]:
    """Every result below a folder, in the order of their paths."""
    return [Result.read(path) for path in sorted(folder.rglob("result.json"))]


@dataclass(frozen=True, slots=True)
class Estimate:
    """A mean over seeds."""

    mean: float
    #: Of the 95 % confidence interval; `None` for a single seed.
    half_width: float | None


#: Two-sided 95 % quantiles of Student's t by degrees of freedom; beyond the table, the next smaller entry.
_STUDENT_T: Final = {1: 12.706, 2: 4.303, 3: 3.182, 4: 2.776, 5: 2.571, 6: 2.447, 7: 2.365, 8: 2.306, 9: 2.262}


def estimate(values: Iterable[float | None]) -> Estimate | None:
    """Mean and confidence interval over the seeds that have the figure; `None`: none has."""
    sample = [value for value in values if value is not None]
    if not sample:
        return None
    if len(sample) == 1:
        return Estimate(sample[0], None)
    quantile = _STUDENT_T[min(len(sample) - 1, max(_STUDENT_T))]
    return Estimate(statistics.fmean(sample), quantile * statistics.stdev(sample) / math.sqrt(len(sample)))


def attainment(results: Sequence[Result], name: str = "joint_attainment") -> float | None:
    """The share of all real-time requests of all seeds together; `None`: there were none."""
    num_met = sum(result.summary.num_rt * (result.figure(name) or 0.0) for result in results)
    num_rt = sum(result.summary.num_rt for result in results)
    return num_met / num_rt if num_rt else None


def by_label(results: Iterable[Result], name: str) -> dict[Label, list[Result]]:
    """Results grouped by a label, in the order in which its values appear."""
    groups: dict[Label, list[Result]] = {}
    for result in results:
        groups.setdefault(result.labels.get(name), []).append(result)
    return groups


def total(results: Sequence[Result], count: Callable[[Summary], int]) -> int:
    """A count over all seeds."""
    return sum(count(result.summary) for result in results)
