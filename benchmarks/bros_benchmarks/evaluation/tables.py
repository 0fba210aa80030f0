"""Results as tables: attainment never without what it cost, and what it left undone."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from rich.table import Table

from bros_benchmarks.evaluation.result import Label, Result, attainment, by_label, estimate, total


def policy_table(title: str, results: Iterable[Result], label: str = "policy") -> Table:
    """A row for each value of `label`, over all of its seeds."""
    table = Table(title=title)
    for column in (
        label, "RT/s", "runs", "joint", "TTFT", "TPOT", "RT s/token", "TTFT p50/p99 s", "TBT p99 s",
        "BE tok/s", "rejected", "failed", "relegated", "unfinished", "BE gap/wait s", "RT KV", "late p99 ms",
    ):  # fmt: skip
        table.add_column(column, justify="left" if column == label else "right")
    for value, group in by_label(results, label).items():
        for rate, runs in by_label(group, "rate").items():
            table.add_row(str(value), *_row(rate, runs))
    return table


def _row(rate: Label, runs: Sequence[Result]) -> list[str]:
    return [
        f"{rate:.2f}" if isinstance(rate, float) else "",
        str(len(runs)),
        *(_percent(attainment(runs, f"{kind}_attainment")) for kind in ("joint", "ttft", "tpot")),
        _mean(runs, "rt_normalised_latency_s", 3),
        f"{_mean(runs, 'rt_ttft_p50_s', 2)} / {_mean(runs, 'rt_ttft_p99_s', 2)}",
        _mean(runs, "rt_tbt_p99_s", 3),
        _mean(runs, "be_tokens_per_s", 1, with_interval=True),
        _endings(runs, "rejected"),
        _endings(runs, "failed", "expired"),
        _relegated(runs),
        str(total(runs, lambda summary: summary.rt_endings["unfinished"])),
        f"{_largest(runs, 'be_largest_gap_s')} / {_largest(runs, 'be_longest_wait_s')}",
        _percent(_mean_value(runs, "rt_kv_share")),
        _largest(runs, "lateness_p99_s", 1000.0),
    ]


def _endings(runs: Sequence[Result], *endings: str) -> str:
    """Requests of both classes that ended so."""
    return str(total(runs, lambda summary: sum(summary.rt_endings[e] + summary.be_endings[e] for e in endings)))


def _relegated(runs: Sequence[Result]) -> str:
    """Live servers count them; simulated records know."""
    counts = [run.extra.get("num_relegated", run.summary.num_rt_relegated) for run in runs]
    return f"{sum(count or 0.0 for count in counts):.0f}"


def _mean_value(runs: Sequence[Result], name: str) -> float | None:
    value = estimate(run.figure(name) for run in runs if _has(run, name))
    return None if value is None else value.mean


def _mean(runs: Sequence[Result], name: str, digits: int, *, with_interval: bool = False) -> str:
    value = estimate(run.figure(name) for run in runs)
    if value is None:
        return "–"
    if with_interval and value.half_width is not None:
        return f"{value.mean:.{digits}f} ± {value.half_width:.{digits}f}"
    return f"{value.mean:.{digits}f}"


def _largest(runs: Sequence[Result], name: str, factor: float = 1.0) -> str:
    values = [value for run in runs if _has(run, name) and (value := run.figure(name)) is not None]
    return f"{factor * max(values):.1f}" if values else "–"


def _percent(share: float | None) -> str:
    return "–" if share is None else f"{100 * share:.1f} %"


def _has(run: Result, name: str) -> bool:
    return name in run.extra or hasattr(run.summary, name)


def best_effort_table(title: str, results: Iterable[Result]) -> Table:
    """Best-effort throughput beside its bound, for results that have been charged (`study.charge`)."""
    table = Table(title=title)
    for column in (
        "policy",
        "BE tok/s",
        "charged",
        "bound",
        "charged / bound",
        "bound by memory too",
        "of BE only",
        "device busy",
        "model error",
    ):
        table.add_column(column, justify="left" if column == "policy" else "right")
    for policy, runs in by_label(results, "policy").items():
        charged, bound, only = (_mean_value(runs, f"be_{name}") for name in ("charged", "bound", "only"))
        table.add_row(
            str(policy),
            _mean(runs, "be_tokens_per_s", 1, with_interval=True),
            *("–" if value is None else f"{value:.1f}" for value in (charged, bound)),
            _percent(charged / bound if charged is not None and bound else None),
            _mean(runs, "be_region_bound", 1) if _has(runs[0], "be_region_bound") else "–",
            _percent(charged / only if charged is not None and only else None),
            _percent(_mean_value(runs, "busy_share")),
            _percent(_mean_value(runs, "prediction_error")),
        )
    return table


def gate_table(title: str, gates: Iterable[tuple[str, float | None, str, float]]) -> Table:
    """A row for each (what, measured, `>=` or `<=`, bound)."""
    table = Table("gate", "measured", "bound", "holds", title=title)
    for what, measured, relation, bound in gates:
        if measured is None:
            table.add_row(what, "–", f"{relation} {bound:g}", "not known")
            continue
        holds = measured >= bound if relation == ">=" else measured <= bound
        table.add_row(what, f"{measured:.3f}", f"{relation} {bound:g}", "yes" if holds else "NO")
    return table
