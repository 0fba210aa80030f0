"""What is scheduled: one sequence, its tokens and how far they have come."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum

from bros_router.request import LatencyTargets, RequestClass
from bros_router.scheduling.speculation import GuessRecord
from bros_shard.protocol import SamplingParams


class SequenceState(Enum):
    """Where a sequence stands. `FINISHED` is entered once and never left."""

    WAITING = "waiting"  # new, or preempted with nothing left
    RUNNING = "running"  # in the steps, or preempted in part
    FINISHED = "finished"


@dataclass(slots=True, eq=False)
class Sequence:
    """One sequence of tokens on its way to its last one. Mutated by the `Scheduler` alone.

    There are no phases. Some tokens are known, some of these are computed (their keys and values are in the
    KV region), and each step computes a few more; when a step computes the last known token, the rank samples
    the next. Prefill, chunked prefill, decode and recomputation after a preemption are all this:

        |<------------ num_known_tokens ------------->|
        | prompt ......... | output ...... | in flight |      in flight: sampled by a step not committed yet
        |<--- num_computed_tokens --->|<-- pending --->|

    `num_computed_tokens` runs ahead of the ranks: it counts what every step planned so far will have computed. Where
    the ranks guess tokens, it is the least that they will have: as if all guesses in flight were wrong.
    """

    sequence_id: int
    request_class: RequestClass
    prompt_token_ids: tuple[int, ...]
    sampling: SamplingParams
    max_new_tokens: int
    #: Tokens that end the sequence; empty where the request asked to ignore them.
    eos_token_ids: frozenset[int]
    arrival_s: float
    #: What a real-time sequence wants; `None` for a best-effort one.
    targets: LatencyTargets | None = None
    #: What its output must match; `None`: anything.
    grammar: str | None = None
    #: As in `ValidRequest`.
    adapter: int | None = None

    state: SequenceState = SequenceState.WAITING
    output_token_ids: list[int] = field(default_factory=list)
    num_computed_tokens: int = 0
    num_in_flight_tokens: int = 0
    #: Guesses in flight: so many tokens more than they count for may turn out to be known, and computed.
    num_uncertain_tokens: int = 0
    #: It lost memory while guesses were in flight, so those that are right are lost with it. It waits until they are
    #: known, and computes them anew.
    is_stalled: bool = False
    #: What guesses were worth so far.
    guesses: GuessRecord = field(default_factory=GuessRecord)
    #: Time the first step with this sequence was planned; `None` until then.
    first_scheduled_s: float | None = None
    #: Times at which the first and the latest token were committed; `None` before.
    first_token_s: float | None = None
    last_token_s: float | None = None
    #: Its targets cannot be met any more, so it no longer holds up those that can.
    is_late: bool = False
    #: Whether the ranks hold its tokens: it goes whole into the first plan, and must be released.
    is_on_ranks: bool = False
    #: What its full blocks hold, of its prompt and of the output that was committed; `None`: they are not shared.
    block_hashes: list[bytes] | None = None
    #: While it waits to be let in: tokens that were in the KV region when that was last looked up.
    num_cached_tokens: int = 0
    #: Tokens of the prompt that it found computed.
    num_reused_tokens: int = 0
    #: As in `ValidRequest`.
    num_prompt_top_tokens: int | None = None

    #: Tokens of the prompt.
    num_prompt_tokens: int = field(init=False)
    #: Most tokens the sequence will ever have, the last one included, which is never computed.
    max_total_tokens: int = field(init=False)

    def __post_init__(self) -> None:
        """Counts that every step asks for, once."""
        self.num_prompt_tokens = len(self.prompt_token_ids)
        self.max_total_tokens = self.num_prompt_tokens + self.max_new_tokens

    @property
    def num_known_tokens(self) -> int:
        """Tokens that the ranks will know once every planned step has run."""
        return self.num_prompt_tokens + len(self.output_token_ids) + self.num_in_flight_tokens

    @property
    def num_pending_tokens(self) -> int:
        """Tokens still to compute before the next one can be sampled; 0 once the last one is in flight."""
        num_known_tokens = self.num_prompt_tokens + len(self.output_token_ids) + self.num_in_flight_tokens
        return min(num_known_tokens, self.max_total_tokens - 1) - self.num_computed_tokens

    @property
    def is_decoding(self) -> bool:
        """Whether the next token is one step away."""
        return self.num_pending_tokens == 1

    @property
    def is_ready(self) -> bool:
        """Whether a step may compute some of it.

        One that was preempted with a token in flight is not: that token may be its last, and computing the sequence
        anew would be for nothing.
        """
        num_pending_tokens = self.num_pending_tokens
        return not self.is_stalled and (
            num_pending_tokens == 1 or (num_pending_tokens > 1 and self.num_in_flight_tokens == 0)
        )

    def num_stored_tokens(self, num_tokens: int) -> int:
        """Most tokens it will have keys and values of once `num_tokens` more are computed."""
        return min(self.num_computed_tokens + self.num_uncertain_tokens + num_tokens, self.max_total_tokens - 1)

    def note_lost_memory(self) -> None:
        """Some of its blocks were taken."""
        if self.num_uncertain_tokens:
            self.is_stalled = True

    def start_over(self) -> None:
        """Its KV is gone: it waits, to be computed anew from its first token."""
        self.num_computed_tokens = self.num_cached_tokens = 0
        self.state = SequenceState.WAITING

    def known_token_ids(self) -> list[int]:
        """Prompt and committed output: what a rank that never saw the sequence must be told."""
        assert self.num_in_flight_tokens == 0, "a token in flight is known to the ranks alone"
        return [*self.prompt_token_ids, *self.output_token_ids]
