"""How the BROS policy decides a step: tables of what stands and what is planned.

The model of time is exact: 10 ms a step and 1 ms a token, so a step of n tokens takes 10 + n ms.
"""

from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bros_router.kv.kv_manager import KVManager, Preemption
from bros_router.request import RequestClass
from bros_router.scheduling.batch_cap import CapControl
from bros_router.scheduling.deadlines import met_targets
from bros_router.scheduling.policies.bros import BrosOptions, BrosPolicy
from bros_router.scheduling.policies.ordered import FirstComeFirstServed
from bros_router.scheduling.scheduler import Scheduler
from bros_router.scheduling.sequence import SequenceState
from bros_router.scheduling.step_draft import SchedulerLimits
from simulated_ranks import ExactModel, SimulatedRanks, expected_output, make_sequence, shapes

RT, BE = RequestClass.RT, RequestClass.BE


class Bench:
    """A scheduler with its ranks and a clock that a step moves on by what it takes."""

    def __init__(
        self,
        num_blocks: int = 1024,
        max_batch_tokens: int = 512,
        num_host_blocks: int = 16,
        preemption: Preemption = Preemption.BIDIR,
        policy=None,
        can_interrupt: bool = False,
        max_num_sequences: int = 256,
        **options,
    ) -> None:
        self.model = ExactModel()
        self.kv = KVManager(num_blocks, 16, num_host_blocks, preemption)
        limits = SchedulerLimits(max_batch_tokens, max_num_sequences, can_interrupt)
        options.setdefault("cap_control", CapControl.OFF)
        self.policy = policy or BrosPolicy(self.model, limits, BrosOptions(**options))
        self.scheduler = Scheduler(self.policy, self.kv, self.model, limits)
        self.ranks = SimulatedRanks(16, num_host_blocks=num_host_blocks, model=self.model)
        self.now_s = 0.0
        self.num_sequences = 0
        self.num_copied_out_tokens = self.num_restored_tokens = 0

    def add(self, request_class, num_prompt_tokens, max_new_tokens=100, **fields):
        self.num_sequences += 1
        fields.setdefault("arrival_s", self.now_s)
        sequence = make_sequence(
            self.num_sequences, num_prompt_tokens, max_new_tokens, request_class=request_class, **fields
        )
        self.scheduler.add(sequence)
        return sequence

    def step(self):
        """Plan, run and commit one step; returns the plan's (sequence, computed before, tokens)."""
        plan = self.scheduler.plan(self.now_s)
        if plan is None:
            return None
        self.num_copied_out_tokens += sum(copy.num_tokens for copy in plan.copies_out)
        self.num_restored_tokens += sum(copy.num_tokens for copy in plan.copies_in)
        result = self.ranks.execute(plan)
        self.now_s += result.step_s
        self.scheduler.commit(result, self.now_s)
        self.kv.check_integrity()
        return shapes(plan)

    def run(self, num_steps=2000):
        for _ in range(num_steps):
            if self.step() is None:
                return
        raise AssertionError("it does not end")


def leave_no_time(bench, max_new_tokens):
    """Let 30 real-time sequences decode: that takes 40 ms, and each wants its next token after 39."""
    for _ in range(30):
        bench.add(RT, 16, max_new_tokens=max_new_tokens, ttft_s=5.0, tpot_s=0.039)
    for _ in range(3):
        bench.step()


def test_real_time_alone_is_plain_chunked_prefill():
    """Chunks fill the token budget and decodes join them, exactly as under first come, first served."""
    plans = []
    for policy in (None, FirstComeFirstServed()):
        bench = Bench(max_batch_tokens=64, policy=policy)
        for num_prompt_tokens in (100, 30, 50):
            bench.add(RT, num_prompt_tokens, max_new_tokens=4, ttft_s=10.0, tpot_s=10.0)
        plans.append([])
        while (plan := bench.step()) is not None:
            plans[-1].append(plan)
    assert Counter(n for plan in plans[0] for _, _, n in plan if n > 1) == Counter(
        n for plan in plans[1] for _, _, n in plan if n > 1
    )
    assert len(plans[0]) == len(plans[1])


def test_best_effort_fills_the_time_that_a_decode_leaves():
    bench = Bench(keeps_steps_short=False)
    chat = bench.add(RT, 16, ttft_s=1.0, tpot_s=0.1)
    bench.step()
    bench.add(BE, 400)
    # The next token is due 0.1 s after the first. 5 % are a guard: a step of 10 + 1 + 80 ms fits 95 ms.
    assert bench.step() == [(chat.sequence_id, 16, 1), (2, 0, 80)]


def test_step_with_best_effort_work_stays_short_for_the_request_that_may_come():
    bench = Bench()
    bench.add(RT, 90, max_new_tokens=1, ttft_s=0.4, tpot_s=1.0)
    bench.step()
    bench.add(BE, 400)
    # The prompt left 300 ms of its target; the next may wait for 0.6 of that: 10 + 170 ms, in units of 16.
    assert bench.step() == [(2, 0, 160)]


def test_example_of_the_documentation():
    """docs/scheduling.md walks through these steps."""
    bench = Bench()
    a = bench.add(RT, 16, ttft_s=1.0, tpot_s=0.1)
    bench.step()
    begin_s = bench.now_s
    b = bench.add(RT, 48, ttft_s=0.2, tpot_s=0.1)
    c = bench.add(BE, 400)
    assert bench.step() == [(a.sequence_id, 16, 1), (b.sequence_id, 0, 48), (c.sequence_id, 0, 16)]
    assert bench.now_s - begin_s == pytest.approx(0.075)
    assert bench.step() == [(a.sequence_id, 17, 1), (b.sequence_id, 48, 1), (c.sequence_id, 16, 64)]
    assert bench.now_s - begin_s == pytest.approx(0.151)


def test_without_real_time_requests_best_effort_gets_the_whole_budget():
    bench = Bench()
    bench.add(BE, 400)
    bench.add(BE, 400)
    assert bench.step() == [(1, 0, 400), (2, 0, 112)]


def test_waiting_prompts_go_by_latest_start_not_by_arrival():
    bench = Bench(max_batch_tokens=64)
    bench.add(RT, 64, ttft_s=5.0)
    urgent = bench.add(RT, 64, ttft_s=0.3)
    assert bench.step() == [(urgent.sequence_id, 0, 64)]


def test_prompt_of_a_waiting_request_bounds_what_best_effort_may_add():
    """It gets its first token in this step, by its deadline, so best-effort may use what is left until then."""
    bench = Bench(keeps_steps_short=False)
    bench.add(RT, 48, ttft_s=0.2)
    bench.add(BE, 400)
    assert bench.step() == [(1, 0, 48), (2, 0, 80)]  # 10 + 48 + 80 is within 0.7 of 200


def test_request_that_cannot_meet_its_target_is_relegated_and_bounds_nobody():
    bench = Bench(max_batch_tokens=64)
    hopeless = bench.add(RT, 64, ttft_s=0.05, max_new_tokens=2)
    good = bench.add(RT, 64, ttft_s=0.3, max_new_tokens=2)
    assert bench.step() == [(good.sequence_id, 0, 64)]
    assert hopeless.is_late and not good.is_late
    bench.run()
    assert hopeless.state is SequenceState.FINISHED
    assert bench.scheduler.take_relegated() == [hopeless]


def test_target_that_nobody_set_relegates_nobody():
    bench = Bench(max_batch_tokens=64)
    hopeless = bench.add(RT, 64, ttft_s=0.05, are_given=False)
    bench.add(RT, 64, ttft_s=0.3, are_given=False)
    bench.step()
    assert not hopeless.is_late


def test_burst_takes_the_newest_blocks_of_best_effort_and_gives_them_back():
    bench = Bench(num_blocks=16, num_host_blocks=16, keeps_steps_short=False)
    batch = [bench.add(BE, 100, max_new_tokens=30) for _ in range(2)]
    for _ in range(3):
        bench.step()
    burst = [bench.add(RT, 60, max_new_tokens=20, ttft_s=1.0, tpot_s=0.2) for _ in range(3)]
    bench.step()
    assert all(bench.kv.num_owned_blocks(chat.sequence_id) == 4 for chat in burst)
    assert bench.kv.num_owned_blocks(batch[0].sequence_id) > bench.kv.num_owned_blocks(batch[1].sequence_id)
    bench.run()
    assert bench.num_copied_out_tokens > 0
    assert bench.num_restored_tokens > 0
    for sequence in (*batch, *burst):
        assert sequence.output_token_ids == expected_output(sequence)[0]
    assert all(all(met_targets(chat)) for chat in burst)
    assert bench.ranks.num_recomputed_tokens == 0  # a copy is a hundred times cheaper here


def test_without_a_host_pool_what_was_taken_is_computed_anew():
    bench = Bench(num_blocks=16, num_host_blocks=0)
    batch = [bench.add(BE, 100, max_new_tokens=30) for _ in range(2)]
    for _ in range(3):
        bench.step()
    bench.add(RT, 60, max_new_tokens=20)
    bench.add(RT, 60, max_new_tokens=20)
    bench.run()
    assert bench.ranks.num_recomputed_tokens > 0
    assert all(sequence.output_token_ids == expected_output(sequence)[0] for sequence in batch)


def test_best_effort_never_takes_from_real_time():
    bench = Bench(num_blocks=8)
    chat = bench.add(RT, 100, max_new_tokens=20, ttft_s=10.0)
    bench.step()
    bench.add(BE, 60, max_new_tokens=4)
    while chat.state is not SequenceState.FINISHED:
        before = bench.kv.num_owned_blocks(chat.sequence_id)
        bench.step()
        assert chat.state is SequenceState.FINISHED or bench.kv.num_owned_blocks(chat.sequence_id) >= before
    bench.run()


def test_late_sequences_give_way_to_those_in_time_after_best_effort_ones_and_get_their_blocks_back():
    bench = Bench(num_blocks=16, num_host_blocks=16, keeps_steps_short=False)
    batch = bench.add(BE, 40, max_new_tokens=30)
    late = bench.add(RT, 140, max_new_tokens=30, ttft_s=0.01)
    for _ in range(3):
        bench.step()
    assert late.is_late and late.state is SequenceState.RUNNING
    assert bench.scheduler.num_held_tokens() == 0
    chats = [bench.add(RT, 60, max_new_tokens=10, ttft_s=1.0, tpot_s=0.2) for _ in range(3)]
    bench.step()
    assert [bench.kv.num_owned_blocks(one.sequence_id) for one in (batch, late, *chats)] == [0, 4, 4, 4, 4]
    assert bench.scheduler.num_held_tokens() == 3 * 4 * 16
    bench.run()
    for sequence in (batch, late, *chats):
        assert sequence.output_token_ids == expected_output(sequence)[0]
    assert all(all(met_targets(chat)) for chat in chats)
    assert bench.ranks.num_recomputed_tokens == 0


def test_starving_work_waits_no_longer_after_the_ranks_were_replaced():
    """Steps are counted anew then, and so must be what hangs on their number."""
    bench = Bench(be_max_wait_s=1.0)
    leave_no_time(bench, max_new_tokens=4000)
    waits_s = []
    for generation in (None, 1):
        if generation:
            bench.scheduler.restart(generation)
            bench.ranks = SimulatedRanks(16, generation, 16, bench.model)
        for _ in range(3):
            bench.step()
        starving = bench.add(BE, 16, max_new_tokens=1)
        while starving.first_token_s is None and bench.now_s < 60.0:
            bench.step()
        assert starving.first_token_s is not None
        waits_s.append(starving.first_token_s - starving.arrival_s)
        for _ in range(200):
            bench.step()
    assert waits_s[1] < 1.5 * waits_s[0]


def test_starving_best_effort_gets_a_token_now_and_then():
    """Decodes that leave no time for anything else: without the floor it would wait for all of them."""
    bench = Bench(be_max_wait_s=1.0)
    leave_no_time(bench, max_new_tokens=400)
    starving = bench.add(BE, 16, max_new_tokens=8)
    while starving.first_token_s is None and bench.now_s < 10.0:
        bench.step()
    assert starving.first_token_s is not None
    assert starving.first_token_s - starving.arrival_s > 1.0


def test_soft_floor_gives_nothing_while_targets_are_missed_and_a_hard_one_does():
    first_token_s = {}
    for is_hard in (False, True):
        bench = Bench(be_max_wait_s=1.0, is_floor_hard=is_hard)
        missed = bench.add(RT, 16, max_new_tokens=1, ttft_s=0.001)
        bench.run()
        assert missed.is_late
        leave_no_time(bench, max_new_tokens=100)
        starving = bench.add(BE, 16, max_new_tokens=8)
        bench.run()
        first_token_s[is_hard] = starving.first_token_s - starving.arrival_s
    assert first_token_s[True] < 2.0 < first_token_s[False]


def test_long_prompt_advances_although_decodes_leave_no_time():
    bench = Bench()
    leave_no_time(bench, max_new_tokens=200)
    long = bench.add(RT, 64, max_new_tokens=2, ttft_s=1.0)
    for _ in range(40):
        bench.step()
    assert long.first_token_s is not None


@pytest.mark.parametrize("control", [CapControl.AIMD, CapControl.RESET])
def test_cap_grows_while_nothing_is_held_back(control):
    bench = Bench(cap_control=control)
    bench.add(BE, 16, max_new_tokens=100)
    bench.run()
    assert bench.policy.cap.value > 128


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.tuples(st.integers(16, 200), st.integers(1, 40), st.floats(0.0, 0.4)), min_size=1, max_size=12),
    st.lists(st.tuples(st.integers(1, 300), st.integers(1, 40)), max_size=12),
)
def test_adding_best_effort_makes_no_feasible_real_time_request_miss(chats, batch):
    """With enough memory and an exact model, whoever meets its targets alone meets them beside any batch.

    A request that arrives while a step runs waits for its end: targets here leave room for that.
    """

    def attainment(with_batch):
        bench = Bench(num_blocks=1024, max_batch_tokens=256)
        for num_prompt_tokens, max_new_tokens in batch if with_batch else []:
            bench.add(BE, num_prompt_tokens, max_new_tokens)
        real_time, arrivals, arrival_s = [], [], 0.0
        for num_prompt_tokens, max_new_tokens, gap_s in chats:
            arrival_s += gap_s
            arrivals.append((arrival_s, num_prompt_tokens, max_new_tokens))
        while arrivals or any(chat.state is not SequenceState.FINISHED for chat in real_time):
            while arrivals and arrivals[0][0] <= bench.now_s:
                at_s, num_prompt_tokens, max_new_tokens = arrivals.pop(0)
                real_time.append(
                    bench.add(RT, num_prompt_tokens, max_new_tokens, arrival_s=at_s, ttft_s=2.0, tpot_s=0.2)
                )
            if bench.step() is None:
                bench.now_s = arrivals[0][0]
        return [all(met_targets(chat)) for chat in real_time]

    alone, beside = attainment(False), attainment(True)
    assert all(there or not here for here, there in zip(alone, beside, strict=True))


def test_same_calls_give_the_same_plans():
    plans = []
    for _ in range(2):
        bench = Bench(num_blocks=12)
        plans.append([])
        for number in range(60):
            if number % 3 == 0:
                bench.add(RT if number % 2 else BE, 20 + number, max_new_tokens=10)
            plans[-1].append(bench.step())
    assert plans[0] == plans[1]


def test_real_time_sequences_that_outgrow_the_memory_lend_each_other_what_is_needed():
    """Nobody is computed anew: the one that can wait longest gives a block at a time, and gets it back."""
    bench = Bench(num_blocks=10, num_host_blocks=16)
    patient = bench.add(RT, 48, max_new_tokens=80, ttft_s=5.0, tpot_s=0.5)
    urgent = bench.add(RT, 48, max_new_tokens=80, ttft_s=5.0, tpot_s=0.05)
    num_lost_blocks = []
    while urgent.state is not SequenceState.FINISHED:
        before = bench.kv.num_owned_blocks(patient.sequence_id)
        bench.step()
        num_lost_blocks.append(before - bench.kv.num_owned_blocks(patient.sequence_id))
    assert max(num_lost_blocks) == 1
    assert sum(num_lost > 0 for num_lost in num_lost_blocks) >= 3
    assert bench.num_copied_out_tokens >= 3 * 16 - 15
    bench.run()
    assert bench.num_restored_tokens == bench.num_copied_out_tokens
    assert met_targets(urgent) == (True, True) == met_targets(patient)
    assert patient.output_token_ids == expected_output(patient)[0]


def test_urgent_prompt_goes_before_the_next_chunk_of_a_long_one():
    bench = Bench(max_batch_tokens=64)
    long = bench.add(RT, 640, max_new_tokens=1, ttft_s=10.0)
    assert bench.step() == [(long.sequence_id, 0, 64)]
    short = bench.add(RT, 48, max_new_tokens=1, ttft_s=0.2)
    assert bench.step() == [(short.sequence_id, 0, 48), (long.sequence_id, 64, 16)]
    bench.run()
    assert met_targets(short)[0] and met_targets(long)[0]


@pytest.mark.parametrize(("ttft_s", "first_chunk"), [(1.9, 96), (0.8, 512)])
def test_prompt_with_time_to_spare_keeps_steps_short(ttft_s, first_chunk):
    bench = Bench()
    bench.add(RT, 40, max_new_tokens=1, ttft_s=0.25)  # its slack is 200 ms
    bench.run()
    # It needs 522 ms alone. With more than twice that to spare, steps end within 0.6 of 200 ms: 10 + 96 ms, in 16s.
    long = bench.add(RT, 512, max_new_tokens=1, ttft_s=ttft_s)
    assert bench.step() == [(long.sequence_id, 0, first_chunk)]
    bench.run()
    assert met_targets(long)[0]


def test_best_effort_work_gets_time_beside_decodes_as_it_gets_memory():
    chunks = {}
    for num_blocks in (60, 240, 440):
        bench = Bench(num_blocks=num_blocks)
        bench.add(BE, 90, max_new_tokens=20)
        bench.run()  # now it is known what best-effort sequences are like
        for _ in range(5):  # 5 x 8 blocks
            bench.add(RT, 120, ttft_s=5.0, tpot_s=5.0)
        bench.step()
        bench.step()
        batch = bench.add(BE, 500)
        chunks[num_blocks] = sum(n for sequence_id, _, n in bench.step() if sequence_id == batch.sequence_id)
    # With 240 blocks, 188 are left beside those of the decodes and a reserve of 12: 30 sequences of 100 tokens. They
    # get the same share of that as of the region, so 23. Each decodes, and brings 4.5 tokens of a prompt: 129, or 128
    # in 16s. With 440 blocks 51 decode.
    assert chunks == {60: 0, 240: 128, 440: 272}


# --- interruptions


def begin_step(bench):
    """Let the ranks begin a step of 250 ms with a best-effort prompt in it; returns the plan."""
    bench.add(BE, 240, max_new_tokens=2)
    plan = bench.scheduler.plan(bench.now_s)
    assert shapes(plan) == [(1, 0, 240)]
    bench.now_s += 0.001
    return plan


def test_prompt_that_cannot_wait_is_run_in_the_middle_of_a_step():
    bench = Bench(can_interrupt=True)
    running = begin_step(bench)
    chat = bench.add(RT, 32, max_new_tokens=3, ttft_s=0.1, tpot_s=0.4)
    plan = bench.scheduler.interrupt(bench.now_s)
    assert plan.is_interruption
    assert shapes(plan) == [(chat.sequence_id, 0, 32)]
    assert bench.scheduler.free_at_s(bench.now_s) == pytest.approx(0.250 + 0.042)
    running_result = bench.ranks.execute(running)
    bench.scheduler.commit(bench.ranks.execute_within(plan, running), bench.now_s + 0.042)
    assert len(chat.output_token_ids) == 1
    bench.scheduler.commit(running_result, bench.now_s + 0.291)
    bench.now_s += 0.291
    assert bench.step()[0] == (chat.sequence_id, 32, 1)
    bench.run()
    assert met_targets(chat) == (True, True)
    assert chat.output_token_ids == expected_output(chat)[0]


def test_prompt_that_would_have_little_time_left_after_waiting_does_not_wait():
    """The running step is predicted to end at 250 ms, and might be slower; alone the prompt takes 42 ms."""
    bench = Bench(can_interrupt=True)
    begin_step(bench)
    chat = bench.add(RT, 32, ttft_s=0.5)
    assert shapes(bench.scheduler.interrupt(bench.now_s)) == [(chat.sequence_id, 0, 32)]


@pytest.mark.parametrize(
    ("num_prompt_tokens", "ttft_s", "why"),
    [
        (32, 1.0, "it can wait for the next step"),
        (32, 0.040, "it is too late in any case"),
        (600, 0.75, "no step holds it whole"),
        (16 * 50, 1.0, "its blocks are not free"),
    ],
)
def test_step_is_not_interrupted_without_need_or_use(num_prompt_tokens, ttft_s, why):
    bench = Bench(num_blocks=64, max_batch_tokens=1024 if "blocks" in why else 512, can_interrupt=True)
    begin_step(bench)
    bench.add(RT, num_prompt_tokens, ttft_s=ttft_s)
    assert bench.scheduler.interrupt(bench.now_s) is None, why


def test_step_is_interrupted_by_all_who_are_in_time_together_and_then_again():
    bench = Bench(can_interrupt=True)
    running = begin_step(bench)
    bench.ranks.execute(running)
    first, second = (bench.add(RT, 32, ttft_s=0.1) for _ in range(2))
    third = bench.add(RT, 64, ttft_s=0.2)
    # 10 + 64 ms are in time for both, 10 + 128 ms are not.
    plan = bench.scheduler.interrupt(bench.now_s)
    assert shapes(plan) == [(first.sequence_id, 0, 32), (second.sequence_id, 0, 32)]
    assert bench.scheduler.interrupt(bench.now_s) is None  # the third would make them late
    bench.scheduler.commit(bench.ranks.execute_within(plan, running), bench.now_s + 0.074)
    assert shapes(bench.scheduler.interrupt(bench.now_s + 0.074)) == [(third.sequence_id, 0, 64)]


def test_short_prompt_interrupts_a_long_one_that_has_time_but_none_interrupts_the_short_one():
    bench = Bench(can_interrupt=True)
    running = begin_step(bench)
    bench.ranks.execute(running)
    long = bench.add(RT, 120, ttft_s=0.24)
    outer = bench.scheduler.interrupt(bench.now_s)
    assert shapes(outer) == [(long.sequence_id, 0, 120)]  # 130 ms
    bench.now_s += 0.010
    short = bench.add(RT, 16, ttft_s=0.05)
    inner = bench.scheduler.interrupt(bench.now_s)
    assert shapes(inner) == [(short.sequence_id, 0, 16)]  # 26 ms
    assert bench.scheduler.free_at_s(bench.now_s) == pytest.approx(0.250 + 0.130 + 0.026)
    bench.add(RT, 16, ttft_s=0.05)
    assert bench.scheduler.interrupt(bench.now_s) is None
    outer_result = bench.ranks.execute(outer)
    bench.scheduler.commit(bench.ranks.execute_within(inner, running, outer), bench.now_s + 0.026)
    bench.scheduler.commit(outer_result, bench.now_s + 0.146)
    assert met_targets(short)[0] and met_targets(long)[0]


def test_step_is_interrupted_though_the_next_one_was_sent():
    bench = Bench(can_interrupt=True)
    running = begin_step(bench)
    following = bench.scheduler.plan(bench.now_s)
    assert shapes(following) == [(1, 240, 1)]
    chat = bench.add(RT, 32, ttft_s=0.1)
    plan = bench.scheduler.interrupt(bench.now_s)
    assert shapes(plan) == [(chat.sequence_id, 0, 32)]
    assert bench.scheduler.free_at_s(bench.now_s) == pytest.approx(0.250 + 0.011 + 0.042)
    running_result = bench.ranks.execute(running)
    bench.scheduler.commit(bench.ranks.execute_within(plan, running), bench.now_s + 0.042)
    bench.scheduler.commit(running_result, 0.292)
    bench.scheduler.commit(bench.ranks.execute(following), 0.303)
    assert met_targets(chat)[0]


def test_interruption_that_comes_too_late_for_a_step_delays_the_next_one():
    bench = Bench(can_interrupt=True)
    running = begin_step(bench)
    following = bench.scheduler.plan(bench.now_s)
    bench.add(RT, 32, ttft_s=0.1)
    plan = bench.scheduler.interrupt(bench.now_s)
    bench.scheduler.commit(bench.ranks.execute(running), 0.250)
    assert bench.scheduler.free_at_s(0.250) == pytest.approx(0.250 + 0.011 + 0.042)
    following_result = bench.ranks.execute(following)
    bench.scheduler.commit(bench.ranks.execute_within(plan, following), 0.293)
    assert bench.scheduler.free_at_s(0.293) == pytest.approx(0.303)
    bench.scheduler.commit(following_result, 0.303)


@pytest.mark.parametrize(
    ("ttft_s", "now_s", "is_interrupted"), [(0.4, 0.1, True), (0.28, 0.1, False), (0.28, 0.3, True)]
)
def test_step_is_not_interrupted_at_the_cost_of_first_tokens_in_it_that_would_be_in_time(ttft_s, now_s, is_interrupted):
    """The step should take 250 ms, 42 more with the interruption. In the last case it takes longer anyway."""
    bench = Bench(can_interrupt=True)
    bench.add(RT, 240, ttft_s=ttft_s)
    assert shapes(bench.scheduler.plan(bench.now_s)) == [(1, 0, 240)]
    bench.now_s = now_s
    bench.add(RT, 32, ttft_s=0.1)
    assert (bench.scheduler.interrupt(bench.now_s) is not None) is is_interrupted


def test_nothing_is_interrupted_where_ranks_cannot():
    for bench in (Bench(can_interrupt=False), Bench(can_interrupt=True, interrupts=False)):
        begin_step(bench)
        bench.add(RT, 32, ttft_s=0.1)
        assert bench.scheduler.interrupt(bench.now_s) is None


def test_interruption_leaves_alone_what_the_running_step_may_still_write_to():
    bench = Bench(num_blocks=16, can_interrupt=True)
    begin_step(bench)  # 15 of 16 blocks
    batch = next(iter(bench.scheduler._running.values()))
    bench.add(RT, 32, ttft_s=0.1)
    assert bench.scheduler.interrupt(bench.now_s) is None
    bench.scheduler.finish(batch)
    assert bench.kv.num_free_blocks == 16
    assert bench.scheduler.interrupt(bench.now_s) is None
    assert bench.scheduler.plan(bench.now_s) is not None  # it runs after that step


def test_interruption_leaves_alone_what_one_that_came_too_late_may_still_write_to():
    """The ranks may run the late one after the step that it was to interrupt, and the new one in the middle of it."""
    bench = Bench(num_blocks=18, can_interrupt=True)
    running = begin_step(bench)  # 15 of 18 blocks
    gone = bench.add(RT, 32, ttft_s=0.1)
    late = bench.scheduler.interrupt(bench.now_s)
    bench.scheduler.commit(bench.ranks.execute(running), 0.250)
    bench.scheduler.finish(gone)
    following = bench.scheduler.plan(0.250)
    assert shapes(following) == [(1, 240, 1)]  # in the last block but the two of the sequence that is gone
    bench.add(RT, 32, arrival_s=0.250, ttft_s=0.1)
    assert bench.scheduler.interrupt(0.250) is None
    bench.scheduler.commit(bench.ranks.execute_within(late), 0.251)
    assert bench.scheduler.interrupt(0.251) is not None


def test_blocks_are_kept_free_for_interruptions_at_the_cost_of_best_effort_sequences():
    """Of 40 blocks, 2 are the reserve. Chats grow into them, and get best-effort blocks instead where those can be
    needed at once; who lost them does not come back into the reserve."""
    for can_interrupt, least in ((True, 2), (False, 0)):
        bench = Bench(num_blocks=40, can_interrupt=can_interrupt)
        batch = bench.add(BE, 16 * 33, max_new_tokens=40)
        while batch.num_pending_tokens > 1:
            bench.step()
        for _ in range(4):
            bench.add(RT, 16, max_new_tokens=15, ttft_s=1.0, tpot_s=1.0)
        num_free = []
        for _ in range(10):
            bench.step()
            num_free.append(bench.kv.num_free_blocks)
        assert min(num_free) == least, can_interrupt
        bench.run()
        assert batch.output_token_ids == expected_output(batch)[0]


def test_interruption_keeps_to_the_most_sequences_of_a_step():
    bench = Bench(can_interrupt=True, max_num_sequences=2)
    begin_step(bench)
    first, _ = (bench.add(RT, 32, ttft_s=0.1) for _ in range(2))
    assert shapes(bench.scheduler.interrupt(bench.now_s)) == [(first.sequence_id, 0, 32)]
