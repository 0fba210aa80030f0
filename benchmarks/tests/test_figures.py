"""Figures from results that were made up: what is drawn is what was given, and it lies in the CSV."""

import csv
from array import array
from pathlib import Path

from bros_benchmarks.evaluation.figures import FIGURES, draw_all
from bros_benchmarks.evaluation.recorder import write_json
from bros_benchmarks.evaluation.result import Label, Result
from bros_router.request import RequestClass
from bros_router.simulation.record import Ending, RequestRecord, summarise
from bros_router.simulation.workload import TraceRequest


def result(num_met: int, num_missed: int, **labels: Label) -> Result:
    """One run: requests that met their targets or were rejected, and best-effort tokens."""
    request = TraceRequest(0.0, RequestClass.RT, 10, 2, 0.5, 0.2)
    best_effort = TraceRequest(0.0, RequestClass.BE, 10, 3)
    records = [
        *(RequestRecord(request, 0.0, Ending.FINISHED, array("d", [0.1, 0.2])) for _ in range(num_met)),
        *(RequestRecord(request, 0.0, Ending.REJECTED) for _ in range(num_missed)),
        RequestRecord(best_effort, 0.0, Ending.FINISHED, array("d", [0.1, 0.2, 0.3])),
    ]
    extra = {"prediction_error": 0.05, "be_bound": 4.0, "be_only": 5.0, "be_charged": 3.0}
    series = {"offered_s": [1.0, 7.0], "ttft_s": [0.1, 0.3]} if labels["experiment"] == "burst" else {}
    return Result({"scenario": "s", **labels}, summarise(records, 0.0, 1.0), extra, series)


def rows_of(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def test_every_figure_is_drawn_with_its_numbers_beside_it(tmp_path: Path) -> None:
    results = [
        result(met, 10 - met, experiment=experiment, policy=policy, rate=rate, seed=seed, **more)
        for experiment, more in (
            ("rates", {}),
            ("pure-rt", {}),
            ("tuning", {}),
            ("common", {}),
            ("burst", {}),
            ("ablation", {"condition": "R*"}),
            ("slo", {"slo_scale": 5.0}),
            ("kv", {"kv_share": 0.5}),
        )
        for policy, met in (("bros", 10), ("fcfs", 4))
        for rate in (1.0, 2.0)
        for seed in (1, 2)
    ]
    for index, item in enumerate(results):
        item.write(tmp_path / str(index) / "result.json")
    write_json(tmp_path / "cost.json", [{"policy": "bros", "num_waiting": 0, "p50_us": 5.0, "p99_us": 9.0}])
    drawn = draw_all(tmp_path)
    assert {path.stem for path in drawn} == {*FIGURES, "F8-scheduler-cost"}
    for path in drawn:
        assert path.read_bytes().startswith(b"\x89PNG")
        assert rows_of(path.with_suffix(".csv"))
    shares = {
        (row["policy"], row["rate"]): float(row["mean"])
        for row in rows_of(tmp_path / "figures" / "F2-attainment.csv")
        if row["figure"] == "joint_attainment"
    }
    assert shares == {("bros", "1.0"): 1.0, ("bros", "2.0"): 1.0, ("fcfs", "1.0"): 0.4, ("fcfs", "2.0"): 0.4}
    tokens = [float(row["mean"]) for row in rows_of(tmp_path / "figures" / "F3-best-effort.csv")]
    assert sorted(set(tokens)) == [3.0, 4.0, 5.0]  # measured, the bound, and without real-time load
    burst = rows_of(tmp_path / "figures" / "F10-burst.csv")
    assert {(row["arrival_s"], row["ttft_p99_s"], row["num_requests"]) for row in burst} == {
        ("0.0", "0.1", "4"),
        ("5.0", "0.3", "4"),
    }


def test_what_was_not_run_is_not_drawn(tmp_path: Path) -> None:
    result(1, 0, experiment="common", policy="bros", rate=1.0, seed=1).write(tmp_path / "result.json")
    assert {path.stem for path in draw_all(tmp_path)} == {"F9-model-error"}
