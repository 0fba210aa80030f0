"""How much best-effort work there is room for beside the real-time work, and what a policy owes that left some undone.

A device that decodes for somebody is never idle, so wall time says nothing about the room that real-time work
leaves. Its *marginal* time does: what its tokens add to steps that run anyway.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterable
from dataclasses import dataclass

from bros_router.simulation.hardware import Hardware
from bros_router.simulation.record import RequestRecord
from bros_shard.protocol import StepShape


@dataclass(frozen=True, slots=True)
class BestEffortBound:
    """The room for best-effort work in the window of a run. All but the first are derived from these figures."""

    #: Tokens a second of the best-effort work alone, on the same hardware.
    alone_tokens_per_s: float
    #: Marginal device seconds of the real-time work, for each second: of what was offered, and of what was done.
    rt_offered_share: float
    rt_done_share: float

    @property
    def tokens_per_s(self) -> float:
        """Best-effort tokens a second beside all of the real-time work that was offered."""
        return self.alone_tokens_per_s * max(0.0, 1.0 - self.rt_offered_share)

    def charged(self, be_tokens_per_s: float) -> float:
        """What a policy's best-effort throughput is worth once the real-time work that it left undone is done too."""
        missing_share = max(0.0, self.rt_offered_share - self.rt_done_share)
        return max(0.0, be_tokens_per_s - self.alone_tokens_per_s * missing_share)


def be_bound(
    records: Iterable[RequestRecord], hardware: Hardware, alone_tokens_per_s: float, start_s: float, stop_s: float
) -> BestEffortBound:
    """The bound for the window [start_s, stop_s) of a run on hardware without noise."""
    rt = [record for record in records if record.is_rt]
    offered = done = StepShape()
    for record in rt:
        if start_s <= record.offered_s < stop_s:
            offered = _sum(offered, _work(record, 0, record.request.num_output_tokens))
        first, last = (bisect_left(record.token_s, time_s) for time_s in (start_s, stop_s))
        done = _sum(done, _work(record, first, last))
    seconds = stop_s - start_s
    return BestEffortBound(
        alone_tokens_per_s,
        _marginal_s(offered, hardware) / seconds,
        _marginal_s(done, hardware) / seconds,
    )


def _work(record: RequestRecord, first: int, last: int) -> StepShape:
    """The work behind output tokens [first, last): the first one takes the prompt, each other one a decode."""
    num_prompt_tokens = record.request.num_prompt_tokens
    shape = StepShape()
    if first == 0 and last > 0:
        shape = shape.with_sequence(0, num_prompt_tokens)
        first = 1
    num_decodes = max(0, last - first)
    # Output token i is computed from a context of the prompt and i tokens.
    context = num_decodes * num_prompt_tokens + (first + last - 1) * num_decodes // 2
    return _sum(shape, StepShape(num_decode_sequences=num_decodes, decode_context_tokens=context))


def _sum(a: StepShape, b: StepShape) -> StepShape:
    return StepShape(
        a.num_prefill_tokens + b.num_prefill_tokens,
        a.num_prefill_sequences + b.num_prefill_sequences,
        a.num_decode_sequences + b.num_decode_sequences,
        a.prefill_attention + b.prefill_attention,
        a.decode_context_tokens + b.decode_context_tokens,
        a.num_copied_tokens + b.num_copied_tokens,
    )


def _marginal_s(work: StepShape, hardware: Hardware) -> float:
    """Time that work adds to steps that run anyway: as if all of it were one step, so large that what a step costs
    whatever it holds does not count."""
    if work.num_prefill_tokens + work.num_decode_sequences == 0:
        return 0.0
    return hardware.seconds(work)
