"""Ranks that keep every slot's content and trust nothing, and the sequences that the scheduler's tests feed them."""

from __future__ import annotations

from dataclasses import dataclass

from bros_router.request import FinishReason, LatencyTargets, RequestClass
from bros_router.scheduling.latency_model import LatencyModel
from bros_router.scheduling.sequence import Sequence
from bros_shard.block_layout import slot_of, slots_of
from bros_shard.protocol import (
    SampledToken,
    SamplingParams,
    SequenceResult,
    SequenceStep,
    StepPlan,
    StepResult,
    StepShape,
    shape_of,
)

VOCAB_SIZE = 50


class ExactModel(LatencyModel):
    """Knows what a step takes: a floor, and something for each token, each context token and each copy."""

    def __init__(
        self, floor_s: float = 0.010, token_s: float = 0.001, context_token_s: float = 0.0, copy_s: float = 1e-5
    ) -> None:
        super().__init__()
        self.floor_s, self.token_s, self.context_token_s, self.copy_s = floor_s, token_s, context_token_s, copy_s

    def predict_s(self, shape: StepShape) -> float:
        num_tokens = shape.num_prefill_tokens + shape.num_decode_sequences
        return (
            self.floor_s
            + self.token_s * num_tokens
            + self.context_token_s * shape.decode_context_tokens
            + self.copy_s * shape.num_copied_tokens
        )

    def bound_s(self, shape: StepShape) -> float:
        return self.predict_s(shape)

    def largest_chunk(self, shape: StepShape, num_computed_tokens: int, limit: int, budget_s: float) -> int:
        fitting = [
            n for n in range(1, limit + 1) if self.predict_s(shape.with_sequence(num_computed_tokens, n)) <= budget_s
        ]
        return max(fitting, default=0)

    def observe(self, shape: StepShape, seconds: float) -> None:
        pass


def sampled_token(seed: int, position: int) -> int:
    """What the simulated model says: a function of the seed and the position alone, as the real sampler's."""
    return (seed * 7919 + position * 104729) % VOCAB_SIZE


def guessed_token(seed: int, position: int) -> int:
    """What the simulated ranks guess: right three times out of four."""
    return (sampled_token(seed, position) + (position % 4 == 3)) % VOCAB_SIZE


@dataclass(frozen=True)
class Run:
    """The positions of a sequence that a step computes, and the tokens guessed behind them."""

    sequence_id: int
    start: int
    stop: int
    guesses: list[int]


class SimulatedRanks:
    """Executes plans on a KV region and a host pool whose slots remember what they hold: which token of which sequence,
    or, where sequences may read each other's blocks, after which others of whatever sequence with that adapter."""

    def __init__(
        self,
        block_size: int,
        generation: int = 0,
        num_host_blocks: int = 0,
        model: LatencyModel | None = None,
        *,
        is_shared: bool = False,
    ) -> None:
        self.is_shared = is_shared
        self.block_size = block_size
        self.generation = generation
        self.num_host_blocks = num_host_blocks
        self.model = model or ExactModel()
        self.next_step_id = 0
        #: Interruptions that were run before a step with a lower id.
        self._run_ahead: set[int] = set()
        self.tokens: dict[int, list[int]] = {}
        self.seeds: dict[int, int] = {}
        self.capacities: dict[int, int] = {}
        self.adapters: dict[int, int | None] = {}
        self.tables: dict[int, list[int]] = {}
        #: By sequence and position: what its slot must hold.
        self.contents: dict[int, list[int]] = {}
        self.slots: dict[int, int | None] = {}
        self.host: dict[tuple[int, int], int | None] = {}
        #: (sequence, position) computed more than once.
        self.num_recomputed_tokens = 0
        #: By step.
        self._runs: dict[int, list[Run]] = {}
        self._computed: set[tuple[int, int]] = set()

    def execute(self, plan: StepPlan) -> StepResult:
        while self.next_step_id in self._run_ahead:
            self.next_step_id += 1
        assert plan.step_id == self.next_step_id
        self.next_step_id += 1
        return self._execute(plan)

    def _execute(self, plan: StepPlan) -> StepResult:
        assert plan.generation == self.generation
        for sequence_id in plan.releases:
            for state in (self.tokens, self.seeds, self.capacities, self.adapters, self.tables, self.contents):
                del state[sequence_id]
        for new in plan.new_sequences:
            assert new.sequence_id not in self.tokens
            self.adapters[new.sequence_id] = new.adapter
            self.tokens[new.sequence_id] = []
            self.contents[new.sequence_id] = []
            for token_id in new.token_ids:
                self._append(new.sequence_id, token_id)
            self.seeds[new.sequence_id] = new.sampling.seed
            self.capacities[new.sequence_id] = new.max_total_tokens
            self.tables[new.sequence_id] = []
        self._copy(plan)
        assert len({step.sequence_id for step in plan.sequences}) == len(plan.sequences)
        runs = self._runs[plan.step_id] = [self._resolve(step) for step in plan.sequences]
        results = [self._run(run) for run in runs]
        seconds = self.model.predict_s(shape_of(plan))
        return StepResult(self.generation, plan.step_id, results, 0.0, 0.0, seconds, 0.0)

    def execute_within(self, plan: StepPlan, *running: StepPlan) -> StepResult:
        """Run a plan between two layers of those that run, which then go on: they write their tokens once more, and
        read their context."""
        assert not (plan.releases or plan.copies_out or plan.tail_moves or plan.copies_in)
        assert {new.sequence_id for new in plan.new_sequences} == {step.sequence_id for step in plan.sequences}
        assert plan.step_id >= self.next_step_id and plan.step_id not in self._run_ahead
        self._run_ahead.add(plan.step_id)
        result = self._execute(plan)
        used = {slot for run in self._runs[plan.step_id] for slot in self._slots_of(run)}
        for run in (run for other in running for run in self._runs[other.step_id]):
            assert used.isdisjoint(self._slots_of(run)[run.start :]), "it reads what is not computed yet"
            self._compute(run)
        return result

    def _append(self, sequence_id: int, token_id: int) -> None:
        self.tokens[sequence_id].append(token_id)
        contents = self.contents[sequence_id]
        root = hash(self.adapters[sequence_id]) if self.is_shared else sequence_id
        contents.append(_content(contents[-1] if contents else root, token_id))

    def _slots(self, entry: int, num_tokens: int) -> list[int]:
        assert 1 <= num_tokens <= self.block_size
        return [slot_of(entry, offset, self.block_size) for offset in range(num_tokens)]

    def _copy(self, plan: StepPlan) -> None:
        assert len({copy.host_block for copy in plan.copies_out}) == len(plan.copies_out), "a host block written twice"
        for copy in (*plan.copies_out, *plan.copies_in):
            assert 0 <= copy.host_block < self.num_host_blocks
        for copy in plan.copies_out:
            for offset, slot in enumerate(self._slots(copy.entry, copy.num_tokens)):
                self.host[copy.host_block, offset] = self.slots.get(slot)
        sources = [slot for move in plan.tail_moves for slot in self._slots(move.source_entry, move.num_tokens)]
        targets = [slot for move in plan.tail_moves for slot in self._slots(move.destination_entry, move.num_tokens)]
        assert len({*sources, *targets}) == 2 * len(sources), "a slot moves twice"
        for source, target in zip(sources, targets, strict=True):
            self.slots[target] = self.slots.get(source)
            self.slots[source] = None
        written: set[int] = set()
        for copy in plan.copies_in:
            for offset, slot in enumerate(self._slots(copy.entry, copy.num_tokens)):
                assert slot not in written
                written.add(slot)
                self.slots[slot] = self.host[copy.host_block, offset]

    def _resolve(self, step: SequenceStep) -> Run:
        """Where the run begins, for the router did not know whether all guesses in flight were wrong."""
        sequence_id, table = step.sequence_id, self.tables[step.sequence_id]
        assert step.first_changed_index <= len(table)
        table[step.first_changed_index :] = step.entries
        num_known, capacity = len(self.tokens[sequence_id]), self.capacities[sequence_id]
        start, stop = step.num_computed_tokens, step.num_computed_tokens + step.num_tokens
        if step.num_uncertain_tokens:
            num_confirmed = min(num_known, capacity - 1) - stop
            assert 0 <= num_confirmed <= step.num_uncertain_tokens
            start, stop = start + num_confirmed, stop + num_confirmed
        assert stop <= num_known, "a token is to be computed that nobody knows"
        assert not step.max_speculative_tokens or stop == min(num_known, capacity - 1)
        num_guesses = min(step.max_speculative_tokens, capacity - 1 - stop) - (stop % 3 == 2)
        seed = self.seeds[sequence_id]
        return Run(sequence_id, start, stop, [guessed_token(seed, stop + i) for i in range(num_guesses)])

    def _run(self, run: Run) -> SequenceResult:
        sequence_id, tokens = run.sequence_id, self.tokens[run.sequence_id]
        self._compute(run)
        for position in range(run.start, run.stop):
            self.num_recomputed_tokens += (sequence_id, position) in self._computed
            self._computed.add((sequence_id, position))
        if run.stop < len(tokens):
            return SequenceResult(sequence_id)
        for guess in [*run.guesses, None]:
            assert len(tokens) < self.capacities[sequence_id]
            self._append(sequence_id, sampled_token(self.seeds[sequence_id], len(tokens)))
            if tokens[-1] != guess:
                break
        chosen = [SampledToken(token_id, -1.0) for token_id in tokens[run.stop :]]
        return SequenceResult(sequence_id, chosen, num_speculative_tokens=len(run.guesses))

    def _slots_of(self, run: Run) -> list[int]:
        return slots_of(self.tables[run.sequence_id], 0, run.stop + len(run.guesses), self.block_size)

    def _compute(self, run: Run) -> None:
        slots = self._slots_of(run)
        contents = self.contents[run.sequence_id][: run.stop]
        for token_id in run.guesses:
            contents.append(_content(contents[-1], token_id))
        for position in range(run.start, len(slots)):
            self.slots[slots[position]] = contents[position]
        # Attention reads the whole context: every slot must still hold what was put there.
        assert [self.slots.get(slot) for slot in slots] == contents


def _content(before: int, token_id: int) -> int:
    """What a slot holds: a token, and all before it."""
    return hash((before, token_id))


def make_sequence(
    sequence_id: int,
    num_prompt_tokens: int,
    max_new_tokens: int,
    *,
    request_class: RequestClass = RequestClass.RT,
    eos_token_ids: frozenset[int] = frozenset(),
    arrival_s: float | None = None,
    ttft_s: float = 1.0,
    tpot_s: float = 0.1,
    are_given: bool = True,
    family: int | None = None,
    adapter: int | None = None,
) -> Sequence:
    """A sequence whose output is known: its seed is its id. Prompts of a family begin alike."""
    return Sequence(
        sequence_id,
        request_class,
        tuple(((sequence_id if family is None else family) + i) % VOCAB_SIZE for i in range(num_prompt_tokens)),
        SamplingParams(seed=sequence_id),
        max_new_tokens,
        eos_token_ids,
        float(sequence_id) if arrival_s is None else arrival_s,
        LatencyTargets(ttft_s, tpot_s, are_given) if request_class is RequestClass.RT else None,
        adapter=adapter,
    )


def expected_output(sequence: Sequence) -> tuple[list[int], FinishReason]:
    """What the sequence must give, however it was scheduled."""
    tokens: list[int] = []
    while True:
        tokens.append(sampled_token(sequence.sequence_id, sequence.num_prompt_tokens + len(tokens)))
        if len(tokens) == sequence.max_new_tokens:
            return tokens, FinishReason.LENGTH
        if tokens[-1] in sequence.eos_token_ids:
            return tokens, FinishReason.EOS_TOKEN


def shapes(plan: StepPlan) -> list[tuple[int, int, int]]:
    """(sequence, tokens computed before, tokens) of each part of a plan."""
    return [(s.sequence_id, s.num_computed_tokens, s.num_tokens) for s in plan.sequences]
