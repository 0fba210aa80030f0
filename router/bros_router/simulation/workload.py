"""What clients ask for, and when: length distributions, arrival processes, and the two joined to a workload.

The simulator and the load generator over HTTP run the same workloads. All randomness is seeded, and each purpose
has its own stream: another rate keeps the lengths, other lengths keep the arrival times.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from statistics import fmean
from typing import Final, Protocol, TypeAlias

from bros_router.request import RequestClass


@dataclass(frozen=True, slots=True)
class TraceRequest:
    """One request of a trace. Its output length is forced: nobody stops early."""

    #: From the start of the trace.
    arrival_s: float
    request_class: RequestClass
    num_prompt_tokens: int
    num_output_tokens: int
    #: Targets of a real-time request; `None`: it has none.
    ttft_s: float | None = None
    tpot_s: float | None = None


#: (TTFT, TPOT) in seconds of a request with that many prompt tokens.
Targets: TypeAlias = Callable[[int], tuple[float | None, float | None]]


def no_targets(num_prompt_tokens: int) -> tuple[None, None]:
    """For requests that only want to be done."""
    return None, None


def fixed_targets(ttft_s: float, tpot_s: float) -> Targets:
    """The same targets for everybody."""
    return lambda num_prompt_tokens: (ttft_s, tpot_s)


# --- lengths -----------------------------------------------------------------------------------------------


class Distribution(Protocol):
    """Of a number of tokens, before it is rounded."""

    def sample(self, generator: random.Random) -> float:
        """One draw."""
        ...


@dataclass(frozen=True, slots=True)
class LogNormal:
    """exp(N(mu, sigma))."""

    mu: float
    sigma: float

    def sample(self, generator: random.Random) -> float:
        """One draw."""
        return generator.lognormvariate(self.mu, self.sigma)


@dataclass(frozen=True, slots=True)
class Exponential:
    """Memoryless, with this mean."""

    mean: float

    def sample(self, generator: random.Random) -> float:
        """One draw."""
        return generator.expovariate(1 / self.mean)


@dataclass(frozen=True, slots=True)
class Uniform:
    """Every whole number from `low` to `high`, both included."""

    low: int
    high: int

    def sample(self, generator: random.Random) -> float:
        """One draw."""
        return generator.randint(self.low, self.high)


#: So many draws beyond the cut in a row: the cut leaves nothing of the distribution.
_MAX_DRAWS: Final = 10_000
_NUM_MEAN_DRAWS: Final = 10_000


@dataclass(frozen=True, slots=True)
class Lengths:
    """Prompt and output lengths of a kind of request."""

    name: str
    prompt: Distribution
    output: Distribution
    #: Prompt and output together never exceed this. What would is drawn again, as data sets are filtered, not clipped.
    max_total_tokens: int
    #: Every length is multiplied by this first: a data set in miniature, for a small model on a slow device.
    scale: float = 1.0

    def sample(self, generator: random.Random) -> tuple[int, int]:
        """(prompt tokens, output tokens), at least one of each.

        Raises:
            ValueError: practically nothing is as short as `max_total_tokens`.
        """
        for _ in range(_MAX_DRAWS):
            num_prompt_tokens = max(1, round(self.scale * self.prompt.sample(generator)))
            num_output_tokens = max(1, round(self.scale * self.output.sample(generator)))
            if num_prompt_tokens + num_output_tokens <= self.max_total_tokens:
                return num_prompt_tokens, num_output_tokens
        raise ValueError(f"{self.name} has practically no requests of at most {self.max_total_tokens} tokens")

    def means(self) -> tuple[float, float]:
        """Mean prompt and output tokens, by Monte Carlo; always the same."""
        generator = random.Random("mean lengths")
        draws = [self.sample(generator) for _ in range(_NUM_MEAN_DRAWS)]
        return fmean(prompt for prompt, _ in draws), fmean(output for _, output in draws)

    def cut(self, max_total_tokens: int) -> Lengths:
        """The same kind, with a smaller limit on prompt and output together."""
        return replace(self, max_total_tokens=min(max_total_tokens, self.max_total_tokens))

    def scaled(self, scale: float) -> Lengths:
        """The same kind with all lengths, the limit apart, multiplied by `scale`."""
        return replace(self, scale=self.scale * scale)


#: ShareGPT conversations by the means that the vLLM paper gives (arXiv 2309.06180, section 6.1: 161.31 prompt and
#: 337.99 output tokens, context 2,048). Log-normal by our choice, and so are the sigmas, 1.2 and 0.9. The mus are
#: fitted so that the means hold *after* the cut at 2,048 (by Monte Carlo; 98 % of the draws pass it).
SHAREGPT: Final = Lengths("sharegpt", LogNormal(4.471, 1.2), LogNormal(5.500, 0.9), 2048)
#: Like LMSYS-Chat-1M: log-normal prompts, exponential outputs with mean 214.5. The cut is OPT's context.
LMSYS: Final = Lengths("lmsys", LogNormal(3.52, 1.2), Exponential(214.5), 2048)
#: Long conversations (context 8,192).
LONG_CHAT: Final = Lengths("long-chat", LogNormal(7.456, 0.930), LogNormal(6.028, 0.545), 8192)
#: Azure's LLM inference traces of 2023, log-normal fits. The cut at 8,192 is our choice: Llama-3's context.
AZURE_CONVERSATION: Final = Lengths("azure-conversation", LogNormal(6.833, 1.106), LogNormal(3.714, 1.655), 8192)
AZURE_CODE: Final = Lengths("azure-code", LogNormal(7.565, 0.917), LogNormal(2.079, 1.312), 8192)
#: The requests of llm-d's wave experiment: prompts of 512, log-normal outputs.
LLM_D: Final = Lengths("llm-d", Uniform(512, 512), LogNormal(5.967, 0.703), 8192)
#: Best-effort requests of the BROS paper (arXiv 2504.09590).
BE: Final = Lengths("be", Uniform(512, 1024), Uniform(32, 128), 2048)
#: Best-effort documents. The paper has none; prompts to 8k are our addition, uniform by our choice.
LONG_BE: Final = Lengths("long-be", Uniform(1024, 8064), Uniform(32, 128), 8192)

#: By name, for command lines.
LENGTHS: Final = {
    lengths.name: lengths
    for lengths in (SHAREGPT, LMSYS, LONG_CHAT, AZURE_CONVERSATION, AZURE_CODE, LLM_D, BE, LONG_BE)
}


# --- arrivals ----------------------------------------------------------------------------------------------


class ArrivalProcess(Protocol):
    """When requests come. An open loop: nobody waits for a reply before the next is sent."""

    def times(self, duration_s: float, generator: random.Random) -> Iterator[float]:
        """Ascending times in [0, duration_s)."""
        ...


@dataclass(frozen=True, slots=True)
class Poisson:
    """Independent arrivals, `rate` a second on average."""

    rate: float

    def times(self, duration_s: float, generator: random.Random) -> Iterator[float]:
        """Ascending times in [0, duration_s)."""
        return SteppedPoisson(((duration_s, self.rate),)).times(duration_s, generator)


@dataclass(frozen=True, slots=True)
class Gamma:
    """Gamma-distributed gaps: `rate` a second on average, burstier than Poisson where `cv` > 1.

    `cv` is the gaps' standard deviation over their mean; the evaluation uses 2 and 4.
    """

    rate: float
    cv: float

    def times(self, duration_s: float, generator: random.Random) -> Iterator[float]:
        """Ascending times in [0, duration_s)."""
        if self.rate == 0:
            return
        shape = 1 / self.cv**2
        time_s = generator.gammavariate(shape, 1 / (self.rate * shape))
        while time_s < duration_s:
            yield time_s
            time_s += generator.gammavariate(shape, 1 / (self.rate * shape))


@dataclass(frozen=True, slots=True)
class SteppedPoisson:
    """A Poisson process whose rate changes in steps. After the last piece it begins again."""

    #: (seconds, requests a second) of each piece.
    pieces: tuple[tuple[float, float], ...]

    def times(self, duration_s: float, generator: random.Random) -> Iterator[float]:
        """Ascending times in [0, duration_s)."""
        # Exact: the integral of the rate between two arrivals is a unit exponential.
        work = generator.expovariate(1.0)
        start_s = 0.0
        for piece_s, rate in itertools.cycle(self.pieces):
            if start_s >= duration_s:
                return
            time_s = start_s
            while rate > 0 and time_s + work / rate < start_s + piece_s:
                time_s += work / rate
                if time_s >= duration_s:
                    return
                yield time_s
                work = generator.expovariate(1.0)
            work -= rate * (start_s + piece_s - time_s)
            start_s += piece_s


def square_wave(rate: float, period_s: float = 60.0, ratio: float = 3.0) -> SteppedPoisson:
    """Half of each period `ratio` times as many requests as in the other; `rate` is the mean."""
    low = 2 * rate / (1 + ratio)
    return SteppedPoisson(((period_s / 2, low), (period_s / 2, ratio * low)))


def llm_d_wave(scale: float = 1.0) -> SteppedPoisson:
    """llm-d's wave: 15 requests a second for 90 s, then 1 a second for 90 s, again and again (there: 10 cycles)."""
    return SteppedPoisson(((90.0, 15 * scale), (90.0, scale)))


def burst(rate: float, start_s: float, length_s: float = 20.0, factor: float = 10.0) -> SteppedPoisson:
    """`rate`, but `factor` times as much in [start_s, start_s + length_s). Only once, for any practical duration."""
    return SteppedPoisson(((start_s, rate), (length_s, factor * rate), (1e9, rate)))


# --- workloads ---------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class ClosedLoop:
    """Best-effort clients who always have `num_requests` in the system, from the start on."""

    num_requests: int
    lengths: Lengths
    #: Whether the next `num_requests` start only when the last of these has ended (the BROS paper's form).
    #: Otherwise each that ends is replaced at once.
    is_grouped: bool = False
    seed: int = 0

    def draws(self) -> Iterator[tuple[int, int]]:
        """Without end: (prompt tokens, output tokens) of each request, in the order in which they start."""
        generator = random.Random(f"{self.seed}/be lengths")
        while True:
            yield self.lengths.sample(generator)


@dataclass(frozen=True, slots=True)
class BatchDump:
    """Many best-effort requests at once."""

    arrival_s: float
    num_requests: int
    lengths: Lengths


@dataclass(frozen=True, slots=True)
class Workload:
    """What is sent to a server: [0, warm_up_s) fills it, [warm_up_s, warm_up_s + duration_s) is judged.

    Afterwards best-effort work goes on, and no new real-time request comes; the run ends when every real-time
    request has ended, or at `end_s`. Whatever has not ended by then is unfinished.
    """

    #: Ascending by arrival.
    rt: tuple[TraceRequest, ...]
    #: A trace ascends by arrival as well.
    be: ClosedLoop | tuple[TraceRequest, ...]
    duration_s: float
    warm_up_s: float
    #: Most seconds that are spent on what the window left behind.
    drain_s: float = 60.0

    @property
    def start_s(self) -> float:
        """Begin of the window that is judged."""
        return self.warm_up_s

    @property
    def stop_s(self) -> float:
        """End of the window that is judged, and of the real-time trace."""
        return self.warm_up_s + self.duration_s

    @property
    def end_s(self) -> float:
        """End of the run at the latest."""
        return self.stop_s + self.drain_s


def make_workload(
    seed: int,
    *,
    arrivals: ArrivalProcess,
    rt_lengths: Lengths,
    targets: Targets,
    be: ClosedLoop | tuple[BatchDump, ...] = (),
    duration_s: float = 600.0,
    warm_up_s: float = 60.0,
    drain_s: float | None = None,
) -> Workload:
    """Draw a workload. The same arguments give the same workload; the seed of a closed loop is replaced by `seed`.

    Without `drain_s` the run ends when no real-time request could meet its targets any more, at least 60 s after the
    window: long replies at a leisurely pace are not cut short.

    Raises:
        ValueError: the cut of some lengths leaves practically nothing of them.
    """
    length_generator = random.Random(f"{seed}/rt lengths")
    rt = []
    for arrival_s in arrivals.times(warm_up_s + duration_s, random.Random(f"{seed}/arrivals")):
        num_prompt_tokens, num_output_tokens = rt_lengths.sample(length_generator)
        ttft_s, tpot_s = targets(num_prompt_tokens)
        rt.append(TraceRequest(arrival_s, RequestClass.RT, num_prompt_tokens, num_output_tokens, ttft_s, tpot_s))
    if drain_s is None:
        drain_s = max([60.0, *(_last_due_s(request) - warm_up_s - duration_s for request in rt)])
    if isinstance(be, ClosedLoop):
        next(be.draws())  # raises now rather than in the run
        return Workload(tuple(rt), replace(be, seed=seed), duration_s, warm_up_s, drain_s)
    return Workload(tuple(rt), _dumped(be, random.Random(f"{seed}/be lengths")), duration_s, warm_up_s, drain_s)


def _last_due_s(request: TraceRequest) -> float:
    """When its last token is due; a request without targets may take no time at all."""
    return request.arrival_s + (request.ttft_s or 0.0) + request.num_output_tokens * (request.tpot_s or 0.0)


def _dumped(dumps: tuple[BatchDump, ...], generator: random.Random) -> tuple[TraceRequest, ...]:
    return tuple(
        TraceRequest(dump.arrival_s, RequestClass.BE, *dump.lengths.sample(generator))
        for dump in sorted(dumps, key=lambda dump: dump.arrival_s)
        for _ in range(dump.num_requests)
    )
