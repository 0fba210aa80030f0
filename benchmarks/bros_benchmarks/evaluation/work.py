"""Real-time work: how much was asked for, and how much was done."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass

from bros_benchmarks.evaluation.result import Result
from bros_router.simulation.record import RequestRecord


@dataclass(frozen=True, slots=True)
class Work:
    """Work a second, by what the time of a step depends on (`StepShape` has the terms)."""

    prefill_tokens: float = 0.0
    prefill_attention: float = 0.0
    decodes: float = 0.0
    decode_context: float = 0.0

    def __add__(self, other: Work) -> Work:
        return Work(
            self.prefill_tokens + other.prefill_tokens,
            self.prefill_attention + other.prefill_attention,
            self.decodes + other.decodes,
            self.decode_context + other.decode_context,
        )

    def __mul__(self, factor: float) -> Work:
        return Work(
            factor * self.prefill_tokens,
            factor * self.prefill_attention,
            factor * self.decodes,
            factor * self.decode_context,
        )

    def __sub__(self, other: Work) -> Work:
        return self + other * -1.0


def offered_work(records: Iterable[RequestRecord], start_s: float, stop_s: float) -> Work:
    """Real-time work that was asked for in the window, a second."""
    work = Work()
    for record in records:
        if record.is_rt and start_s <= record.offered_s < stop_s:
            work += _prefill(record.request.num_prompt_tokens)
            work += _decodes(record.request.num_prompt_tokens, 1, record.request.num_output_tokens)
    return work * (1 / (stop_s - start_s))


def done_work(records: Iterable[RequestRecord], start_s: float, stop_s: float) -> Work:
    """Real-time work that was done in the window, a second. A prompt counts when its first token came."""
    work = Work()
    for record in records:
        if not record.is_rt:
            continue
        tokens = [index for index, time_s in enumerate(record.token_s) if start_s <= time_s < stop_s]
        if tokens:
            if tokens[0] == 0:
                work += _prefill(record.request.num_prompt_tokens)
            work += _decodes(record.request.num_prompt_tokens, max(1, tokens[0]), tokens[-1] + 1)
    return work * (1 / (stop_s - start_s))


def _prefill(num_tokens: int) -> Work:
    return Work(prefill_tokens=num_tokens, prefill_attention=num_tokens**2 / 2)


def _decodes(num_prompt_tokens: int, first: int, stop: int) -> Work:
    """Steps that gave output tokens first to stop - 1, counted from 0; token 0 comes with the prompt."""
    count = max(0, stop - first)
    # Token k is computed over the prompt and the k tokens before it.
    return Work(decodes=count, decode_context=count * (num_prompt_tokens + (first + stop - 1) / 2))


def work_fields(records: Sequence[RequestRecord], start_s: float, stop_s: float) -> dict[str, float | None]:
    """For the extra figures of a result: the real-time work that was offered, and that part of it left undone."""
    offered = offered_work(records, start_s, stop_s)
    missing = offered - done_work(records, start_s, stop_s)
    return {
        f"{kind}_{name}": value
        for kind, work in (("offered", offered), ("missing", missing))
        for name, value in asdict(work).items()
    }


def work_of(result: Result, kind: str) -> Work:
    """`offered` or `missing` real-time work of a run, a second: what `work_fields` wrote."""
    return Work(**{name: result.extra[f"{kind}_{name}"] or 0.0 for name in Work.__dataclass_fields__})
