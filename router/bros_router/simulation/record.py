"""What became of each request, and the figures that a run is judged by.

Every request that was offered counts: one that was rejected, expired, failed or did not end is a miss.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from enum import Enum

import numpy as np

from bros_router.request import RequestClass
from bros_router.simulation.workload import TraceRequest


class Ending(Enum):
    """How a request ended."""

    FINISHED = "finished"
    #: Refused at admission.
    REJECTED = "rejected"
    #: Accepted, and given up by the server because its deadline had passed.
    EXPIRED = "expired"
    FAILED = "failed"
    #: The run ended first.
    UNFINISHED = "unfinished"


@dataclass(slots=True)
class RequestRecord:
    """One request's life. Times are seconds from the start of the trace."""

    request: TraceRequest
    #: When it *should* have been sent. A client that was late with it hides queueing otherwise.
    offered_s: float
    ending: Ending = Ending.UNFINISHED
    #: When each token came, ascending.
    token_s: array[float] = field(default_factory=lambda: array("d"))
    #: Whether the scheduler gave its targets up.
    was_relegated: bool = False

    @property
    def is_rt(self) -> bool:
        """Whether it is a real-time request."""
        return self.request.request_class is RequestClass.RT

    @property
    def ttft_s(self) -> float | None:
        """Time to the first token, queueing included; `None`: it got none."""
        return self.token_s[0] - self.offered_s if self.token_s else None

    @property
    def tpot_s(self) -> float | None:
        """Mean time of each token after the first; `None` where there are fewer than two."""
        num_gaps = len(self.token_s) - 1
        return (self.token_s[-1] - self.token_s[0]) / num_gaps if num_gaps > 0 else None

    @property
    def largest_gap_s(self) -> float | None:
        """Longest time between two tokens; `None` where there are fewer than two."""
        return float(np.diff(self.token_s).max()) if len(self.token_s) > 1 else None

    @property
    def normalised_latency_s(self) -> float | None:
        """End-to-end latency for each output token; `None`: it did not finish."""
        if self.ending is not Ending.FINISHED:
            return None
        return (self.token_s[-1] - self.offered_s) / len(self.token_s)

    @property
    def meets_ttft(self) -> bool:
        """Whether it finished and its first token came in time."""
        ttft_s = self.ttft_s
        if self.ending is not Ending.FINISHED or ttft_s is None:
            return False
        return self.request.ttft_s is None or ttft_s <= self.request.ttft_s

    @property
    def meets_tpot(self) -> bool:
        """Whether it finished and its later tokens came fast enough on average. One token is always fast enough."""
        if self.ending is not Ending.FINISHED:
            return False
        tpot_s = self.tpot_s
        return tpot_s is None or self.request.tpot_s is None or tpot_s <= self.request.tpot_s

    @property
    def meets_joint(self) -> bool:
        """Whether it meets both targets."""
        return self.meets_ttft and self.meets_tpot


@dataclass(frozen=True, slots=True)
class Summary:
    """The figures of one run. Real-time figures are over the requests offered in the window, whenever they ended.

    A figure over nothing is `None`.
    """

    num_rt: int
    #: Shares of all `num_rt`, 0 to 1.
    ttft_attainment: float | None
    tpot_attainment: float | None
    joint_attainment: float | None
    #: Mean over those that finished: read it beside `rt_endings`.
    rt_normalised_latency_s: float | None
    #: Over those that got a first token.
    rt_ttft_p50_s: float | None
    rt_ttft_p99_s: float | None
    #: Over all gaps between two tokens of a request.
    rt_tbt_p99_s: float | None
    #: Number of requests offered in the window by `Ending.value`.
    rt_endings: dict[str, int]
    be_endings: dict[str, int]
    num_rt_relegated: int
    #: Tokens that came, and requests that finished, inside the window, whenever they were offered.
    rt_tokens_per_s: float
    be_tokens_per_s: float
    be_requests_per_s: float
    #: Longest time that a best-effort request that had begun got no token, the end of the run included.
    be_largest_gap_s: float | None
    #: Longest time that one waited for its first token, the end of the run included.
    be_longest_wait_s: float | None


def summarise(records: Iterable[RequestRecord], start_s: float, stop_s: float, end_s: float | None = None) -> Summary:
    """Judge a run by its window [start_s, stop_s). The run itself ended at `end_s` (default: with the window)."""
    end_s = stop_s if end_s is None else end_s
    all_records = list(records)
    all_rt = [record for record in all_records if record.is_rt]
    all_be = [record for record in all_records if not record.is_rt]
    rt = [record for record in all_rt if start_s <= record.offered_s < stop_s]
    gaps = [np.diff(record.token_s) for record in rt if len(record.token_s) > 1]
    ttfts = [ttft_s for record in rt if (ttft_s := record.ttft_s) is not None]
    latencies = [latency_s for record in rt if (latency_s := record.normalised_latency_s) is not None]
    seconds = stop_s - start_s
    num_be_finished = sum(
        record.ending is Ending.FINISHED and start_s <= record.token_s[-1] < stop_s for record in all_be
    )
    return Summary(
        num_rt=len(rt),
        ttft_attainment=_share([record.meets_ttft for record in rt]),
        tpot_attainment=_share([record.meets_tpot for record in rt]),
        joint_attainment=_share([record.meets_joint for record in rt]),
        rt_normalised_latency_s=float(np.mean(latencies)) if latencies else None,
        rt_ttft_p50_s=percentile(ttfts, 50),
        rt_ttft_p99_s=percentile(ttfts, 99),
        rt_tbt_p99_s=percentile(np.concatenate(gaps), 99) if gaps else None,
        rt_endings=_endings(rt),
        be_endings=_endings([record for record in all_be if start_s <= record.offered_s < stop_s]),
        num_rt_relegated=sum(record.was_relegated for record in rt),
        rt_tokens_per_s=_num_tokens(all_rt, start_s, stop_s) / seconds,
        be_tokens_per_s=_num_tokens(all_be, start_s, stop_s) / seconds,
        be_requests_per_s=num_be_finished / seconds,
        be_largest_gap_s=max((_largest_gap_s(record, end_s) for record in all_be if record.token_s), default=None),
        be_longest_wait_s=max((_wait_s(record, end_s) for record in all_be), default=None),
    )


def percentile(values: Sequence[float] | np.ndarray, percent: float) -> float | None:
    """A percentile, interpolated; `None` of nothing."""
    return float(np.percentile(values, percent)) if len(values) else None


def percentile_interval(
    values: Sequence[float], percent: float, confidence: float = 0.95, num_resamples: int = 1000, seed: int = 0
) -> tuple[float, float] | None:
    """Confidence interval of a percentile, by the percentile bootstrap (Efron 1979); `None` of nothing."""
    if not len(values):
        return None
    generator = np.random.default_rng(seed)
    sample = np.asarray(values, dtype=float)
    estimates = [
        np.percentile(sample[generator.integers(0, len(sample), len(sample))], percent) for _ in range(num_resamples)
    ]
    low, high = np.percentile(estimates, [50 * (1 - confidence), 50 * (1 + confidence)])
    return float(low), float(high)


def _share(hits: list[bool]) -> float | None:
    return sum(hits) / len(hits) if hits else None


def _endings(records: list[RequestRecord]) -> dict[str, int]:
    return {ending.value: sum(record.ending is ending for record in records) for ending in Ending}


def _num_tokens(records: list[RequestRecord], start_s: float, stop_s: float) -> int:
    """Tokens that came in [start_s, stop_s)."""
    return sum(int(np.diff(np.searchsorted(record.token_s, [start_s, stop_s]))[0]) for record in records)


def _largest_gap_s(record: RequestRecord, end_s: float) -> float:
    last_s = end_s if record.ending is Ending.UNFINISHED else record.token_s[-1]
    return float(np.diff(record.token_s, append=last_s).max(initial=0.0))


def _wait_s(record: RequestRecord, end_s: float) -> float:
    """Until the first token; where none came, until the run ended, unless the request had ended by itself."""
    if record.token_s:
        return record.token_s[0] - record.offered_s
    return max(0.0, end_s - record.offered_s) if record.ending is Ending.UNFINISHED else 0.0
