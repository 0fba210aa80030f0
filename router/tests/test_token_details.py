"""Over HTTP: other candidates, prompts' log-probabilities, and several replies to one prompt, in every dialect."""

import asyncio
import json
from dataclasses import replace

import pytest

from bros_router.config import ApiConfig
from bros_router.request import GenerationError, PromptDetails, Token

PREFIX = "Input validation error: "
STRICT = ApiConfig(strict_tgi=True)
PREFILL = ApiConfig(enable_prefill_logprobs=True)
HI = [{"role": "user", "content": "Hi"}]

TOPS = (Token(10, "He", -0.5, False), Token(1, "</s>", -1.5, True))


def detailed(events, prompt: PromptDetails | None = None):
    """The first event with other candidates, and with what was told of the prompt."""
    first = replace(events[0], token=replace(events[0].token, top_tokens=TOPS), prompt=prompt)
    return [first, *events[1:]]


def with_logprobs(events, *logprobs: float | None):
    """Events whose tokens have these log-probabilities."""
    return [replace(e, token=replace(e.token, logprob=value)) for e, value in zip(events, logprobs, strict=True)]


async def generate(server, path="/generate", **parameters):
    return await server.client.post(path, json={"inputs": "Hi", "parameters": parameters})


async def chat(server, **fields):
    return await server.client.post("/v1/chat/completions", json={"messages": HI} | fields)


async def complete(server, **fields):
    return await server.client.post("/v1/completions", json={"prompt": "Hi"} | fields)


def chunks(text: str) -> list[dict]:
    lines = [line.removeprefix("data: ") for line in text.split("\n\n") if line]
    return [json.loads(line) for line in lines if line != "[DONE]"]


# --- top tokens


async def test_top_tokens_of_a_whole_reply(serve, reply_of):
    server = await serve()
    server.engine.script = detailed(reply_of("He", "y"))
    reply = await (await generate(server, details=True, top_n_tokens=2)).text()
    assert server.engine.requests[-1].sampling.num_top_tokens == 2
    assert reply == (
        '{"generated_text":"Hey","details":{"finish_reason":"length","generated_tokens":2,"seed":null,"prefill":[],'
        '"tokens":[{"id":10,"text":"He","logprob":-0.5,"special":false},'
        '{"id":11,"text":"y","logprob":-0.5,"special":false}],'
        '"top_tokens":[[{"id":10,"text":"He","logprob":-0.5,"special":false},'
        '{"id":1,"text":"</s>","logprob":-1.5,"special":true}],[]]}}'
    )
    for unasked in ({}, {"top_n_tokens": 0}):
        assert "top_tokens" not in await (await generate(server, details=True, **unasked)).text()


@pytest.mark.parametrize("path", ["/generate_stream", "/"])
async def test_top_tokens_of_a_stream_are_left_out_where_there_are_none(serve, reply_of, path):
    server = await serve()
    server.engine.script = detailed(reply_of("He", "y"))
    body = {"inputs": "Hi", "parameters": {"top_n_tokens": 2, "return_full_text": False}, "stream": True}
    text = await (await server.client.post(path, json=body)).text()
    assert text == (
        'data: {"index":1,"token":{"id":10,"text":"He","logprob":-0.5,"special":false},'
        '"top_tokens":[{"id":10,"text":"He","logprob":-0.5,"special":false},'
        '{"id":1,"text":"</s>","logprob":-1.5,"special":true}],"generated_text":null,"details":null}\n\n'
        'data: {"index":2,"token":{"id":11,"text":"y","logprob":-0.5,"special":false},'
        '"generated_text":"Hey","details":null}\n\n'
    )


@pytest.mark.parametrize("config", [ApiConfig(), STRICT])
async def test_top_logprobs_of_chats(serve, reply_of, config):
    server = await serve(config)
    server.engine.script = detailed(reply_of("He", "y"))
    told = (
        '"logprobs":{"content":[{"token":"He","logprob":-0.5,"top_logprobs":[{"token":"He","logprob":-0.5},'
        '{"token":"</s>","logprob":-1.5}]}'
    )
    assert told in await (await chat(server, logprobs=True, top_logprobs=2)).text()
    assert told + "]}" in await (await chat(server, logprobs=True, top_logprobs=2, stream=True)).text()
    assert server.engine.requests[-1].sampling.num_top_tokens == 2


# --- prompts


async def test_every_byte_of_the_details_of_a_prompt(serve, reply_of):
    server = await serve(PREFILL)
    server.engine.script = detailed(reply_of("y"), PromptDetails([None, -2.5, -0.25], [[], [], []]))
    reply = await (await generate(server, decoder_input_details=True)).text()  # implies `details`
    assert server.engine.requests[-1].num_prompt_top_tokens == 0
    token_ids = server.engine.requests[-1].prompt_token_ids
    assert reply == (
        '{"generated_text":"y","details":{"finish_reason":"length","generated_tokens":1,"seed":null,'
        f'"prefill":[{{"id":{token_ids[0]},"text":"<s>","logprob":null}},'
        f'{{"id":{token_ids[1]},"text":"H","logprob":-2.5}},{{"id":{token_ids[2]},"text":"i","logprob":-0.25}}],'
        '"tokens":[{"id":10,"text":"y","logprob":-0.5,"special":false}]}}'
    )


async def test_a_server_that_was_not_started_for_it_tells_nothing_of_prompts(serve):
    server = await serve()
    reply = await (await generate(server, decoder_input_details=True)).json()
    assert reply["details"]["prefill"] == []


@pytest.mark.parametrize("stream", [False, True])
async def test_an_echo_with_logprobs(serve, reply_of, stream):
    server = await serve(PREFILL)
    prompt = PromptDetails([None, -2.5, -0.25], [[], [], [(5, -0.125), (6, -4.0)]])
    server.engine.script = detailed(reply_of("He", "y"), prompt)
    response = await complete(server, echo=True, logprobs=2, stream=stream)
    choices = [choice for chunk in chunks(await response.text()) for choice in chunk["choices"]]
    five, six = server.service.model.tokenizer.texts([5, 6])
    assert "".join(choice["text"] for choice in choices) == "HiHey"
    joined = {name: [x for c in choices for x in c["logprobs"][name]] for name in choices[0]["logprobs"]}
    assert joined == {
        "tokens": ["<s>", "H", "i", "He", "y"],
        "token_logprobs": [None, -2.5, -0.25, -0.5, -0.5],
        "top_logprobs": [
            None,
            {"H": -2.5},
            {five: -0.125, six: -4.0, "i": -0.25},
            {"He": -0.5, "</s>": -1.5},
            {"y": -0.5},
        ],
        "text_offset": [0, 0, 1, 2, 4],
    }
    assert len(choices) == (2 if stream else 1)
    assert server.engine.requests[-1].num_prompt_top_tokens == 2


async def test_of_a_prompt_fewer_others_are_told_than_of_a_reply(serve):
    server = await serve(ApiConfig(enable_prefill_logprobs=True, max_top_n_tokens=128))
    assert (await complete(server, echo=True, logprobs=128)).status == 200
    request = server.engine.requests[-1]
    assert (request.sampling.num_top_tokens, request.num_prompt_top_tokens) == (128, 20)


async def test_an_echo_of_tokens_is_their_text(serve):
    server = await serve()
    token_ids = server.service.model.tokenizer.encode("Hi", add_special_tokens=False).ids
    reply = await (await complete(server, prompt=token_ids, echo=True)).json()
    assert reply["choices"][0] == {"index": 0, "text": "HiHello world", "logprobs": None, "finish_reason": "length"}


async def test_an_echo_with_logprobs_needs_a_server_that_was_started_for_it(serve):
    server = await serve()
    response = await complete(server, echo=True, logprobs=0, stream=True)
    message = "`echo` with `logprobs` needs a server started with --enable-prefill-logprobs"
    assert (response.status, (await response.json())["error"]) == (422, PREFIX + message)


# --- the best of several


async def test_every_byte_of_the_best_of_two(serve, reply_of):
    server = await serve(PREFILL)
    prompt = PromptDetails([None, -1.0, -2.0], [[], [], []])
    server.engine.next_scripts = [
        detailed(with_logprobs(reply_of("a", "b"), -1.0, -2.0), prompt),
        detailed(with_logprobs(reply_of("c", "d", "e"), -1.0, -1.0, -2.0), prompt),  # the sum is less, the mean is more
    ]
    response = await generate(server, best_of=2, do_sample=True, decoder_input_details=True, top_n_tokens=1)
    first, second = server.engine.requests
    assert (first.sampling.seed + 1) % 2**64 == second.sampling.seed
    details = (await response.json())["details"]
    assert [*details] == [
        "finish_reason",
        "generated_tokens",
        "seed",
        "prefill",
        "tokens",
        "best_of_sequences",
        "top_tokens",
    ]
    assert (details["generated_tokens"], details["seed"]) == (3, second.sampling.seed)
    (other,) = details["best_of_sequences"]
    assert [*other] == [
        "generated_text",
        "finish_reason",
        "generated_tokens",
        "seed",
        "prefill",
        "tokens",
        "top_tokens",
    ]
    assert (other["generated_text"], other["generated_tokens"], other["seed"]) == ("ab", 2, first.sampling.seed)
    assert other["prefill"] == details["prefill"]
    assert len(details["prefill"]) == 3
    assert response.headers["x-generated-tokens"] == "3"
    assert response.headers["x-prompt-tokens"] == "3"


@pytest.mark.parametrize(("logprobs", "best"), [((-1.0, -1.0), "a"), ((None, -9.0), "b"), ((None, None), "a")])
async def test_among_equals_the_first_is_the_best_and_the_unknown_is_the_worst(serve, reply_of, logprobs, best):
    server = await serve()
    server.engine.next_scripts = [
        with_logprobs(reply_of(text), value) for text, value in zip("ab", logprobs, strict=True)
    ]
    reply = await (await generate(server, best_of=2, do_sample=True)).json()
    assert reply == {"generated_text": best}


async def test_each_sequence_has_a_permit_and_all_or_none_are_accepted(serve):
    server = await serve(ApiConfig(max_concurrent_requests=2, max_best_of=3))
    response = await generate(server, best_of=3, do_sample=True)
    assert (response.status, (await response.json())["error_type"]) == (429, "overloaded")
    assert server.engine.requests == []
    assert (await generate(server, best_of=2, do_sample=True)).status == 200  # the permits were given back
    lines = await server.metric_lines()
    assert "tgi_request_count 3.0" in lines
    assert "tgi_request_success 2.0" in lines
    assert 'tgi_request_failure{err="overloaded"} 1.0' in lines


async def test_where_one_sequence_fails_the_request_does_and_the_others_end(serve, reply_of):
    server = await serve()
    never = asyncio.Event()
    server.engine.next_scripts = [[*reply_of("a")], [GenerationError("broken")]]
    response = await generate(server, best_of=2, do_sample=True)
    assert (response.status, (await response.json())["error_type"]) == (424, "generation")
    assert server.engine.num_running == 0
    for scripts in ([[GenerationError("broken")], [never]], [[never], [GenerationError("broken")]]):
        server.engine.next_scripts = scripts
        assert (await generate(server, best_of=2, do_sample=True)).status == 424
        assert server.engine.num_running == 0


async def test_a_client_that_leaves_ends_all_of_its_sequences(serve):
    server = await serve()
    server.engine.script = [asyncio.Event()]
    asked = asyncio.create_task(generate(server, best_of=2, do_sample=True))
    while server.engine.num_running < 2:
        server.engine.started.clear()
        await server.engine.started.wait()
    asked.cancel()
    while server.engine.num_running:
        server.engine.ended.clear()
        await server.engine.ended.wait()


async def test_the_best_completions_in_order(serve, reply_of):
    server = await serve(ApiConfig(max_best_of=3))
    server.engine.next_scripts = [
        with_logprobs(reply_of("a"), -2.0),
        with_logprobs(reply_of("b", "c"), -3.0, -3.0),
        with_logprobs(reply_of("d"), -1.0),
    ]
    reply = await (await complete(server, best_of=3, n=2)).json()
    assert [(choice["index"], choice["text"]) for choice in reply["choices"]] == [(0, "d"), (1, "a")]
    assert reply["usage"] == {"prompt_tokens": 3, "completion_tokens": 4, "total_tokens": 7}
    response = await complete(server, best_of=3, n=2, stream=True)
    assert "`best_of` != 1 is not supported when streaming tokens" in await response.text()
    response = await complete(server, best_of=4)
    assert (await response.json())["error"] == f"{PREFIX}`best_of` must be > 0 and <= 3. Given: 4"


# --- several choices


async def test_several_choices_of_a_chat(serve, reply_of):
    server = await serve()
    server.engine.next_scripts = [reply_of("a"), reply_of("b", "c")]
    response = await chat(server, n=2, seed=2**64 - 1)
    reply = await response.json()
    assert [(choice["index"], choice["message"]["content"]) for choice in reply["choices"]] == [(0, "a"), (1, "bc")]
    assert reply["usage"] == {"prompt_tokens": 20, "completion_tokens": 3, "total_tokens": 23}
    assert response.headers["x-prompt-tokens"] == "20"
    assert response.headers["x-generated-tokens"] == "3"
    assert [request.sampling.seed for request in server.engine.requests] == [2**64 - 1, 0]


async def test_several_choices_are_streamed_as_they_come(serve, reply_of):
    server = await serve()
    first_may_go_on = asyncio.Event()
    a, b = reply_of("a", "b"), reply_of("c", "d")
    server.engine.next_scripts = [[a[0], first_may_go_on, a[1]], b]
    response = await chat(server, n=2, stream=True, stream_options={"include_usage": True})
    text = (await response.content.readuntil(b'"finish_reason":"length"}],"usage":null}\n\n')).decode()
    first_may_go_on.set()
    told = chunks(text + await response.text())
    deltas = [(c["index"], c["delta"]["content"], c["delta"].get("role")) for chunk in told for c in chunk["choices"]]
    assert deltas == [(0, "a", "assistant"), (1, "c", "assistant"), (1, "d", None), (0, "b", None)]
    assert told[-1]["usage"] == {"prompt_tokens": 20, "completion_tokens": 4, "total_tokens": 24}


async def test_a_choice_that_fails_ends_the_stream(serve, reply_of):
    server = await serve()
    server.engine.next_scripts = [[asyncio.Event()], [reply_of("a", "b")[0], GenerationError("broken")]]
    text = await (await chat(server, n=2, stream=True)).text()
    assert text.endswith(
        'data: {"error":{"message":"Request failed during generation: broken","http_status_code":422}}\n\n'
        "data: [DONE]\n\n"
    )
    assert server.engine.num_running == 0


@pytest.mark.parametrize("stream", [False, True])
async def test_choices_of_several_prompts_are_numbered_by_prompt(serve, reply_of, stream):
    server = await serve()
    server.engine.next_scripts = [reply_of(text) for text in "abcd"]
    told = chunks(await (await complete(server, prompt=["x", "y"], n=2, stream=stream)).text())
    choices = sorted((c["index"], c["text"]) for chunk in told for c in chunk["choices"])
    assert [index for index, _ in choices] == [0, 1, 2, 3]
    assert sorted(text for _, text in choices) == ["a", "b", "c", "d"]
    by_prompt = [[*map(str, request.prompt_token_ids)] for request in server.engine.requests]
    assert by_prompt[0] == by_prompt[1] != by_prompt[2] == by_prompt[3]


@pytest.mark.parametrize("n", [0, 5, 2**32 - 1])
@pytest.mark.parametrize("ask", [chat, complete])
async def test_how_many_choices_there_may_be(serve, ask, n):
    server = await serve()
    response = await ask(server, n=n)
    message = f"{PREFIX}`n` must be > 0 and <= 4. Given: {n}"
    assert (response.status, (await response.json())["error"]) == (422, message)


@pytest.mark.parametrize("ask", [chat, complete])
async def test_tgi_knows_one_choice(serve, ask):
    server = await serve(STRICT)
    reply = await (await ask(server, n=3, logprobs=None, best_of=2)).json()
    assert len(reply["choices"]) == len(server.engine.requests) == 1


# --- bias and penalty


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"presence_penalty": 2.5}, "`presence_penalty` must be >= -2.0 and <= 2.0"),
        ({"presence_penalty": -1e300}, "`presence_penalty` must be >= -2.0 and <= 2.0"),
        ({"logit_bias": {"300": 1}}, "`logit_bias` must name token ids < 300. Given: 300"),
        ({"logit_bias": {"4294967295": 1}}, "`logit_bias` must name token ids < 300. Given: 4294967295"),
        ({"logit_bias": {"3": 100.5}}, "`logit_bias` must hold values >= -100 and <= 100. Given: 100.5"),
        (
            {"logit_bias": {str(token_id): 1 for token_id in range(1025)}},
            "`logit_bias` supports up to 1024 tokens. Given: 1025",
        ),
    ],
    ids=lambda value: str(value)[:40],
)
@pytest.mark.parametrize("ask", [chat, complete])
async def test_what_is_out_of_range(serve, ask, fields, message):
    server = await serve()
    response = await ask(server, **fields)
    assert (response.status, (await response.json())["error"]) == (422, PREFIX + message)


@pytest.mark.parametrize("ask", [chat, complete])
async def test_bias_and_penalty_reach_the_engine(serve, ask):
    server = await serve()
    await ask(server, presence_penalty=-1.5, logit_bias={"7": -100, "0": 2.5})
    sampling = server.engine.requests[-1].sampling
    assert (sampling.presence_penalty, sampling.logit_bias) == (-1.5, [(7, -100.0), (0, 2.5)])
    assert (sampling.repetition_penalty, sampling.frequency_penalty) == (1.0, 0.0)
