"""Figures F1 to F11 from recorded results: a PNG, and a CSV with what it shows, for each.

`python -m bros_benchmarks.evaluation.figures FOLDER` draws what the results below a folder suffice for.
"""

from __future__ import annotations

import argparse
import csv
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final, TypeAlias

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from bros_benchmarks.evaluation.recorder import read_json
from bros_benchmarks.evaluation.result import Result, attainment, by_label, estimate, read_results
from bros_router.simulation.record import percentile

#: The same in every figure.
_COLOURS: Final = {
    "bros": "tab:blue",
    "bros-paper": "tab:cyan",
    "fcfs": "tab:red",
    "tgi": "tab:orange",
    "priority": "tab:green",
    "edf": "tab:purple",
    "rr": "tab:brown",
    "static": "tab:olive",
    "RT alone": "black",
    "BE alone": "grey",
    "bros, block": "navy",
    "bros, recompute": "teal",
    "bros, cap reset": "teal",
    "bros, cap off": "navy",
}
_OTHER_COLOUR: Final = "tab:pink"

#: Columns and rows of the CSV beside a figure.
Rows: TypeAlias = list[tuple[object, ...]]


@dataclass(frozen=True, slots=True)
class Drawing:
    """A figure and the numbers it shows."""

    figure: Figure
    columns: tuple[str, ...]
    rows: Rows

    def write(self, path: Path) -> Path:
        """`path` is that of the PNG; the CSV lies beside it."""
        path.parent.mkdir(parents=True, exist_ok=True)
        self.figure.tight_layout()
        self.figure.savefig(path, dpi=110)
        plt.close(self.figure)
        with path.with_suffix(".csv").open("w", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(self.columns)
            writer.writerows(self.rows)
        return path


def draw_all(folder: Path) -> list[Path]:
    """Draw every figure that the results below `folder` suffice for, into `folder/figures`."""
    results = read_results(folder)
    by_scenario = by_label(results, "scenario")
    drawn = []
    for scenario, group in by_scenario.items():
        suffix = f"-{str(scenario).replace(' ', '')}" if len(by_scenario) > 1 else ""
        for name, draw in FIGURES.items():
            drawing = draw(group)
            if drawing is not None:
                drawn.append(drawing.write(folder / "figures" / f"{name}{suffix}.png"))
    path = folder / "cost.json"
    if path.exists():
        drawn.append(draw_cost(read_json(path)).write(folder / "figures" / "F8-scheduler-cost.png"))
    return drawn


# --- over the rate


def draw_latency(results: Sequence[Result]) -> Drawing | None:
    """F1: normalised latency of real-time requests over their rate."""
    return _over_rate(
        _of(results, "rates"), [("rt_normalised_latency_s", "RT latency per output token (s, mean)", 1.0, "log")]
    )


def draw_attainment(results: Sequence[Result]) -> Drawing | None:
    """F2: shares of real-time requests inside their targets, over their rate."""
    kinds = {"ttft": "TTFT", "tpot": "TPOT", "joint": "joint"}
    panels = [(f"{kind}_attainment", f"{name} attainment (%)", 100.0, "linear") for kind, name in kinds.items()]
    return _over_rate(_of(results, "rates"), panels)


def draw_best_effort(results: Sequence[Result]) -> Drawing | None:
    """F3: best-effort throughput over the real-time rate, with what it is without and what it can be at most."""
    chosen = _of(results, "rates")
    drawing = _over_rate(chosen, [("be_tokens_per_s", "best-effort tokens / s", 1.0, "linear")])
    if drawing is None:
        return None
    [axes] = drawing.figure.axes
    only = [value for result in chosen if (value := result.extra.get("be_only")) is not None]
    if only:
        axes.axhline(only[0], color="grey", linestyle=":", label="best-effort only")
        drawing.rows.append(("best-effort only", "", "be_tokens_per_s", only[0], ""))
        bounds = {
            float(str(rate)): bound.mean
            for rate, runs in by_label([r for r in chosen if r.matches(policy="bros")], "rate").items()
            if (bound := estimate(run.extra.get("be_bound") for run in runs)) is not None
        }
        axes.plot(sorted(bounds), [bounds[rate] for rate in sorted(bounds)], "k--", label="bound", linewidth=1)
        drawing.rows.extend(("bound", rate, "be_tokens_per_s", bounds[rate], "") for rate in sorted(bounds))
    axes.legend(fontsize=8)
    return drawing


def draw_pure_rt(results: Sequence[Result]) -> Drawing | None:
    """F7: real-time requests without best-effort load."""
    return _over_rate(
        _of(results, "pure-rt"),
        [
            ("rt_normalised_latency_s", "RT latency per output token (s, mean)", 1.0, "log"),
            ("joint_attainment", "joint attainment (%)", 100.0, "linear"),
        ],
    )


def _over_rate(results: Sequence[Result], panels: Sequence[tuple[str, str, float, str]]) -> Drawing | None:
    return _curves(results, "rate", "real-time requests / s", panels)


# --- over something else


def draw_slo_scales(results: Sequence[Result]) -> Drawing | None:
    """F4: attainment over the tightness of the targets."""
    chosen = _of(results, "slo")
    panels = [
        ("joint_attainment", "joint attainment (%)", 100.0, "linear"),
        ("be_tokens_per_s", "best-effort tokens / s", 1.0, "linear"),
    ]
    return _curves(chosen, "slo_scale", "targets, as multiples of the unloaded latency", panels)


def draw_kv_pressure(results: Sequence[Result]) -> Drawing | None:
    """F11: what a smaller KV region does."""
    panels = [
        ("joint_attainment", "joint attainment (%)", 100.0, "linear"),
        ("be_tokens_per_s", "best-effort tokens / s", 1.0, "linear"),
    ]
    return _curves(_of(results, "kv"), "kv_share", "KV region, as a share of the whole", panels)


def draw_pareto(results: Sequence[Result]) -> Drawing | None:
    """F5: real-time attainment against best-effort throughput: every setting of every policy that was tried."""
    chosen = _of(results, "tuning")
    if not chosen:
        return None
    # Tuning is at R* and at a lower rate: the picture is about R*.
    rate = max(float(str(result.labels["rate"])) for result in chosen)
    figure, axes = plt.subplots(figsize=(6, 4.5))
    rows: Rows = []
    groups: dict[str, list[Result]] = {}
    for result in chosen:
        if result.labels["rate"] == rate:
            groups.setdefault(str(result.labels["policy"]).split(" ")[0], []).append(result)
    for policy, runs in groups.items():
        points = [(100 * (run.summary.joint_attainment or 0.0), run.summary.be_tokens_per_s) for run in runs]
        shares, tokens = zip(*points, strict=True)
        axes.scatter(shares, tokens, s=18, color=_colour(policy), label=policy)
        rows += [(run.labels["policy"], rate, *point) for run, point in zip(runs, points, strict=True)]
    axes.set(xlabel="joint attainment (%)", ylabel="best-effort tokens / s", title=f"at {rate:.2f} RT requests / s")
    axes.legend(fontsize=8)
    axes.grid(alpha=0.3)
    return Drawing(figure, ("setting", "rate", "joint_attainment_percent", "be_tokens_per_s"), rows)


_ABLATION_PANELS: Final = (
    ("joint_attainment", "joint attainment (%)", 100.0),
    ("be_tokens_per_s", "best-effort tokens / s", 1.0),
    ("rt_normalised_latency_s", "RT latency per output token (s)", 1.0),
)


def draw_ablation(results: Sequence[Result]) -> Drawing | None:
    """F6: `bros` with one part at a time switched off."""
    chosen = _of(results, "ablation")
    if not chosen:
        return None
    conditions = by_label(chosen, "condition")
    figure, grid = plt.subplots(
        len(conditions), len(_ABLATION_PANELS), figsize=(15, 3.8 * len(conditions)), squeeze=False
    )
    rows: Rows = []
    for (condition, group), row in zip(conditions.items(), grid, strict=True):
        variants = by_label(group, "policy")
        # From the bottom up: what everything is compared with comes on top.
        names = sorted(map(str, variants), key=lambda name: (name == "bros", name))
        for axes, (name, text, factor) in zip(row, _ABLATION_PANELS, strict=True):
            values = [factor * (_pooled(variants[variant], name) or 0.0) for variant in names]
            colours = ["tab:blue" if variant == "bros" else "lightsteelblue" for variant in names]
            axes.barh(names, values, color=colours)
            axes.set(xlabel=text, title=str(condition))
            axes.tick_params(labelsize=8)
            axes.grid(alpha=0.3, axis="x")
            rows += [(condition, variant, name, value) for variant, value in zip(names, values, strict=True)]
    return Drawing(figure, ("condition", "variant", "figure", "value"), rows)


def draw_model_error(results: Sequence[Result]) -> Drawing | None:
    """F9: how far the scheduler's predictions of step times were off."""
    chosen = [run for run in _of(results, "common") if run.extra.get("prediction_error") is not None]
    if not chosen:
        return None
    figure, axes = plt.subplots(figsize=(6, 3.5))
    rows: Rows = []
    for policy, runs in by_label(chosen, "policy").items():
        value = estimate(run.extra["prediction_error"] for run in runs)
        assert value is not None
        axes.bar(str(policy), 100 * value.mean, color=_colour(str(policy)))
        rows.append((policy, 100 * value.mean, len(runs)))
    axes.set(ylabel="mean |predicted - actual| / actual (%)")
    axes.tick_params(axis="x", labelrotation=45, labelsize=8)
    axes.grid(alpha=0.3, axis="y")
    return Drawing(figure, ("policy", "error_percent", "num_runs"), rows)


def draw_burst(results: Sequence[Result], bin_s: float = 5.0) -> Drawing | None:
    """F10: 99th percentile of the time to the first token around a burst, by the time of arrival."""
    chosen = _of(results, "burst")
    if not chosen:
        return None
    figure, axes = plt.subplots(figsize=(7, 4))
    rows: Rows = []
    for policy, runs in by_label(chosen, "policy").items():
        bins: dict[int, list[float]] = {}
        for run in runs:
            for offered_s, ttft_s in zip(run.series["offered_s"], run.series["ttft_s"], strict=True):
                bins.setdefault(int(offered_s // bin_s), []).append(ttft_s)
        curve = [(place * bin_s, percentile(bins[place], 99) or 0.0, len(bins[place])) for place in sorted(bins)]
        axes.plot([at for at, _, _ in curve], [value for _, value, _ in curve], label=policy, color=_colour(policy))
        rows += [(policy, *point) for point in curve]
    axes.set(xlabel="time of arrival (s)", ylabel="p99 time to first token (s)", yscale="log")
    axes.legend(fontsize=8)
    axes.grid(alpha=0.3)
    return Drawing(figure, ("policy", "arrival_s", "ttft_p99_s", "num_requests"), rows)


def draw_cost(measured: Sequence[dict[str, float | str]]) -> Drawing:
    """F8: what planning and committing a step costs, over the length of the queue (`simulated.scheduler_cost`)."""
    figure, axes = plt.subplots(figsize=(6, 3.5))
    for policy in dict.fromkeys(row["policy"] for row in measured):
        rows = [row for row in measured if row["policy"] == policy]
        waiting = [float(row["num_waiting"]) for row in rows]
        for name, style in (("p50_us", "o-"), ("p99_us", "s--")):
            values = [float(row[name]) for row in rows]
            axes.plot(waiting, values, style, label=f"{policy}, {name[:3]}", color=_colour(policy))
    axes.set(xlabel="requests waiting", ylabel="plan + commit (µs)", xscale="symlog")
    axes.set_ylim(bottom=0, auto=True)
    axes.legend(fontsize=8)
    axes.grid(alpha=0.3)
    return Drawing(figure, tuple(measured[0]), [tuple(row.values()) for row in measured])


# --- shared


def _curves(
    results: Sequence[Result], label: str, label_text: str, panels: Sequence[tuple[str, str, float, str]]
) -> Drawing | None:
    """A panel for each (figure, axis text, factor, scale); a line for each policy, over the values of `label`."""
    if not results:
        return None
    figure, grid = plt.subplots(1, len(panels), figsize=(5.5 * len(panels), 4), squeeze=False)
    rows: Rows = []
    for axes, (name, text, factor, scale) in zip(grid[0], panels, strict=True):
        for policy, runs in by_label(results, "policy").items():
            points = _points(runs, label, name)
            if points:
                at, values, errors = zip(*points, strict=True)
                scaled, bars = [factor * value for value in values], [factor * error for error in errors]
                axes.errorbar(at, scaled, yerr=bars, marker="o", markersize=3, capsize=2, linewidth=1.3,
                              label=policy, color=_colour(policy))  # fmt: skip
                rows += [(policy, place, name, value, error) for place, value, error in points]
        _finish(axes, label_text, text, scale)
    return Drawing(figure, ("policy", label, "figure", "mean", "half_width_95"), rows)


def _points(runs: Iterable[Result], label: str, name: str) -> list[tuple[float, float, float]]:
    """(place, mean, half width of the 95 % confidence interval), ascending."""
    points = []
    for place, group in by_label(runs, label).items():
        value = estimate(run.figure(name) for run in group)
        pooled = _pooled(group, name)
        if value is not None and pooled is not None:
            points.append((float(str(place)), pooled, value.half_width or 0.0))
    return sorted(points)


def _finish(axes: Axes, x_text: str, y_text: str, scale: str) -> None:
    axes.set(xlabel=x_text, ylabel=y_text, yscale=scale)
    if scale == "linear":
        # The intervals of two seeds are wide; a share beyond 100 % is none.
        axes.set_ylim(bottom=0, top=103 if y_text.endswith("(%)") else None, auto=True)
    axes.legend(fontsize=8)
    axes.grid(alpha=0.3)


def _pooled(runs: Sequence[Result], name: str) -> float | None:
    """The mean over the seeds; attainment is over all of their requests together."""
    if name.endswith("attainment"):
        return attainment(runs, name)
    value = estimate(run.figure(name) for run in runs)
    return None if value is None else value.mean


def _of(results: Iterable[Result], experiment: str) -> list[Result]:
    return [result for result in results if result.matches(experiment=experiment)]


def _colour(policy: object) -> str:
    return _COLOURS.get(str(policy), _OTHER_COLOUR)


FIGURES: Final[dict[str, Callable[[Sequence[Result]], Drawing | None]]] = {
    "F1-latency": draw_latency,
    "F2-attainment": draw_attainment,
    "F3-best-effort": draw_best_effort,
    "F4-slo-scale": draw_slo_scales,
    "F5-pareto": draw_pareto,
    "F6-ablation": draw_ablation,
    "F7-pure-rt": draw_pure_rt,
    "F9-model-error": draw_model_error,
    "F10-burst": draw_burst,
    "F11-kv-pressure": draw_kv_pressure,
}


def main() -> None:
    """Draw the figures of a folder."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    for path in draw_all(parser.parse_args().folder):
        print(path)


if __name__ == "__main__":
    main()
