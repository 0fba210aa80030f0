"""What best-effort throughput can be at most beside given real-time work, and what a policy owes for work left undone.

While real-time requests decode the device is never idle, so wall time says nothing about what is left for
best-effort work. What counts is the time that real-time work *adds* to steps that would run anyway.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace

from bros_benchmarks.evaluation.region_bound import RegionBound
from bros_benchmarks.evaluation.result import Result
from bros_benchmarks.evaluation.work import Work, work_of
from bros_router.simulation.hardware import Hardware
from bros_shard.protocol import StepShape


@dataclass(frozen=True, slots=True)
class Slopes:
    """Seconds that a unit of each kind of work adds to a step: c1, c3, c2 and c4 of the step-time model."""

    prefill_token_s: float
    prefill_attention_s: float
    decode_s: float
    decode_context_s: float

    def seconds(self, work: Work) -> float:
        """Marginal device seconds a second: the share of the device that the work takes."""
        return (
            self.prefill_token_s * work.prefill_tokens
            + self.prefill_attention_s * work.prefill_attention
            + self.decode_s * work.decodes
            + self.decode_context_s * work.decode_context
        )


def slopes_at(hardware: Hardware, base: StepShape) -> Slopes:
    """The slopes of the step time where steps look like `base`: for the bound, as they look without real-time work."""
    base_s = hardware.seconds(base)

    def slope(amount: int, **added: float) -> float:
        values = {name: getattr(base, name) for name in StepShape.__struct_fields__}
        return (hardware.seconds(StepShape(**{**values, **added})) - base_s) / amount

    return Slopes(
        slope(64, num_prefill_tokens=base.num_prefill_tokens + 64),
        slope(100_000, prefill_attention=base.prefill_attention + 100_000.0),
        slope(16, num_decode_sequences=base.num_decode_sequences + 16),
        slope(10_000, decode_context_tokens=base.decode_context_tokens + 10_000),
    )


def mixed_step(num_tokens: float, num_sequences: float, context_tokens: float) -> StepShape:
    """A step of that many tokens in that many sequences, of which one is in prefill and the others decode.

    Args:
        context_tokens: about how many tokens a decoding sequence has.
    """
    num_decodes = round(max(0.0, num_sequences - 1))
    num_prefill_tokens = max(1, round(num_tokens - num_decodes))
    return StepShape(
        num_prefill_tokens=num_prefill_tokens,
        num_prefill_sequences=1,
        num_decode_sequences=num_decodes,
        prefill_attention=num_prefill_tokens * (context_tokens + num_prefill_tokens) / 2,
        decode_context_tokens=round(num_decodes * context_tokens),
    )


@dataclass(frozen=True, slots=True)
class Ceiling:
    """What best-effort throughput is compared with."""

    #: Tokens a second without real-time work.
    be_only_tokens_per_s: float
    slopes: Slopes
    #: The bound that knows memory too; `None` where the device is not known so well.
    region: RegionBound | None = None

    def bound(self, offered: Work) -> float:
        """Tokens a second that are left beside the real-time work that was asked for."""
        return self.be_only_tokens_per_s * max(0.0, 1 - self.slopes.seconds(offered))

    def region_bound(self, offered: Work) -> float | None:
        """The same where memory is short as well: what steps that are all alike lose beside this work, every policy
        loses. That loads come in groups, say, costs best-effort work alone too; so it is in both."""
        if self.region is None:
            return None
        return self.be_only_tokens_per_s * self.region.tokens_per_s(offered) / self.region.tokens_per_s(Work())

    def charged(self, tokens_per_s: float, missing: Work) -> float:
        """Tokens a second that a policy would have had, had it also done the real-time work that it left undone.

        Work of earlier requests that was made up for in the window is credited alike.
        """
        return tokens_per_s - self.be_only_tokens_per_s * self.slopes.seconds(missing)


def charge(results: Iterable[Result], ceiling: Ceiling) -> list[Result]:
    """The same results with the best-effort bound, and the throughput after paying for real-time work left undone."""
    return [
        replace(
            result,
            extra={
                **result.extra,
                "be_bound": ceiling.bound(work_of(result, "offered")),
                "be_region_bound": ceiling.region_bound(work_of(result, "offered")),
                "be_charged": ceiling.charged(result.summary.be_tokens_per_s, work_of(result, "missing")),
                "be_only": ceiling.be_only_tokens_per_s,
            },
        )
        for result in results
    ]
