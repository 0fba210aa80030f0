"""The step loop with a group that lives in this process: a fake at the seam, everything above it real."""

import asyncio
import time

import pytest

from bros_router.admission import AdmissionController
from bros_router.engine import EngineModel, StepEngine
from bros_router.kv.block_hasher import BlockHasher
from bros_router.kv.kv_manager import KVManager
from bros_router.metrics import Metrics
from bros_router.model_source import demo_model_path
from bros_router.request import FinishReason, GenerationError, RequestClass, ServiceUnavailableError, ValidRequest
from bros_router.scheduling.policies.ordered import FirstComeFirstServed
from bros_router.scheduling.scheduler import Scheduler
from bros_router.scheduling.speculation import Speculation
from bros_router.scheduling.step_draft import SchedulerLimits
from bros_router.shard_client import ShardError
from bros_router.tokenizer import Tokenizer
from bros_shard.protocol import PromptLogprobs, SampledToken, SamplingParams, SequenceResult, StepPlan, StepResult
from simulated_ranks import ExactModel

EOS, VOCAB_SIZE = 7, 1000


class InMemoryGroup:
    """Ranks that answer each sequence with the tokens of its script: the prompt's own, over and over."""

    def __init__(self) -> None:
        self.is_alive = True
        self.plans: list[StepPlan] = []
        self.scripts: dict[int, list[int]] = {}
        self.positions: dict[int, int] = {}
        #: Sequences that ask how likely their prompts are.
        self.told: set[int] = set()
        self.may_answer = asyncio.Event()
        self.may_answer.set()
        self.failure: str | None = None
        self.newest: asyncio.Future[StepResult] | None = None

    async def send(self, plan: StepPlan) -> asyncio.Future[StepResult]:
        self.plans.append(plan)
        for new in plan.new_sequences:
            self.scripts.setdefault(new.sequence_id, new.token_ids[:3])
            self.positions[new.sequence_id] = len(new.token_ids) - 3
            if new.num_prompt_top_tokens is not None:
                self.told.add(new.sequence_id)
        self.newest = asyncio.ensure_future(self._answer(plan, self.newest))
        return self.newest

    async def _answer(self, plan: StepPlan, previous: asyncio.Future[StepResult] | None) -> StepResult:
        if previous is not None:
            await asyncio.wait([previous])  # ranks run plans in order
        await asyncio.sleep(0)  # as a socket does, let the clients have their turn
        await self.may_answer.wait()
        if self.failure is not None:
            raise ShardError(self.failure)
        results, prompts = [], []
        for step in plan.sequences:
            if step.sequence_id in self.told:
                # The token at each position is as likely as its number says.
                positions = range(step.num_computed_tokens + 1, step.num_computed_tokens + 1 + step.num_tokens)
                tops = [[(position, 0.0)] for position in positions]
                prompts.append(PromptLogprobs(step.sequence_id, positions[0], [-float(p) for p in positions], tops))
            script, position = self.scripts[step.sequence_id], self.positions[step.sequence_id]
            tops = [(script[position % 3], -1.0), (EOS, -2.0)] if step.sequence_id in self.told else []
            # All guesses are right.
            end = position + 1 + step.max_speculative_tokens
            self.positions[step.sequence_id] = end
            tokens = [SampledToken(script[number % 3], -1.0, tops) for number in range(position, end)]
            results.append(SequenceResult(step.sequence_id, tokens, None, step.max_speculative_tokens))
        return StepResult(plan.generation, plan.step_id, results, 0.0, 0.0, 0.0, 0.0, prompts)


@pytest.fixture
async def group():
    return InMemoryGroup()


@pytest.fixture
async def engine(group):
    kv = KVManager(num_blocks=64, block_size=16)
    scheduler = Scheduler(FirstComeFirstServed(), kv, ExactModel(), SchedulerLimits(64, 8))
    model = EngineModel(Tokenizer(demo_model_path() / "tokenizer.json"), frozenset({EOS}), VOCAB_SIZE)
    engine = StepEngine(
        scheduler, kv, ExactModel(), AdmissionController(ExactModel(), 64, 64 * 16), group, model, Metrics()
    )
    engine.kv_under_test = kv
    running = asyncio.create_task(engine.run())
    yield engine
    running.cancel()
    await asyncio.gather(running, return_exceptions=True)


def request(*script: int, max_new_tokens: int = 5, **fields) -> ValidRequest:
    return ValidRequest("r", script, SamplingParams(), max_new_tokens, **fields)


async def read(reply) -> tuple[list[int], FinishReason]:
    events = [event async for event in reply]
    assert [event.finish is None for event in events] == [True] * (len(events) - 1) + [False]
    return [event.token.token_id for event in events], events[-1].finish.reason


async def test_reply_ends_by_length(engine):
    with engine.submit(request(11, 12, 13, max_new_tokens=4)) as reply:
        assert await read(reply) == ([11, 12, 13, 11], FinishReason.LENGTH)
    assert engine.num_replies == 0
    await engine.drained()


async def test_end_of_sequence_is_the_last_token_unless_it_is_ignored(engine):
    with engine.submit(request(11, EOS, 13)) as reply:
        assert await read(reply) == ([11, EOS], FinishReason.EOS_TOKEN)
    with engine.submit(request(11, EOS, 13, ignore_eos=True)) as reply:
        assert await read(reply) == ([11, EOS, 13, 11, EOS], FinishReason.LENGTH)


async def test_length_goes_before_end_of_sequence_and_end_of_sequence_before_stop(engine):
    stop = Tokenizer(demo_model_path() / "tokenizer.json").detokenizer([]).step(EOS)
    with engine.submit(request(11, EOS, 13, max_new_tokens=2, stop_sequences=(stop,))) as reply:
        assert await read(reply) == ([11, EOS], FinishReason.LENGTH)
    with engine.submit(request(11, EOS, 13, stop_sequences=(stop,))) as reply:
        assert await read(reply) == ([11, EOS], FinishReason.EOS_TOKEN)


async def test_stop_sequence_ends_the_reply_and_stays_in_it(engine):
    tokenizer = Tokenizer(demo_model_path() / "tokenizer.json")
    ids = tokenizer.encode("alpha beta gamma").ids
    text = [tokenizer.detokenizer([]).step(token_id) for token_id in ids[:3]]
    with engine.submit(request(*ids[:3], max_new_tokens=9, stop_sequences=(text[1],))) as reply:
        events = [event async for event in reply]
    assert [event.token.token_id for event in events] == ids[:2]
    assert events[-1].finish.reason is FinishReason.STOP_SEQUENCE
    assert events[-1].finish.generated_text == "".join(event.token.text for event in events)


async def test_stop_sequence_that_is_cut_is_held_back_across_tokens_and_never_shown(engine):
    tokenizer = Tokenizer(demo_model_path() / "tokenizer.json")
    ids = tokenizer.encode("the value of").ids
    text = [tokenizer.detokenizer([]).step(token_id) for token_id in ids]
    stop = text[1][-2:] + text[2][:1]  # the end of one token and the beginning of the next
    with engine.submit(request(*ids, max_new_tokens=9, stop_sequences=(stop,), cuts_stop_sequences=True)) as reply:
        events = [event async for event in reply]
    assert [event.token.text for event in events] == text
    assert [event.shown for event in events] == [text[0], text[1][:-2], ""]
    assert events[-1].finish.reason is FinishReason.STOP_SEQUENCE
    assert events[-1].finish.generated_text == text[0] + text[1][:-2]


async def test_what_a_step_brings_beyond_the_last_token_is_dropped(group):
    """Some tokens of a step are guesses that were right; the reply may end with any of them."""
    kv = KVManager(num_blocks=64, block_size=16)
    scheduler = Scheduler(FirstComeFirstServed(), kv, ExactModel(), SchedulerLimits(64, 8), speculation=Speculation(8))
    tokenizer = Tokenizer(demo_model_path() / "tokenizer.json")
    model = EngineModel(tokenizer, frozenset({EOS}), VOCAB_SIZE)
    engine = StepEngine(
        scheduler, kv, ExactModel(), AdmissionController(ExactModel(), 64, 64 * 16), group, model, Metrics()
    )
    running = asyncio.create_task(engine.run())
    ids = tokenizer.encode("the value of").ids
    text = [tokenizer.detokenizer([]).step(token_id) for token_id in ids]
    stopped = engine.submit(request(*ids, max_new_tokens=40, stop_sequences=(text[2],)))
    ended = engine.submit(request(11, EOS, 13, max_new_tokens=40))
    long = engine.submit(request(11, 12, 13, max_new_tokens=40))
    events = [event async for event in stopped]
    assert [event.token.token_id for event in events] == ids
    assert (events[-1].finish.reason, events[-1].finish.num_generated_tokens) == (FinishReason.STOP_SEQUENCE, 3)
    assert stopped.sequence.output_token_ids == ids
    assert await read(ended) == ([11, EOS], FinishReason.EOS_TOKEN)
    assert await read(long) == ([11, 12, 13] * 13 + [11], FinishReason.LENGTH)
    await engine.drained()
    assert len(group.plans) < 20
    running.cancel()
    await asyncio.gather(running, return_exceptions=True)


async def test_text_that_was_held_back_is_shown_at_the_end(engine):
    tokenizer = Tokenizer(demo_model_path() / "tokenizer.json")
    ids = tokenizer.encode("the value of").ids
    text = "".join(tokenizer.detokenizer([]).step(token_id) for token_id in ids)
    with engine.submit(
        request(*ids, max_new_tokens=3, stop_sequences=(text + "!",), cuts_stop_sequences=True)
    ) as reply:
        events = [event async for event in reply]
    assert [event.shown for event in events] == ["", "", text]
    assert events[-1].finish.reason is FinishReason.LENGTH
    assert events[-1].finish.generated_text == text


async def test_leaving_the_block_ends_the_sequence_and_tells_the_ranks(engine, group):
    with engine.submit(request(11, 12, 13, max_new_tokens=500, request_class=RequestClass.BE)) as reply:
        await anext(reply)
        assert engine.kv_under_test.num_used_blocks(RequestClass.BE) == 1
    assert engine.kv_under_test.num_free_blocks == 64
    await engine.drained()
    deadline_s = time.monotonic() + 10
    while not group.plans[-1].releases:
        assert time.monotonic() < deadline_s
        await asyncio.sleep(0)
    assert group.plans[-1].releases == [reply.sequence.sequence_id]


async def test_queued_request_that_is_abandoned_never_reaches_the_ranks(engine, group):
    group.may_answer.clear()
    replies = [engine.submit(request(11, 12, 13, max_new_tokens=2)) for _ in range(9)]  # eight may run
    await asyncio.sleep(0)
    with replies[8]:
        pass
    group.may_answer.set()
    for reply in replies[:8]:
        await read(reply)
    assert 8 not in group.scripts


async def test_token_outside_the_vocabulary_ends_that_reply_alone(engine):
    poisoned = engine.submit(request(VOCAB_SIZE, 12, 13))
    healthy = engine.submit(request(11, 12, 13))
    with pytest.raises(GenerationError, match="no valid token"):
        await read(poisoned)
    assert (await read(healthy))[1] is FinishReason.LENGTH


async def test_failed_group_leaves_the_replies_waiting_and_they_go_on_after_a_restart(group):
    kv = KVManager(num_blocks=64, block_size=16)
    scheduler = Scheduler(FirstComeFirstServed(), kv, ExactModel(), SchedulerLimits(64, 8))
    model = EngineModel(Tokenizer(demo_model_path() / "tokenizer.json"), frozenset(), VOCAB_SIZE)
    engine = StepEngine(
        scheduler, kv, ExactModel(), AdmissionController(ExactModel(), 64, 64 * 16), group, model, Metrics()
    )
    reply = engine.submit(request(11, 12, 13, max_new_tokens=6))
    running = asyncio.create_task(engine.run())
    before = [(await anext(reply)).token.token_id for _ in range(2)]
    group.failure = "rank 0 was killed"
    with pytest.raises(ShardError):
        await running
    group.failure = None
    engine.restart(generation=1)
    running = asyncio.create_task(engine.run())
    after = [event.token.token_id async for event in reply]
    assert before + after == [11, 12, 13, 11, 12, 13]
    assert group.plans[-1].generation == 1
    (known,) = [new for plan in group.plans if plan.generation == 1 for new in plan.new_sequences]
    assert (known.token_ids, known.num_generated_tokens) == ([11, 12, 13, 11, 12], 2)
    running.cancel()


async def test_fail_all_gives_every_reply_its_error_after_the_tokens_before_it(engine, group):
    reply = engine.submit(request(11, 12, 13, max_new_tokens=500))
    first = await anext(reply)
    group.may_answer.clear()
    engine.fail_all("the server is shutting down")
    assert first.token.token_id == 11
    with pytest.raises(GenerationError, match="shutting down"):
        await read(reply)
    await engine.drained()


async def test_nothing_is_accepted_after_stop_accepting(engine):
    reply = engine.submit(request(11, 12, 13))
    engine.stop_accepting()
    with pytest.raises(ServiceUnavailableError):
        engine.submit(request(11, 12, 13))
    assert not engine.is_healthy
    assert (await read(reply))[1] is FinishReason.LENGTH


async def test_what_is_told_of_a_prompt_comes_with_the_first_token(engine, group):
    prompt = tuple(range(11, 161))  # three steps of 64 tokens
    with engine.submit(request(*prompt, max_new_tokens=2, num_prompt_top_tokens=1)) as reply:
        first, second = [event async for event in reply]
    assert first.prompt.logprobs == [None, *(-float(position) for position in range(1, 150))]
    assert first.prompt.top_tokens == [[], *([(position, 0.0)] for position in range(1, 150))]
    assert second.prompt is None
    assert [new.num_prompt_top_tokens for plan in group.plans for new in plan.new_sequences] == [1]


async def test_likely_tokens_come_with_their_texts(engine):
    tokenizer = Tokenizer(demo_model_path() / "tokenizer.json")
    with engine.submit(request(11, 12, 13, max_new_tokens=1, num_prompt_top_tokens=0)) as reply:
        (event,) = [event async for event in reply]
    assert [(top.token_id, top.text, top.logprob) for top in event.token.top_tokens] == [
        (event.token.token_id, *tokenizer.texts([event.token.token_id]), -1.0),
        (EOS, *tokenizer.texts([EOS]), -2.0),
    ]
    assert [top.is_special for top in event.token.top_tokens] == [False, tokenizer.is_special(EOS)]


@pytest.fixture
async def caching_engine(group):
    kv = KVManager(num_blocks=64, block_size=16)
    scheduler = Scheduler(
        FirstComeFirstServed(), kv, ExactModel(), SchedulerLimits(64, 8), hasher=BlockHasher(16, b"salt")
    )
    model = EngineModel(Tokenizer(demo_model_path() / "tokenizer.json"), frozenset({EOS}), VOCAB_SIZE)
    engine = StepEngine(
        scheduler, kv, ExactModel(), AdmissionController(ExactModel(), 64, 64 * 16), group, model, Metrics()
    )
    engine.kv_under_test = kv
    running = asyncio.create_task(engine.run())
    yield engine
    running.cancel()
    await asyncio.gather(running, return_exceptions=True)


def num_cached_tokens(plans) -> list[int]:
    """Of each sequence, what its first step found computed."""
    first_steps = {}
    for plan in plans:
        for step in plan.sequences:
            first_steps.setdefault(step.sequence_id, step.num_computed_tokens)
    return [*first_steps.values()]


async def test_a_prompt_that_is_told_of_is_neither_read_from_the_cache_nor_put_there(caching_engine, group):
    prompt = tuple(range(11, 61))
    num_idle = []
    for wish in (0, None, 0, None):
        with caching_engine.submit(request(*prompt, max_new_tokens=2, num_prompt_top_tokens=wish)) as reply:
            await read(reply)
        num_idle.append(caching_engine.kv_under_test.num_idle_blocks)
    assert num_cached_tokens(group.plans) == [0, 0, 0, 48]
    assert num_idle[0] == 0 < num_idle[1]


async def test_what_was_computed_is_read_again_by_those_with_the_same_adapter(caching_engine, group):
    """The output too, which the next prompt of a conversation holds."""
    prompt = tuple(range(11, 25))
    adapters = (None, 0, 1)
    for adapter in adapters:
        with caching_engine.submit(request(*prompt, max_new_tokens=20, ignore_eos=True, adapter=adapter)) as reply:
            token_ids, _ = await read(reply)
        said = (*prompt, *token_ids)
    for adapter in adapters:
        with caching_engine.submit(request(*said, max_new_tokens=1, adapter=adapter)) as reply:
            await read(reply)
    assert num_cached_tokens(group.plans) == [0, 0, 0, 32, 32, 32]
    assert [new.adapter for plan in group.plans for new in plan.new_sequences] == [None, 0, 1] * 2
