"""Many replicas behind one router: which replica gets a request."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Sequence
from typing import Final

from bros_router.simulation.hardware import Hardware, profile
from bros_router.simulation.record import RequestRecord
from bros_router.simulation.replica import Replica
from bros_router.simulation.simulator import Dispatcher, Run, Setup, make_replica, run
from bros_router.simulation.workload import Workload
from bros_shard.protocol import StepShape

#: Prompt tokens by which the cost of a queue is judged: long enough for the fixed cost of a step not to matter.
_REFERENCE_TOKENS: Final = 512


class RoundRobin:
    """Each replica in turn, whatever it has to do."""

    def __init__(self) -> None:
        self._next = 0

    def choose(self, record: RequestRecord, replicas: Sequence[Replica], now_s: float) -> int:
        """The next one."""
        index = self._next
        self._next = (index + 1) % len(replicas)
        return index


class LeastLoaded:
    """The replica whose requests may grow to the fewest tokens: the one with the most room in its KV region.

    O(replicas) for each request.
    """

    def choose(self, record: RequestRecord, replicas: Sequence[Replica], now_s: float) -> int:
        """The first of the least loaded."""
        return _least_loaded(range(len(replicas)), replicas)


class PredictedSlack:
    """A real-time request goes where its first token is predicted in time, and of those to the least loaded.

    Where it is late everywhere, it goes to the replica where it is least so. A best-effort request goes to the least
    loaded. O(replicas) for each request.
    """

    def choose(self, record: RequestRecord, replicas: Sequence[Replica], now_s: float) -> int:
        """The first of the best."""
        return _best_by_slack(record, range(len(replicas)), replicas, now_s)


class SampledSlack:
    """As `PredictedSlack`, but among a few replicas drawn anew for each request: the cost does not grow with the fleet.

    A few choices do nearly as well as all of them (Mitzenmacher, The power of two choices, 2001).
    """

    def __init__(self, num_candidates: int = 8, seed: int = 0) -> None:
        self._num_candidates = num_candidates
        self._generator = random.Random(f"{seed}/dispatch")

    def choose(self, record: RequestRecord, replicas: Sequence[Replica], now_s: float) -> int:
        """The first of the best that were drawn."""
        num_candidates = min(self._num_candidates, len(replicas))
        return _best_by_slack(record, self._generator.sample(range(len(replicas)), num_candidates), replicas, now_s)


def _least_loaded(candidates: Iterable[int], replicas: Sequence[Replica]) -> int:
    return min(candidates, key=lambda index: replicas[index].num_tokens)


def _best_by_slack(record: RequestRecord, candidates: Iterable[int], replicas: Sequence[Replica], now_s: float) -> int:
    ttft_s = record.request.ttft_s
    if ttft_s is None:
        return _least_loaded(candidates, replicas)
    # The replicas are alike, so one model speaks for all.
    model = replicas[0].model
    spare_s = ttft_s - model.predict_s(StepShape().with_sequence(0, record.request.num_prompt_tokens))
    token_s = model.predict_s(StepShape().with_sequence(0, _REFERENCE_TOKENS)) / _REFERENCE_TOKENS

    def rank(index: int) -> tuple[float, int]:
        replica = replicas[index]
        slack_s = spare_s - (replica.free_s(now_s) - now_s) - replica.num_rt_prompt_tokens * token_s
        return max(0.0, -slack_s), replica.num_tokens

    return min(candidates, key=rank)


#: By name, for command lines.
DISPATCHERS: Final[dict[str, Callable[[], Dispatcher]]] = {
    "slack": PredictedSlack,
    "sampled-slack": SampledSlack,
    "least-loaded": LeastLoaded,
    "round-robin": RoundRobin,
}


def simulate_fleet(
    workload: Workload,
    setup: Setup,
    hardware: Callable[[int], Hardware],
    num_replicas: int,
    dispatcher: Dispatcher,
    on_progress: Callable[[float], None] | None = None,
) -> Run:
    """Run `num_replicas` like servers; `hardware(index)` is what each one has."""
    devices = [hardware(index) for index in range(num_replicas)]
    points = profile(devices[0])
    replicas = [make_replica(setup, device, points) for device in devices]
    return run(replicas, dispatcher, workload, on_progress)
