"""The demand test against a model that looks at every deadline, and against the schedule that it stands for."""

import heapq
from dataclasses import dataclass

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bros_router.scheduling.demand import Demand

#: Powers of two, so that sums of the tests' numbers are exact.
BUCKET_S = 0.25
NUM_BUCKETS = 32
WINDOW_S = NUM_BUCKETS * BUCKET_S


@dataclass
class Work:
    work_s: float
    deadline_s: float
    is_binding: bool


class Model:
    """The definition, deadline by deadline, in as many steps as it takes."""

    def __init__(self) -> None:
        self.base_s = 0.0
        self.works: dict[int, Work] = {}

    def advance(self, now_s: float) -> None:
        if now_s - self.base_s >= WINDOW_S / 2:
            self.base_s = now_s

    def bucket(self, deadline_s: float) -> int:
        return max(0, min(NUM_BUCKETS - 1, int((deadline_s - self.base_s) // BUCKET_S)))

    def due_s(self, bucket: int) -> float:
        return sum(work.work_s for work in self.works.values() if self.bucket(work.deadline_s) <= bucket)

    def is_feasible(self, work_s: float, deadline_s: float, now_s: float) -> bool:
        bucket = self.bucket(deadline_s)
        if deadline_s - now_s - self.due_s(bucket) < work_s:
            return False
        if deadline_s >= self.base_s + WINDOW_S:
            bucket += 1  # due after everything that is known
        binding = {self.bucket(work.deadline_s) for work in self.works.values() if work.is_binding}
        return all(
            self.base_s + other * BUCKET_S - now_s - self.due_s(other) >= work_s for other in binding if other >= bucket
        )

    def earliest_deadline_s(self, work_s: float, deadline_s: float, now_s: float) -> float:
        """The least of the candidates: as asked, the start of each bucket, and the end of what is due by then."""
        end_s = self.base_s + WINDOW_S
        starts = [self.base_s + bucket * BUCKET_S for bucket in range(NUM_BUCKETS + 1)]
        ends = [now_s + self.due_s(bucket) + work_s for bucket in range(NUM_BUCKETS)]
        candidates = {deadline_s, *starts, *ends, max(end_s, ends[-1])}
        return min(
            candidate
            for candidate in candidates
            if candidate >= deadline_s and self.is_feasible(work_s, candidate, now_s)
        )


works = st.integers(0, 16).map(lambda n: n / 16)
ttfts = st.integers(0, 80).map(lambda n: n / 8)
puts = st.tuples(st.just("put"), works, ttfts, st.booleans())
asks = st.tuples(st.just("ask"), works, ttfts)
others = st.one_of(
    st.tuples(st.just("change"), st.integers(0, 30), works),
    st.tuples(st.just("remove"), st.integers(0, 30)),
    st.tuples(st.just("wait"), ttfts.map(lambda seconds: seconds / 4)),
)


@given(
    st.lists(puts, min_size=4, max_size=20),
    st.lists(puts | asks | others, max_size=30),
    st.lists(asks, min_size=5, max_size=10),
)
def test_every_answer_is_the_definitions(first, then, last):
    demand, model, now_s = Demand(NUM_BUCKETS, BUCKET_S), Model(), 0.0
    for key, (operation, *arguments) in enumerate([*first, *then, *last]):
        if operation in ("put", "ask"):
            model.advance(now_s)
        match operation, *arguments:
            case "put", work_s, ttft_s, is_binding:
                demand.put(key, work_s, now_s + ttft_s, is_binding=is_binding, now_s=now_s)
                model.works[key] = Work(work_s, now_s + ttft_s, is_binding)
            case "ask", work_s, ttft_s:
                expected = model.earliest_deadline_s(work_s, now_s + ttft_s, now_s)
                assert demand.earliest_deadline_s(work_s, now_s + ttft_s, now_s) == expected
            case "change", other, work_s if other in model.works:
                demand.change(other, work_s)
                model.works[other].work_s = work_s
            case "remove", other:
                demand.remove(other)
                model.works.pop(other, None)
            case "wait", seconds:
                now_s += seconds
        assert len(demand) == len(model.works)


arrivals = st.lists(st.tuples(st.integers(0, 8), st.integers(1, 40), st.integers(1, 200)), min_size=1, max_size=25)


@given(arrivals)
def test_what_is_accepted_is_done_in_time_by_the_earliest_deadline_first(arrivals):
    """A second of work takes a second; what would break a promise is turned away."""
    demand = Demand(256, 0.25)
    now_s, left_s = 0.0, {}
    heap: list[tuple[float, int]] = []
    for key, (gap, work, ttft) in enumerate(arrivals):
        now_s = work_until(now_s + gap / 4, now_s, heap, left_s, demand)
        work_s, deadline_s = work / 16, now_s + ttft / 16
        if demand.earliest_deadline_s(work_s, deadline_s, now_s) > deadline_s:
            continue
        demand.put(key, work_s, deadline_s, is_binding=True, now_s=now_s)
        left_s[key] = work_s
        heapq.heappush(heap, (deadline_s, key))
    work_until(float("inf"), now_s, heap, left_s, demand)
    assert len(demand) == 0


def work_until(end_s, now_s, heap, left_s, demand) -> float:
    """Do the earliest deadline first, and see that each is kept. The time it is then."""
    while heap and now_s < end_s:
        deadline_s, key = heap[0]
        seconds = min(left_s[key], end_s - now_s)
        now_s += seconds
        left_s[key] -= seconds
        if left_s[key]:
            demand.change(key, left_s[key])
        else:
            assert now_s <= deadline_s
            heapq.heappop(heap)
            demand.remove(key)
    return now_s if end_s == float("inf") else end_s


def test_a_deadline_that_binds_nobody_gives_way():
    """Work ahead of it counts; that it comes too late itself is no reason to turn others away."""
    demand = Demand(NUM_BUCKETS, BUCKET_S)
    demand.put(1, 6.0, 3.0, is_binding=False, now_s=0.0)
    assert demand.earliest_deadline_s(1.0, 2.0, 0.0) == 2.0
    assert demand.earliest_deadline_s(1.0, 4.0, 0.0) == 7.0
    demand.put(2, 0.5, 7.5, is_binding=True, now_s=0.0)
    assert demand.earliest_deadline_s(1.0, 2.0, 0.0) == 2.0
    assert demand.earliest_deadline_s(1.25, 2.0, 0.0) == 7.75


def test_beyond_the_last_bucket_everything_is_due_before():
    demand = Demand(NUM_BUCKETS, BUCKET_S)
    for key in range(20):
        demand.put(key, 1.0, 100.0 + key, is_binding=False, now_s=0.0)
    assert demand.earliest_deadline_s(1.0, 5.0, 0.0) == 5.0
    assert demand.earliest_deadline_s(1.0, 20.0, 0.0) == 21.0
    assert demand.earliest_deadline_s(1.0, 50.0, 0.0) == 50.0


@pytest.mark.parametrize("now_s", [0.0, 4000.0, 1e6])
def test_time_that_passes_takes_room_and_work_that_is_done_gives_it_back(now_s):
    demand = Demand()
    assert demand.earliest_deadline_s(1.0, now_s + 1.5, now_s) == now_s + 1.5
    demand.put(1, 1.0, now_s + 2.2, is_binding=True, now_s=now_s)
    assert demand.earliest_deadline_s(1.0, now_s + 1.5, now_s) == now_s + 1.5
    later_s = now_s + 0.5
    assert demand.earliest_deadline_s(1.0, later_s + 1.5, later_s) == pytest.approx(later_s + 2.0)
    demand.change(1, 0.25)
    assert demand.earliest_deadline_s(1.0, later_s + 1.5, later_s) == later_s + 1.5
    demand.change(1, 1.0)
    assert demand.earliest_deadline_s(1.0, later_s + 1.5, later_s) > later_s + 1.5
    demand.remove(1)
    demand.remove(1)
    assert demand.earliest_deadline_s(1.0, later_s + 1.5, later_s) == later_s + 1.5


def test_rounding_does_not_add_up():
    demand = Demand()
    for key in range(20_000):
        demand.put(key, 0.1 / (1 + key % 7), 3.0, is_binding=True, now_s=0.0)
        demand.remove(key)
    assert demand.earliest_deadline_s(1.0, 0.5, 0.0) == pytest.approx(1.0, abs=1e-8)
