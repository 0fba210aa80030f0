"""The bodies under /v1, as OpenAI's clients write them and as TGI takes them: shapes, and what becomes of fields."""

import json

import msgspec
import pytest

from bros_router.api.body import decode_json
from bros_router.api.errors import Rejection, ValidationError
from bros_router.api.types import GenerateParameters
from bros_router.api.v1_bodies import ChatBody, CompletionBody, TgiChatBody, TgiCompletionBody
from bros_router.api.validation import OpenAIParameters
from bros_router.request import RequestClass

DATA = "Failed to deserialize the JSON body into the target type: "
CHAT, COMPLETION = {"messages": [{"role": "user", "content": "Hi"}]}, {"prompt": "Hi"}
ALL = [(ChatBody, CHAT), (TgiChatBody, CHAT), (CompletionBody, COMPLETION), (TgiCompletionBody, COMPLETION)]
OPENAI, TGI, CHATS = [ALL[0], ALL[2]], [ALL[1], ALL[3]], ALL[:2]


def read(kind, required, **fields):
    return decode_json(msgspec.json.Decoder(kind), json.dumps(required | fields).encode())


def refusal(kind, required, **fields) -> str:
    with pytest.raises(Rejection) as caught:
        read(kind, required, **fields)
    assert caught.value.status == 422
    return str(caught.value).removeprefix(DATA)


def unsupported(kind, required, **fields) -> str:
    with pytest.raises(ValidationError) as caught:
        read(kind, required, **fields).check_supported()
    return str(caught.value).removeprefix("Input validation error: ")


@pytest.mark.parametrize(("kind", "required"), ALL)
def test_sampling_is_on_unless_the_temperature_is_zero(kind, required):
    assert read(kind, required).parameters() == GenerateParameters(do_sample=True)
    assert read(kind, required, temperature=0).parameters() == GenerateParameters(do_sample=False)
    assert read(kind, required, temperature=0.5).parameters() == GenerateParameters(do_sample=True, temperature=0.5)
    assert read(kind, required, temperature=-0.0).parameters() == GenerateParameters(do_sample=False)


@pytest.mark.parametrize(("kind", "required"), ALL)
def test_what_every_body_passes_on(kind, required):
    fields = {"max_tokens": 7, "seed": 2**64 - 1, "frequency_penalty": -0.5, "top_p": 0.5, "stop": ["a", "b"]}
    assert read(kind, required, **fields).parameters() == GenerateParameters(
        do_sample=True, max_new_tokens=7, seed=2**64 - 1, frequency_penalty=-0.5, top_p=0.5, stop=["a", "b"]
    )


@pytest.mark.parametrize(("kind", "required"), ALL)
@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"max_tokens": -1}, "max_tokens: Expected `int` >= 0"),
        ({"max_tokens": 2**32}, "max_tokens: Expected `int` <= 4294967295"),
        ({"max_tokens": 5.0}, "max_tokens: Expected `int | null`, got `float`"),
        ({"seed": -1}, "seed: Expected `int` >= 0"),
        ({"seed": 2**64}, f"Expected `seed` <= {2**64 - 1}"),
        ({"temperature": "1"}, "temperature: Expected `float | null`, got `str`"),
        ({"top_p": True}, "top_p: Expected `float | null`, got `bool`"),
        ({"stream": None}, "stream: Expected `bool`, got `null`"),
        ({"stop": ["a", 1]}, "stop[1]: Expected `str`, got `int`"),
        ({"model": 5}, "model: Expected `str | null`, got `int`"),
    ],
)
def test_another_shape_is_refused_with_its_path(kind, required, fields, reason):
    assert refusal(kind, required, **fields) == reason


@pytest.mark.parametrize(("kind", "required"), CHATS)
@pytest.mark.parametrize(
    ("messages", "reason"),
    [
        (None, "messages: Expected `array`, got `null`"),
        ("Hi", "messages: Expected `array`, got `str`"),
        ([[]], "messages[0]: Expected `object`, got `array`"),
        ([{"role": "user", "content": "x"}, {"role": "user"}], "messages[1]: Expected `content` or `tool_calls`"),
    ],
)
def test_messages_are_messages(kind, required, messages, reason):
    assert refusal(kind, required, messages=messages) == reason


# --- OpenAI's


@pytest.mark.parametrize(("kind", "required"), OPENAI)
def test_what_openais_clients_send_is_taken(kind, required):
    fields = {
        "stop": "END",
        "top_p": 1.0,
        "stream_options": None,
        "logit_bias": {},
        "presence_penalty": 0,
        "user": "ann",
        "n": 1,
        "parallel_tool_calls": True,
        "store": False,
        "metadata": {"a": "b"},
    }
    body = read(kind, required, **fields)
    body.check_supported()
    assert body.parameters() == GenerateParameters(do_sample=True, stop=["END"])
    assert body.openai == OpenAIParameters()
    assert body.includes_usage is False
    assert read(kind, required, stream_options={"include_usage": True}).includes_usage is True


@pytest.mark.parametrize(
    ("tier", "request_class"),
    [
        (None, None),
        ("auto", None),
        ("default", RequestClass.RT),
        ("priority", RequestClass.RT),
        ("flex", RequestClass.BE),
        ("batch", RequestClass.BE),
    ],
)
@pytest.mark.parametrize(("kind", "required"), OPENAI)
def test_the_service_tier_names_the_class(kind, required, tier, request_class):
    assert read(kind, required, service_tier=tier).request_class is request_class


@pytest.mark.parametrize(("kind", "required"), OPENAI)
def test_an_unknown_service_tier_is_refused(kind, required):
    assert refusal(kind, required, service_tier="vip") == "service_tier: Invalid enum value 'vip'"


@pytest.mark.parametrize(
    ("temperature", "top_p", "passed_on"),
    [(0, 0.5, None), (0, 1.0, None), (1, 1.0, None), (1, 0.5, 0.5), (0, 1.5, 1.5), (0, 0, 0.0), (None, 2, 2.0)],
)
@pytest.mark.parametrize(("kind", "required"), OPENAI)
def test_a_top_p_that_limits_nothing_is_none_and_one_out_of_range_is_still_judged(
    kind, required, temperature, top_p, passed_on
):
    assert read(kind, required, temperature=temperature, top_p=top_p).parameters().top_p == passed_on


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"stop": ""}, "`stop` must not hold an empty sequence"),
        ({"stop": ["a", ""]}, "`stop` must not hold an empty sequence"),
        ({"logit_bias": [0.5]}, "`logit_bias` as a list is not supported by this server"),
    ],
)
@pytest.mark.parametrize(("kind", "required"), OPENAI)
def test_what_cannot_be_done_is_refused(kind, required, fields, reason):
    assert unsupported(kind, required, **fields) == reason


@pytest.mark.parametrize(("kind", "required"), OPENAI)
def test_what_tgi_does_not_know_is_taken(kind, required):
    body = read(kind, required, n=3, presence_penalty=0.5, logit_bias={"7": -100, "0": 1.5})
    assert body.openai == OpenAIParameters(3, 0.5, {7: -100.0, 0: 1.5})


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"n": -1}, "n: Expected `int` >= 0"),
        ({"logit_bias": {"x": 1}}, "Expected `int`, got `str` - at `key` in `$.logit_bias`"),
        ({"logit_bias": {"-1": 1}}, "Expected `int` >= 0 - at `key` in `$.logit_bias`"),
        ({"logit_bias": {"1": "x"}}, "logit_bias[...]: Expected `float`, got `str`"),
    ],
)
@pytest.mark.parametrize(("kind", "required"), OPENAI)
def test_of_the_wrong_shape_it_is_refused(kind, required, fields, reason):
    assert refusal(kind, required, **fields) == reason


TOOLS = [{"type": "function", "function": {"name": "f", "parameters": {}}}]


@pytest.mark.parametrize(("kind", "required"), CHATS)
@pytest.mark.parametrize(
    "fields",
    [
        {"tools": None},
        {"tools": []},
        {"tools": [], "tool_choice": "auto"},
        {"tools": TOOLS, "tool_choice": "none"},
        {"tool_choice": "required"},
        {"response_format": None},
        {"top_logprobs": 0},
    ],
)
def test_a_chat_without_tools_is_plain(kind, required, fields):
    body = read(kind, required, **fields)
    body.check_supported()
    assert (body.tools_in_play(), body.grammar) == (None, None)


def test_plain_text_is_a_format():
    assert read(ChatBody, CHAT, response_format={"type": "text"}).grammar is None


def test_the_new_name_of_max_tokens_wins():
    assert read(ChatBody, CHAT, max_tokens=1, max_completion_tokens=2).parameters().max_new_tokens == 2
    assert read(ChatBody, CHAT, max_completion_tokens=2).parameters().max_new_tokens == 2
    assert read(ChatBody, CHAT, max_tokens=1, max_completion_tokens=None).parameters().max_new_tokens == 1


def test_top_logprobs_are_top_n_tokens():
    assert read(ChatBody, CHAT, top_logprobs=3).parameters().top_n_tokens == 3


@pytest.mark.parametrize(
    ("messages", "wish", "continues"),
    [
        (["user"], None, False),
        (["user", "assistant"], None, True),
        (["assistant", "user"], None, False),
        (["user", "assistant"], False, False),
        (["user"], True, True),
        ([], None, False),
        ([], True, False),
    ],
)
def test_which_chats_go_on_with_their_last_message(messages, wish, continues):
    given = [{"role": role, "content": "x"} for role in messages]
    assert read(ChatBody, {"messages": given}, continue_final_message=wish).continues_last_message is continues
    if wish is None:
        assert read(TgiChatBody, {"messages": given}).continues_last_message is continues


@pytest.mark.parametrize(
    ("prompt", "prompts"),
    [
        ("a", ["a"]),
        (["a", "b"], ["a", "b"]),
        ([""], [""]),
        ([1, 2, 3], [[1, 2, 3]]),
        ([[1, 2], [3]], [[1, 2], [3]]),
        ([[]], [[]]),
    ],
)
def test_prompts_are_texts_or_tokens(prompt, prompts):
    assert read(CompletionBody, {"prompt": prompt}).prompts == prompts


@pytest.mark.parametrize(
    ("prompt", "reason"),
    [
        ([], "prompt: Expected `array` of length >= 1"),
        (None, "prompt: Expected `str | array`, got `null`"),
        (["a", 1], "Expected `prompt` to hold texts, or tokens, or lists of tokens"),
        ([1, [2]], "Expected `prompt` to hold texts, or tokens, or lists of tokens"),
        ([-1], "prompt[0]: Expected `int` >= 0"),
        ([2**32], "prompt[0]: Expected `int` <= 4294967295"),
        ([["a"]], "prompt[0][0]: Expected `int`, got `str`"),
    ],
)
def test_other_prompts_are_refused(prompt, reason):
    assert refusal(CompletionBody, {"prompt": prompt}) == reason


@pytest.mark.parametrize(
    ("fields", "best_of", "num_top", "num_prompt_top"),
    [
        ({}, None, None, None),
        ({"echo": True}, None, None, None),
        ({"logprobs": 3}, None, 3, None),
        ({"logprobs": 3, "echo": True}, None, 3, 3),
        ({"logprobs": 0, "echo": True}, None, 0, 0),
        ({"best_of": 1}, None, None, None),
        ({"best_of": 2}, 2, None, None),
        ({"best_of": 2, "n": 2}, None, None, None),
        ({"best_of": 3, "n": 2}, 3, None, None),
    ],
)
def test_completions_in_the_words_of_tgi(fields, best_of, num_top, num_prompt_top):
    body = read(CompletionBody, COMPLETION, **fields)
    body.check_supported()
    parameters = body.parameters()
    assert (parameters.best_of, parameters.top_n_tokens) == (best_of, num_top)
    assert body.openai.num_prompt_top_tokens == num_prompt_top


@pytest.mark.parametrize("fields", [{"best_of": 0}, {"best_of": 2, "n": 3}])
def test_the_best_are_not_more_than_there_are(fields):
    assert unsupported(CompletionBody, COMPLETION, **fields) == "`best_of` must be >= `n`"


# --- TGI's


@pytest.mark.parametrize(("kind", "required"), TGI)
def test_tgi_refuses_a_bare_stop(kind, required):
    assert refusal(kind, required, stop="END") == "stop: Expected `array | null`, got `str`"
    assert read(kind, required, stop=[""]).parameters().stop == [""]
    assert read(kind, required, stop=None).parameters().stop == []


@pytest.mark.parametrize(("kind", "required"), TGI)
def test_tgi_passes_top_p_on_and_knows_no_tier(kind, required):
    body = read(kind, required, top_p=1.0, temperature=0, service_tier=5)
    assert (body.parameters().top_p, body.request_class) == (1.0, None)


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"stream_options": None}, "stream_options: Expected `object`, got `null`"),
        ({"logit_bias": {}}, "logit_bias: Expected `array | null`, got `object`"),
        ({"max_tokens": 1, "max_completion_tokens": 1}, "Duplicate field `max_tokens`"),
        ({"response_format": {"type": "text"}}, "response_format.type: Invalid value 'text'"),
    ],
)
def test_tgi_refuses_what_is_not_its_shape(fields, reason):
    assert refusal(TgiChatBody, CHAT, **fields) == reason


def test_tgi_makes_a_repetition_penalty_of_the_presence_penalty():
    assert read(TgiChatBody, CHAT, presence_penalty=-0.5).parameters().repetition_penalty == 1.5
    assert read(TgiChatBody, CHAT, presence_penalty=0).parameters().repetition_penalty == 2.0


def test_tgi_ignores_what_it_does_not_know():
    body = read(
        TgiChatBody,
        CHAT,
        logit_bias=[1.0],
        n=5,
        chat_template_kwargs=5,
        add_generation_prompt=False,
        continue_final_message=True,
    )
    body.check_supported()
    assert (body.template_variables, body.add_generation_prompt, body.continues_last_message) == ({}, True, False)


@pytest.mark.parametrize(
    ("prompt", "reason"),
    [
        ([], "prompt: Expected `array` of length >= 1"),
        ([1], "prompt[0]: Expected `str`, got `int`"),
        ([[1]], "prompt[0]: Expected `str`, got `array`"),
    ],
)
def test_tgi_takes_no_tokens(prompt, reason):
    assert refusal(TgiCompletionBody, {"prompt": prompt}) == reason
    body = read(TgiCompletionBody, {"prompt": ["a", "b"]}, logprobs=5, echo=True, n=2, best_of=3, stream_options=7)
    body.check_supported()
    assert (body.logprobs, body.echo, body.openai, body.parameters().best_of) == (None, False, OpenAIParameters(), None)
    assert (body.prompts, body.includes_usage) == (["a", "b"], False)
