"""What best-effort throughput can be at most beside given real-time work, where the KV region is short as well as time.

A real-time sequence gets at most a token a step, so the longer steps are, the longer it holds its memory, and the fewer
best-effort sequences fit beside it. The shorter they are, the more of the time goes into what every step costs. The
bound is the best compromise, for steps that are all alike.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from bros_benchmarks.evaluation.work import Work
from bros_router.simulation.hardware import Hardware
from bros_shard.protocol import StepShape

#: Lengths of a step that are tried, in seconds: each this many times the one before.
_SHORTEST_STEP_S: Final = 0.002
_LONGEST_STEP_S: Final = 20.0
_STEP_RATIO: Final = 1.01
_BISECTIONS: Final = 24


@dataclass(frozen=True, slots=True)
class RegionBound:
    """A device whose KV region real-time and best-effort sequences share."""

    hardware: Hardware
    num_kv_tokens: int
    #: Mean prompt and output tokens of best-effort requests.
    be_lengths: tuple[float, float]
    #: No step is longer, in seconds: the TPOT target. `None`: any length.
    longest_step_s: float | None

    def tokens_per_s(self, offered: Work) -> float:
        """Best-effort output tokens a second beside this real-time work, were no memory ever free or held twice."""
        best, step_s = 0.0, _SHORTEST_STEP_S
        while step_s <= (self.longest_step_s or _LONGEST_STEP_S):
            best = max(best, self._num_decodes(offered, step_s) / step_s)
            step_s *= _STEP_RATIO
        return best

    def _num_decodes(self, offered: Work, step_s: float) -> float:
        """Best-effort sequences that decode in a step of this length: as many as fit the region, and the time."""
        num_prompt_tokens, num_output_tokens = self.be_lengths
        held_tokens = offered.decode_context * step_s  # each decode holds its context for a step
        fewest, most = 0.0, (self.num_kv_tokens - held_tokens) / (num_prompt_tokens + num_output_tokens / 2)
        if most <= 0.0:
            return 0.0
        for _ in range(_BISECTIONS):
            middle = (fewest + most) / 2
            if self.hardware.seconds(self._step(offered, step_s, middle)) <= step_s:
                fewest = middle
            else:
                most = middle
        return fewest

    def _step(self, offered: Work, step_s: float, num_decodes: float) -> StepShape:
        """The work of a step in which so many best-effort sequences decode, and as many prompts are computed as they
        need to go on."""
        num_prompt_tokens, num_output_tokens = self.be_lengths
        num_be_tokens = num_decodes * num_prompt_tokens / num_output_tokens
        be_context = num_decodes * (num_prompt_tokens + num_output_tokens / 2)
        return StepShape(
            num_prefill_tokens=round(offered.prefill_tokens * step_s + num_be_tokens),
            num_prefill_sequences=1,
            num_decode_sequences=round(offered.decodes * step_s + num_decodes),
            prefill_attention=offered.prefill_attention * step_s + num_be_tokens * num_prompt_tokens / 2,
            decode_context_tokens=round(offered.decode_context * step_s + be_context),
        )
