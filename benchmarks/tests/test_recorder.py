"""Records and results on disk are what they were in memory."""

from array import array
from pathlib import Path

from hypothesis import given
from hypothesis import strategies as st

from bros_benchmarks.evaluation.live_load import SentRecord
from bros_benchmarks.evaluation.recorder import read_records, write_records
from bros_benchmarks.evaluation.result import Result, attainment, estimate, read_results
from bros_router.request import RequestClass
from bros_router.simulation.record import Ending, RequestRecord, summarise
from bros_router.simulation.workload import TraceRequest

times = st.floats(0, 1000).map(lambda value: round(value, 6))


@st.composite
def sent_records(draw: st.DrawFn) -> SentRecord:
    offered_s = draw(times)
    targets = draw(st.one_of(st.just((None, None)), st.tuples(times, times)))
    request = TraceRequest(
        offered_s, draw(st.sampled_from(RequestClass)), draw(st.integers(1, 9999)), draw(st.integers(1, 9999)), *targets
    )
    return SentRecord(
        request,
        offered_s,
        ending=draw(st.sampled_from(Ending)),
        token_s=array("d", sorted(draw(st.lists(times, max_size=5)))),
        was_relegated=draw(st.booleans()),
        sent_s=draw(st.one_of(st.none(), times)),
        error_type=draw(st.sampled_from(["", "overloaded", "ClientConnectorError"])),
    )


@given(records=st.lists(sent_records(), max_size=5))
def test_records_survive_the_disk(tmp_path_factory, records: list[SentRecord]) -> None:
    path = tmp_path_factory.mktemp("records") / "records.csv.gz"
    write_records(path, records)
    assert read_records(path) == records


def result(policy: str, seed: int, num_met: int, num_missed: int) -> Result:
    request = TraceRequest(0.0, RequestClass.RT, 10, 1, 0.5, 0.1)
    met = [RequestRecord(request, 0.0, Ending.FINISHED, array("d", [0.1])) for _ in range(num_met)]
    missed = [RequestRecord(request, 0.0, Ending.REJECTED) for _ in range(num_missed)]
    labels = {"experiment": "test", "policy": policy, "seed": seed}
    return Result(labels, summarise([*met, *missed], 0.0, 1.0), {"extra": 1.5, "nothing": None}, {"x": [1.0]})


def test_results_survive_the_disk_and_are_found_below_a_folder(tmp_path: Path) -> None:
    results = [result("a", 1, 3, 1), result("b", 2, 0, 0)]
    for index, item in enumerate(results):
        item.write(tmp_path / "deep" / str(index) / "result.json")
    assert read_results(tmp_path) == results


def test_attainment_counts_requests_not_runs() -> None:
    assert attainment([result("a", 1, 9, 1), result("a", 2, 0, 30)]) == 9 / 40
    assert attainment([result("a", 1, 0, 0)]) is None


def test_the_interval_of_a_mean_is_students() -> None:
    three = estimate([1.0, 2.0, 3.0])
    assert three is not None and three.mean == 2.0
    assert three.half_width is not None and abs(three.half_width - 4.303 / 3**0.5) < 1e-9
    one = estimate([None, 5.0])
    assert one is not None and one.mean == 5.0 and one.half_width is None
    assert estimate([None]) is None
