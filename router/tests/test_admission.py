"""Admission: permits, queue bounds, targets, and what becomes of a request whose target cannot be met."""

import dataclasses

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bros_router.admission import AdmissionController, AdmissionPolicy, Permits, default_targets
from bros_router.request import (
    Admission,
    LatencyTargets,
    OverloadedError,
    RefusedError,
    RequestClass,
    Terms,
    ValidRequest,
)
from bros_router.scheduling.latency_model import LatencyModel
from bros_shard.protocol import SamplingParams

RT, BE = RequestClass.RT, RequestClass.BE
QUEUE, REJECT, DEGRADE, RELAX = AdmissionPolicy
SAMPLING = SamplingParams(
    do_sample=False,
    temperature=1.0,
    top_k=0,
    top_p=1.0,
    typical_p=1.0,
    repetition_penalty=1.0,
    frequency_penalty=0.0,
    seed=0,
)
#: A step takes a second and a hundredth a token (`latency_model`), so a prompt of 100 tokens takes 2 s alone.
MAX_BATCH_TOKENS = 400


def request(num_tokens: int = 100, request_class: RequestClass = RT, **targets: float) -> ValidRequest:
    return ValidRequest("id", (5,) * num_tokens, SAMPLING, 10, request_class=request_class, **targets)


@pytest.fixture
def make(latency_model):
    """`make(policy)`: a controller over the known model, and a region with room for everybody unless one is given."""

    def make(
        policy: AdmissionPolicy = QUEUE, *, num_kv_tokens: int = 1_000_000, **max_queued_tokens: int
    ) -> AdmissionController:
        bounds = {RequestClass(name): limit for name, limit in max_queued_tokens.items()}
        return AdmissionController(latency_model, MAX_BATCH_TOKENS, num_kv_tokens, policy, bounds)

    return make


def accept(controller: AdmissionController, sequence_id: int, request: ValidRequest, now_s: float = 0.0) -> Terms:
    terms = controller.judge(request, now_s)
    controller.accepted(sequence_id, request, terms, now_s)
    return terms


# --- permits


def test_permits_run_out_and_come_back():
    permits = Permits(2)
    with permits.take():
        with permits.take(), pytest.raises(OverloadedError), permits.take():
            pass
        with permits.take():
            pass


def test_a_permit_comes_back_whatever_happens():
    permits = Permits(1)
    with pytest.raises(RuntimeError), permits.take():
        raise RuntimeError
    with permits.take():
        pass


# --- targets


def test_targets_that_nobody_set_are_five_times_an_idle_servers(latency_model):
    targets = default_targets(latency_model, 500, MAX_BATCH_TOKENS)  # chunks of 400 and 100
    assert targets.ttft_s == pytest.approx(5 * (5.0 + 2.0))
    assert targets.tpot_s == pytest.approx(5 * 1.32)
    assert not targets.are_given
    short = default_targets(latency_model, 1, MAX_BATCH_TOKENS)
    assert short.ttft_s == short.tpot_s  # not 5 * 1.01: a batch must fit beside it


@pytest.mark.parametrize(
    ("given", "ttft_s", "tpot_s", "are_given"),
    [
        ({"ttft_s": 0.5, "tpot_s": 0.25}, 0.5, 0.25, True),
        ({"ttft_s": 0.5}, 0.5, 6.6, True),
        # Nobody said when the first token is due, so nobody is turned away for it.
        ({"tpot_s": 0.25}, 10.0, 0.25, False),
        ({}, 10.0, 6.6, False),
    ],
)
def test_given_targets_are_kept_and_the_other_is_the_default(make, given, ttft_s, tpot_s, are_given):
    terms = make().judge(request(**given), 0.0)
    assert terms == Terms(RT, LatencyTargets(pytest.approx(ttft_s), pytest.approx(tpot_s), are_given))


def test_best_effort_has_no_targets(make):
    for policy in AdmissionPolicy:
        assert accept(make(policy), 1, request(request_class=BE)) == Terms(BE)


# --- the demand test

#: Two prompts of 2 s each: the second is done after 4 s at best.
TIGHT = request(ttft_s=3.0, tpot_s=1.0)


@pytest.mark.parametrize("policy", AdmissionPolicy)
def test_what_can_be_met_is_accepted_as_asked(make, policy):
    controller = make(policy)
    accept(controller, 1, TIGHT)
    terms = controller.judge(request(ttft_s=4.1, tpot_s=1.0), 0.0)
    assert (terms.admission, terms.targets.ttft_s) == (Admission.AS_ASKED, 4.1)


def test_queue_accepts_what_cannot_be_met(make):
    controller = make(QUEUE)
    for sequence_id in range(100):
        assert accept(controller, sequence_id, TIGHT) == Terms(RT, LatencyTargets(3.0, 1.0, True))


def test_reject_refuses_until_the_work_ahead_is_done(make):
    controller = make(REJECT)
    accept(controller, 1, TIGHT)
    with pytest.raises(RefusedError) as caught:
        controller.judge(TIGHT, 0.0)
    retry_after_s = caught.value.retry_after_s
    assert retry_after_s == pytest.approx(1.0, abs=0.01)
    # Half a prompt is a step of 1.5 s, so what is left then takes longer than was predicted.
    controller.progressed(1, 50, 1.5)
    with pytest.raises(RefusedError):
        controller.judge(TIGHT, 1.5)
    controller.progressed(1, 100, 3.0)
    assert controller.judge(TIGHT, 3.0).admission is Admission.AS_ASKED


def test_degrade_accepts_it_as_late_and_it_holds_up_nobody(make):
    controller = make(DEGRADE)
    accept(controller, 1, TIGHT)
    for sequence_id in (2, 3, 4):
        terms = accept(controller, sequence_id, TIGHT)
        assert terms.is_degraded
        assert terms.targets == LatencyTargets(3.0, 1.0, True)
    assert not controller.judge(request(ttft_s=4.1), 0.0).is_degraded


def test_relax_accepts_it_with_the_earliest_target_that_can_be_met(make):
    controller = make(RELAX)
    targets = []
    for sequence_id in range(4):
        terms = accept(controller, sequence_id, TIGHT)
        targets.append(terms.targets.ttft_s)
        assert terms.targets.tpot_s == 1.0
        assert terms.targets.are_given
        assert terms.admission is (Admission.RELAXED if sequence_id else Admission.AS_ASKED)
    assert targets == pytest.approx([3.0, 4.0, 6.0, 8.0], abs=0.02)


@pytest.mark.parametrize("policy", [REJECT, DEGRADE, RELAX])
@pytest.mark.parametrize("targets", [{}, {"tpot_s": 0.001}])
def test_a_target_that_nobody_set_changes_nothing(make, policy, targets):
    controller = make(policy)
    for sequence_id in range(50):
        assert accept(controller, sequence_id, request(**targets)).admission is Admission.AS_ASKED


def test_work_without_given_targets_counts_where_it_is_due_first(make):
    controller = make(REJECT)
    accept(controller, 1, request())  # due after 10 s, takes 2 s
    assert controller.judge(request(ttft_s=3.0), 0.0)
    with pytest.raises(RefusedError):
        controller.judge(request(num_tokens=900, ttft_s=11.5), 0.0)  # 5 + 5 + 2 s, behind the other


def test_work_that_is_late_without_a_given_target_turns_nobody_away_who_is_due_before(make):
    controller = make(REJECT)
    for sequence_id in range(20):
        accept(controller, sequence_id, request())  # 40 s of work due after 10 s
    accept(controller, 20, TIGHT)
    with pytest.raises(RefusedError):
        controller.judge(request(ttft_s=10.5), 0.0)


def test_the_margin_of_the_model_counts(make, latency_model):
    controller = make(REJECT)
    controller.judge(request(ttft_s=2.5), 0.0)
    latency_model.margin = 1.5
    with pytest.raises(RefusedError):
        controller.judge(request(ttft_s=2.5), 0.0)


@pytest.mark.parametrize("leave", ["ended", "relegated"])
def test_who_ended_or_was_relegated_makes_room(make, leave):
    controller = make(REJECT)
    accept(controller, 1, TIGHT)
    getattr(controller, leave)(1)
    getattr(controller, leave)(1)
    accept(controller, 2, TIGHT)
    with pytest.raises(RefusedError):
        controller.judge(TIGHT, 0.0)


def test_a_prompt_that_must_be_computed_anew_takes_its_time_again(make):
    controller = make(REJECT)
    accept(controller, 1, request(ttft_s=3.0))
    controller.progressed(1, 99, 0.0)
    assert controller.judge(request(ttft_s=3.2), 0.0)
    controller.progressed(1, 0, 0.0)
    with pytest.raises(RefusedError):
        controller.judge(request(ttft_s=3.2), 0.0)


def test_decoding_takes_its_share_and_is_forgotten(make):
    controller = make(REJECT)
    for step in range(100):
        controller.decoded(0.5, 0.5 * step)
    now_s = 0.5 * 99
    with pytest.raises(RefusedError) as caught:
        controller.judge(request(ttft_s=3.0), now_s)
    assert caught.value.retry_after_s == pytest.approx(1.0, abs=0.01)  # 2 s of prefill are 4 s
    assert controller.judge(request(ttft_s=3.0), now_s + 20.0)


def test_decoding_alone_never_makes_every_promise_impossible(make):
    controller = make(REJECT)
    for step in range(100):
        controller.decoded(1.0, 0.5 * step)
    assert controller.judge(request(ttft_s=41.0), 0.5 * 99)


# --- memory


@pytest.fixture
def tight(make):
    """`tight(policy, mean_output)`: the region holds 1,024 tokens; replies were so long of late."""

    def tight(policy: AdmissionPolicy, mean_output: int) -> AdmissionController:
        controller = make(policy, num_kv_tokens=1_024)
        for difference in (-20, 20, 0):
            controller.finished(RT, mean_output + difference)
            controller.finished(BE, 10_000)
        return controller

    return tight


def wish(num_prompt_tokens: int, ttft_s: float, max_new_tokens: int = 2_000) -> ValidRequest:
    """A prompt of 100 tokens takes 2 s."""
    targets = {"ttft_s": ttft_s, "tpot_s": 1.0}
    return dataclasses.replace(request(num_prompt_tokens, **targets), max_new_tokens=max_new_tokens)


def test_a_request_needs_memory_for_its_prompt_and_an_output_of_mean_length(tight):
    controller = tight(REJECT, 124)
    assert controller.judge(wish(100, 2.5), 0.0, num_held_tokens=800)
    with pytest.raises(RefusedError):
        controller.judge(wish(130, 2.5), 0.0, num_held_tokens=800)
    # Nobody's reply is longer than was asked for.
    assert controller.judge(wish(130, 2.4, max_new_tokens=94), 0.0, num_held_tokens=800)
    with pytest.raises(RefusedError):
        controller.judge(wish(130, 2.4, max_new_tokens=95), 0.0, num_held_tokens=800)


def test_memory_that_is_given_back_in_time_is_waited_for(make, tight):
    # 80 tokens are missing of the 800 that are given back in 204 s.
    with pytest.raises(RefusedError) as caught:
        tight(REJECT, 204).judge(wish(100, 22.0), 0.0, num_held_tokens=800)
    assert caught.value.retry_after_s == pytest.approx(20.4 + 2.0 - 22.0)
    assert tight(REJECT, 204).judge(wish(100, 23.0), 0.0, num_held_tokens=800)
    relaxed = tight(RELAX, 204).judge(wish(100, 22.0), 0.0, num_held_tokens=800)
    assert relaxed.targets == LatencyTargets(pytest.approx(22.4), 1.0, True)


def test_while_nothing_is_known_of_replies_only_work_counts(make):
    assert make(REJECT, num_kv_tokens=1_024).judge(wish(100, 2.5), 0.0, num_held_tokens=1_024)


def test_prompts_that_wait_will_take_memory_unless_they_are_late(tight):
    controller = tight(REJECT, 1_000)
    accept(controller, 3, wish(100, 60.0, max_new_tokens=10))
    accept(controller, 4, wish(100, 60.0, max_new_tokens=10))
    # A token is missing, which takes 1.25 s; the prompt takes 1.15 s.
    urgent = wish(15, 2.0, max_new_tokens=10)
    with pytest.raises(RefusedError):
        controller.judge(urgent, 0.0, num_held_tokens=800)
    controller.relegated(4)
    assert controller.judge(urgent, 0.0, num_held_tokens=800)
    controller.progressed(3, 99, 0.0)
    controller.ended(4)
    assert controller.judge(urgent, 0.0, num_held_tokens=998)
    with pytest.raises(RefusedError):
        controller.judge(urgent, 0.0, num_held_tokens=999)


# --- the bounds of the queues


def test_a_queue_is_bounded_by_its_tokens(make):
    controller = make(rt=250, be=100)
    accept(controller, 1, request())
    accept(controller, 2, request())
    with pytest.raises(OverloadedError):
        controller.judge(request(), 0.0)
    # The other class has a bound of its own; and what is computed waits no more.
    accept(controller, 3, request(request_class=BE))
    with pytest.raises(OverloadedError):
        controller.judge(request(num_tokens=1, request_class=BE), 0.0)
    controller.progressed(1, 50, 0.0)
    accept(controller, 4, request())
    controller.progressed(2, 100, 0.0)
    controller.progressed(2, 101, 0.0)
    accept(controller, 5, request())


def test_the_longest_prompt_enters_an_empty_queue(make):
    controller = make(rt=10)
    accept(controller, 1, request(num_tokens=1000))
    with pytest.raises(OverloadedError):
        controller.judge(request(num_tokens=1), 0.0)
    controller.ended(1)
    controller.judge(request(num_tokens=1), 0.0)


def test_queues_have_no_bound_unless_they_are_given_one(make):
    controller = make(rt=0)
    for sequence_id in range(1000):
        accept(controller, sequence_id, request(request_class=(RT, BE)[sequence_id % 2]))


def test_drain_is_the_time_of_the_prompts_that_wait(make):
    controller = make()
    assert controller.drain_s(RT, 0.0) == 0.0
    accept(controller, 1, request(num_tokens=800))
    accept(controller, 2, request(num_tokens=400, request_class=BE))
    assert controller.drain_s(RT, 0.0) == pytest.approx(10.0)  # two full steps of 5 s
    assert controller.drain_s(BE, 0.0) == pytest.approx(15.0)
    controller.progressed(1, 400, 0.0)
    assert controller.drain_s(RT, 0.0) == pytest.approx(5.0)


sequences = st.lists(
    st.tuples(st.sampled_from(["accept", "progress", "end", "relegate"]), st.integers(0, 9), st.integers(0, 120)),
    max_size=60,
)


@given(st.sampled_from(AdmissionPolicy), sequences)
def test_once_all_have_ended_nothing_is_left(policy, steps):
    controller = AdmissionController(LatencyModel(), 32, 11, policy)
    for number, (step, other, num_tokens) in enumerate(steps):
        match step:
            case "accept":
                wish = request(num_tokens + 1, (RT, BE)[other % 2], ttft_s=0.1 * (1 + other))
                try:
                    accept(controller, number, wish, number / 64)
                except RefusedError:
                    assert policy is REJECT
            case "progress":
                controller.progressed(number - other, num_tokens, number / 64)
            case "end":
                controller.ended(number - other)
            case "relegate":
                controller.relegated(number - other)
    for number in range(len(steps)):
        controller.ended(number)
    assert controller.drain_s(BE, 1.0) == 0.0
    controller.finished(RT, 1)
    alone_s = LatencyModel().prefill_s(10, 0, 32)
    assert controller.judge(request(10, ttft_s=1.01 * alone_s), 1.0).admission is Admission.AS_ASKED
