"""Every rule of the contract: its words, its place in the order, and what a valid request turns into."""

import json
from typing import Any

import pytest

from bros_router.config import ApiConfig
from bros_router.request import RequestClass
from bros_shard.protocol import SamplingParams, Watermark

PREFIX = "Input validation error: "
#: `max_input_tokens` is 60 and `max_total_tokens` 64; each `x` is a token, and BOS is one more.
RULES: list[tuple[dict[str, Any], str]] = [
    ({"best_of": 3}, "`best_of` must be > 0 and <= 2. Given: 3"),
    ({"best_of": 2}, "you must use sampling when `best_of` is > 1"),
    ({"temperature": 0}, "`temperature` must be strictly positive"),
    ({"temperature": -0.5}, "`temperature` must be strictly positive"),
    ({"temperature": 1e-50}, "`temperature` must be strictly positive"),
    ({"temperature": 1e308}, "`temperature` must be <= 1000000"),
    ({"repetition_penalty": 0.0}, "`repetition_penalty` must be strictly positive"),
    ({"repetition_penalty": 1e30}, "`repetition_penalty` must be <= 1000000"),
    ({"frequency_penalty": 2.1}, "`frequency_penalty` must be >= -2.0 and <= 2.0"),
    ({"frequency_penalty": -1e308}, "`frequency_penalty` must be >= -2.0 and <= 2.0"),
    ({"top_p": 0.0}, "`top_p` must be > 0.0 and < 1.0"),
    ({"top_p": 1.0}, "`top_p` must be > 0.0 and < 1.0"),
    ({"top_p": 0.99999999999}, "`top_p` must be > 0.0 and < 1.0"),
    ({"typical_p": 1}, "`typical_p` must be > 0.0 and < 1.0"),
    ({"typical_p": -0.1}, "`typical_p` must be > 0.0 and < 1.0"),
    ({"top_k": 0}, "`top_k` must be strictly positive"),
    ({"top_k": -1}, "`top_k` must be strictly positive"),
    ({"max_new_tokens": 0}, "`max_new_tokens` must be strictly positive"),
    ({"stop": ["a", "b", "c", "d", "e"]}, "`stop` supports up to 4 stop sequences. Given: 5"),
    ({"best_of": 2, "do_sample": True, "seed": 1}, "`seed` must not be set when `best_of` > 1"),
    ({"top_n_tokens": 2**32 - 1}, "`top_n_tokens` must be >= 0 and <= 5. Given: 4294967295"),
    ({"stop": ["a"] * 100_000}, "`stop` supports up to 4 stop sequences. Given: 100000"),
    ({"truncate": 2**63 - 1}, "`truncate` must be strictly positive and less than 60. Given: 9223372036854775807"),
    ({"top_n_tokens": 6}, "`top_n_tokens` must be >= 0 and <= 5. Given: 6"),
    ({"truncate": 0}, "`truncate` must be strictly positive and less than 60. Given: 0"),
    ({"truncate": 61}, "`truncate` must be strictly positive and less than 60. Given: 61"),
    (
        {"max_new_tokens": 62},
        "`inputs` tokens + `max_new_tokens` must be <= 64. Given: 3 `inputs` tokens and 62 `max_new_tokens`",
    ),
    (
        {"max_new_tokens": 4294967295},
        "`inputs` tokens + `max_new_tokens` must be <= 64. Given: 3 `inputs` tokens and 1024 `max_new_tokens`",
    ),
    ({"grammar": {"type": "regex", "value": "[a-z]+"}}, "grammar is not supported"),
]


@pytest.mark.parametrize(("parameters", "message"), RULES, ids=[json.dumps(parameters)[:60] for parameters, _ in RULES])
async def test_a_broken_rule_is_told_in_tgis_words(serve, parameters, message):
    server = await serve()
    response = await server.client.post("/generate", json={"inputs": "xx", "parameters": parameters})
    assert response.status == 422
    assert response.content_type == "application/json"
    assert await response.json() == {"error": PREFIX + message, "error_type": "validation"}
    assert server.engine.requests == []
    assert 'tgi_request_failure{err="validation"} 1.0' in await server.metric_lines()


CHAT = {"messages": [{"role": "user", "content": "Hi"}]}


@pytest.mark.parametrize("is_strict", [False, True])
@pytest.mark.parametrize(
    ("path", "body", "name_in"),
    [
        ("/generate", {"inputs": "xx"}, lambda name: {"parameters": {"adapter_id": name}}),
        ("/v1/chat/completions", CHAT, lambda name: {"model": name}),
        ("/v1/completions", {"prompt": "xx"}, lambda name: {"model": name}),
    ],
)
async def test_requests_name_the_adapter_that_they_go_through(serve, path, body, name_in, is_strict):
    """A name that no adapter has means the model alone, as in TGI."""
    server = await serve(ApiConfig(strict_tgi=is_strict), adapter_ids=("one", "org/two"))
    for name in ("one", "org/two", "acme/tiny", "tgi", "three", "../../etc", "", None):
        response = await server.client.post(path, json=body | name_in(name))
        assert response.status == 200, await response.text()
    assert (await server.client.post(path, json=body)).status == 200
    assert [request.adapter for request in server.engine.requests] == [0, 1, *[None] * 7]


#: Every rule on parameters broken at once: mending the first shows the next. Value that breaks, value that does not.
LADDER: list[tuple[str, Any, Any, str]] = [
    ("temperature", -1, 1, "`temperature` must be strictly positive"),
    ("repetition_penalty", 0, 1, "`repetition_penalty` must be strictly positive"),
    ("frequency_penalty", 3, 0, "`frequency_penalty` must be >= -2.0 and <= 2.0"),
    ("top_p", 1, 0.5, "`top_p` must be > 0.0 and < 1.0"),
    ("typical_p", 1, 0.5, "`typical_p` must be > 0.0 and < 1.0"),
    ("top_k", 0, 1, "`top_k` must be strictly positive"),
    ("max_new_tokens", 0, 2, "`max_new_tokens` must be strictly positive"),
    ("stop", ["a"] * 9, [], "`stop` supports up to 4 stop sequences. Given: 9"),
    ("seed", 7, None, "`seed` must not be set when `best_of` > 1"),
    ("top_n_tokens", 9, 0, "`top_n_tokens` must be >= 0 and <= 5. Given: 9"),
    ("inputs", "", "xx", "`inputs` cannot be empty"),
    ("truncate", 0, None, "`truncate` must be strictly positive and less than 60. Given: 0"),
]


async def test_rules_are_checked_in_the_contracts_order(serve):
    server = await serve()
    broken = {"best_of": 2} | {name: bad for name, bad, _, _ in LADDER}
    for name, _, good, message in LADDER:
        body = {"inputs": broken["inputs"], "parameters": {k: v for k, v in broken.items() if k != "inputs"}}
        response = await server.client.post("/generate", json=body)
        assert (await response.json())["error"] == PREFIX + message
        broken[name] = good


@pytest.mark.parametrize(
    ("num_inputs", "max_new_tokens", "message"),
    [
        (60, None, "`inputs` must have less than 60 tokens. Given: 61"),
        (63, None, "`inputs` must have less than 60 tokens. Given: 64"),
        (
            64,
            None,
            "`inputs` tokens + `max_new_tokens` must be <= 64. Given: 65 `inputs` tokens and 0 `max_new_tokens`",
        ),
        (60, 3, "`inputs` must have less than 60 tokens. Given: 61"),
        (
            60,
            4,
            "`inputs` tokens + `max_new_tokens` must be <= 64. Given: 61 `inputs` tokens and 4 `max_new_tokens`",
        ),
        (
            100_000,
            1,
            "`inputs` tokens + `max_new_tokens` must be <= 64. Given: 100001 `inputs` tokens and 1 `max_new_tokens`",
        ),
    ],
)
async def test_lengths_are_judged_in_tokens(serve, num_inputs, max_new_tokens, message):
    server = await serve()
    body = {"inputs": "x" * num_inputs, "parameters": {"max_new_tokens": max_new_tokens}}
    response = await server.client.post("/generate", json=body)
    assert (response.status, (await response.json())["error"]) == (422, PREFIX + message)


@pytest.mark.parametrize(
    ("max_best_of", "best_of", "message"),
    [
        (1, 2, "`best_of` != 1 is not allowed for this endpoint"),
        (4, 5, "`best_of` must be > 0 and <= 4. Given: 5"),
        (4, 2**63 - 1, "`best_of` must be > 0 and <= 4. Given: 9223372036854775807"),
    ],
)
async def test_best_of_is_judged_before_a_permit_is_taken(serve, max_best_of, best_of, message):
    server = await serve(ApiConfig(max_best_of=max_best_of, max_concurrent_requests=0))
    response = await server.client.post("/generate", json={"inputs": "x", "parameters": {"best_of": best_of}})
    assert (response.status, (await response.json())["error"]) == (422, PREFIX + message)


@pytest.mark.parametrize(
    ("parameters", "message"),
    [
        ({"best_of": 0}, "`best_of` != 1 is not supported when streaming tokens"),
        ({"best_of": 9}, "`best_of` != 1 is not supported when streaming tokens"),
        (
            {"decoder_input_details": True},
            "`decoder_input_details` == true is not supported when streaming tokens",
        ),
    ],
)
async def test_streams_have_rules_of_their_own(serve, parameters, message):
    server = await serve(ApiConfig(max_concurrent_requests=0))
    response = await server.client.post("/generate_stream", json={"inputs": "x", "parameters": parameters})
    event = json.dumps({"error": PREFIX + message, "error_type": "validation"}, separators=(",", ":"))
    assert (response.status, await response.text()) == (200, f"data: {event}\n\n")


async def submitted(server, body: dict[str, Any], **headers: str):
    """The request that the engine was given."""
    response = await server.client.post("/generate", json=body, headers=headers)
    assert response.status == 200, await response.text()
    return server.engine.requests[-1]


@pytest.mark.parametrize("best_of", [0, 1, None])
async def test_a_single_candidate_is_served(serve, best_of):
    server = await serve()
    await submitted(server, {"inputs": "x", "parameters": {"best_of": best_of}})


NEUTRAL = {
    "do_sample": False,
    "temperature": 1.0,
    "top_k": 0,
    "top_p": 1.0,
    "typical_p": 1.0,
    "repetition_penalty": 1.0,
    "frequency_penalty": 0.0,
    "seed": 7,
}


@pytest.mark.parametrize(
    ("parameters", "changed"),
    [
        ({}, {}),
        ({"temperature": 1.0}, {}),
        ({"do_sample": True}, {"do_sample": True}),
        ({"temperature": 0.5}, {"do_sample": True, "temperature": 0.5}),
        ({"top_k": 5}, {"do_sample": True, "top_k": 5}),
        ({"top_p": 0.5}, {"do_sample": True, "top_p": 0.5}),
        ({"typical_p": 0.25}, {"do_sample": True, "typical_p": 0.25}),
        ({"repetition_penalty": 1.25}, {"repetition_penalty": 1.25}),
        ({"frequency_penalty": -2.0}, {"frequency_penalty": -2.0}),
        ({"frequency_penalty": 2}, {"frequency_penalty": 2.0}),
        ({"seed": 2**64 - 1}, {"seed": 2**64 - 1}),
        ({"top_n_tokens": 5}, {"num_top_tokens": 5}),
        ({"watermark": True}, {"watermark": Watermark(0.5, 2.0)}),
        # OpenAI's, not TGI's.
        ({"presence_penalty": 1.0, "logit_bias": {"1": 1.0}, "n": 3}, {}),
    ],
)
async def test_sampling_is_on_where_something_asks_for_it(serve, parameters, changed):
    server = await serve()
    request = await submitted(server, {"inputs": "x", "parameters": {"seed": 7} | parameters})
    assert request.sampling == SamplingParams(**NEUTRAL | changed)


async def test_the_operator_says_how_texts_are_marked(serve):
    server = await serve(ApiConfig(watermark_gamma=0.25, watermark_delta=-1.5))
    request = await submitted(server, {"inputs": "x", "parameters": {"watermark": True}})
    assert request.sampling.watermark == Watermark(0.25, -1.5)


@pytest.mark.parametrize(("is_enabled", "expected"), [(False, None), (True, 0)])
async def test_prompts_are_told_of_where_the_server_was_started_for_it(serve, is_enabled, expected):
    server = await serve(ApiConfig(enable_prefill_logprobs=is_enabled))
    request = await submitted(server, {"inputs": "x", "parameters": {"decoder_input_details": True}})
    assert request.num_prompt_top_tokens == expected
    assert (await submitted(server, {"inputs": "x"})).num_prompt_top_tokens is None


async def test_values_are_rounded_to_what_tgi_holds(serve):
    server = await serve()
    request = await submitted(server, {"inputs": "x", "parameters": {"temperature": 0.7}})
    assert request.sampling.temperature == 0.699999988079071


async def test_absent_parameters_sample_with_a_seed_of_our_own(serve):
    server = await serve()
    first = await submitted(server, {"inputs": "x"})
    second = await submitted(server, {"inputs": "x"})
    assert first.sampling.do_sample
    assert first.sampling.seed != second.sampling.seed
    assert max(first.sampling.seed, second.sampling.seed) < 2**64


@pytest.mark.parametrize(
    ("max_new_tokens", "effective"), [(None, 61), (1, 1), (61, 61)], ids=["fill up", "one", "as much as fits"]
)
async def test_new_tokens_are_as_asked_or_fill_the_context(serve, max_new_tokens, effective):
    server = await serve()
    request = await submitted(server, {"inputs": "xx", "parameters": {"max_new_tokens": max_new_tokens}})
    assert (len(request.prompt_token_ids), request.max_new_tokens) == (3, effective)


async def test_more_new_tokens_than_fit_are_cut_where_tgi_would_not_look(serve):
    """Only 1024 are judged, so a large wish passes; the context still ends where it ends."""
    server = await serve(max_input_tokens=1999, max_total_tokens=2000)
    request = await submitted(server, {"inputs": "x" * 499, "parameters": {"max_new_tokens": 100_000}})
    assert (len(request.prompt_token_ids), request.max_new_tokens) == (500, 1500)
    lines = await server.metric_lines()
    assert "tgi_request_max_new_tokens_sum 1024.0" in lines
    assert "tgi_request_input_length_sum 500.0" in lines


async def test_truncation_keeps_bos_and_the_end_and_is_judged_by_what_is_left(serve, byte_level_tokenizer):
    server = await serve()
    end = byte_level_tokenizer.encode("yz", add_special_tokens=False).ids
    body = {"inputs": "x" * 1000 + "yz", "parameters": {"truncate": 3, "max_new_tokens": 61}}
    request = await submitted(server, body)
    assert request.prompt_token_ids == (0, *end)


@pytest.mark.parametrize("inputs", ["a\0b", "\0", "</s>", "<s>", "![](http://127.0.0.1/x.png)", "\u202e", "\ufffd"])
async def test_odd_prompts_are_text(serve, byte_level_tokenizer, inputs):
    server = await serve()
    request = await submitted(server, {"inputs": inputs})
    assert request.prompt_token_ids == tuple(byte_level_tokenizer.encode(inputs).ids)


async def test_stop_sequences_and_ignore_eos_reach_the_engine(serve):
    server = await serve()
    request = await submitted(server, {"inputs": "x", "parameters": {"stop": ["", "\n\n"], "ignore_eos": True}})
    assert (request.stop_sequences, request.ignore_eos) == (("", "\n\n"), True)
    assert (await submitted(server, {"inputs": "x"})).ignore_eos is False


@pytest.mark.parametrize(
    ("parameters", "headers", "expected"),
    [
        ({}, {}, "rt"),
        ({"priority": "be"}, {}, "be"),
        ({"priority": "rt"}, {}, "rt"),
        ({}, {"x-request-class": "be"}, "be"),
        ({"priority": "be"}, {"x-request-class": "rt"}, "rt"),
        ({"priority": "rt"}, {"X-Request-Class": "be"}, "be"),
    ],
)
async def test_the_class_is_the_headers_else_the_bodys_else_real_time(serve, parameters, headers, expected):
    server = await serve()
    for path in ("/generate", "/generate_stream", "/"):
        body = {"inputs": "x", "parameters": parameters}
        response = await server.client.post(path, json=body, headers=headers)
        assert response.headers["x-request-class"] == expected
        assert server.engine.requests[-1].request_class is RequestClass(expected)


@pytest.mark.parametrize("path", ["/generate", "/generate_stream"])
async def test_a_class_that_does_not_exist_is_told_by_the_status(serve, path):
    server = await serve()
    response = await server.client.post(path, json={"inputs": "x"}, headers={"x-request-class": "vip"})
    assert response.status == 422
    assert await response.json() == {
        "error": PREFIX + "`x-request-class` must be `rt` or `be`",
        "error_type": "validation",
    }


NAMED = {"x-slo-ttft-ms": "400", "x-slo-tpot-ms": "0.5"}
OPERATORS = {"slo_ttft_ms": 900.0, "slo_tpot_ms": 60.0}


@pytest.mark.parametrize(
    ("config", "headers", "priority", "expected"),
    [
        ({}, {}, None, ("rt", None, None)),
        ({}, NAMED, None, ("rt", 0.4, 0.0005)),
        ({}, {"x-slo-tpot-ms": "1e2"}, None, ("rt", None, 0.1)),
        ({"default_class": "be"}, {}, None, ("be", None, None)),
        ({"default_class": "be"}, {}, "rt", ("rt", None, None)),
        ({"default_class": "be"}, {"x-request-class": "rt"}, None, ("rt", None, None)),
        # A target without a class means real-time: a header, so it wins over the body.
        ({"default_class": "be"}, {"x-slo-ttft-ms": "400"}, None, ("rt", 0.4, None)),
        ({}, {"x-slo-ttft-ms": "400"}, "be", ("rt", 0.4, None)),
        # Best-effort has no targets, whoever names it.
        ({}, NAMED | {"x-request-class": "be"}, "rt", ("be", None, None)),
        (OPERATORS, {}, "be", ("be", None, None)),
        # The operator's stand in for those that the client does not name.
        (OPERATORS, {}, None, ("rt", 0.9, 0.06)),
        (OPERATORS, {"x-slo-ttft-ms": "400"}, None, ("rt", 0.4, 0.06)),
        (OPERATORS | {"default_class": "be"}, {"x-request-class": "rt"}, None, ("rt", 0.9, 0.06)),
    ],
)
async def test_class_and_targets_are_the_headers_else_the_bodys_else_the_operators(
    serve, config, headers, priority, expected
):
    server = await serve(ApiConfig(**config))
    body = {"inputs": "x", "parameters": {"priority": priority}}
    for path in ("/generate", "/generate_stream", "/"):
        response = await server.client.post(path, json=body, headers=headers)
        request = server.engine.requests[-1]
        assert (request.request_class.value, request.ttft_s, request.tpot_s) == expected
        shown = [response.headers.get(name) for name in ("x-request-class", "x-slo-ttft-ms", "x-slo-tpot-ms")]
        assert shown[0] == expected[0]
        assert [value and float(value) for value in shown[1:]] == [value and value * 1000 for value in expected[1:]]
        assert "x-admission" not in response.headers


@pytest.mark.parametrize("request_class", ["rt", "be"])
async def test_a_deadline_reaches_the_engine(serve, request_class):
    server = await serve()
    headers = {"x-request-class": request_class, "x-request-deadline-ms": "1500"}
    request = await submitted(server, {"inputs": "x"}, **headers)
    assert (request.deadline_s, request.request_class.value) == (1.5, request_class)
    assert (await submitted(server, {"inputs": "x"})).deadline_s is None


@pytest.mark.parametrize(
    "value",
    [
        "",
        "0",
        "-1",
        "-0.0",
        "nan",
        "NaN",
        "inf",
        "Infinity",
        "1e999",
        "1e-323",
        "1_000",
        "4,5",
        "5 ms",
        "0x10",
        "٣",
        "é",
    ],
)
@pytest.mark.parametrize("name", ["x-slo-ttft-ms", "x-slo-tpot-ms", "x-request-deadline-ms"])
async def test_a_time_that_is_none_is_told_by_the_status(serve, name, value):
    server = await serve()
    for path in ("/generate", "/generate_stream", "/"):
        body = b'{"inputs":"x","stream":true,"parameters":{"priority":"be"}}'
        answer = await server.exchange(
            f"POST {path} HTTP/1.1\r\nHost: x\r\nConnection: close\r\n{name}: {value}\r\n"
            f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n".encode()
            + body
        )
        head, _, text = answer.partition(b"\r\n\r\n")
        assert head.startswith(b"HTTP/1.1 422 ")
        message = f"{PREFIX}`{name}` must be a number of milliseconds, and strictly positive"
        assert json.loads(text) == {"error": message, "error_type": "validation"}
    assert server.engine.requests == []


@pytest.mark.parametrize("value", ["1", "0.001", "1E3", "123456789012", "1e300"])
async def test_a_time_may_be_any_positive_number(serve, value):
    server = await serve()
    response = await server.client.post("/generate", json={"inputs": "x"}, headers={"x-slo-ttft-ms": value})
    assert float(response.headers["x-slo-ttft-ms"]) == pytest.approx(float(value), rel=1e-11)


async def test_tokenize_looks_at_no_such_header(serve):
    server = await serve()
    response = await server.client.post("/tokenize", json={"inputs": "x"}, headers={"x-slo-ttft-ms": "soon"})
    assert response.status == 200


async def test_request_ids_differ(serve):
    server = await serve()
    first, second = [await submitted(server, {"inputs": "x"}) for _ in range(2)]
    assert first.request_id != second.request_id


async def test_a_prompt_without_tokens_is_empty(serve, tmp_path):
    """A tokenizer may drop a text that is not empty."""
    from tokenizers import Tokenizer as FastTokenizer
    from tokenizers import models, normalizers

    from bros_router.tokenizer import Tokenizer

    stripping = FastTokenizer(models.WordLevel({"x": 0}, unk_token="x"))
    stripping.normalizer = normalizers.Strip()
    stripping.save(str(tmp_path / "tokenizer.json"))
    server = await serve(tokenizer=Tokenizer(tmp_path / "tokenizer.json"))
    response = await server.client.post("/generate", json={"inputs": "  "})
    assert (await response.json())["error"] == PREFIX + "`inputs` cannot be empty"


async def test_a_text_that_the_tokenizer_refuses_is_told(serve, tmp_path):
    from tokenizers import Tokenizer as FastTokenizer
    from tokenizers import models

    from bros_router.tokenizer import Tokenizer

    without_unknown = FastTokenizer(models.WordLevel({"x": 0}, unk_token="<unk>"))
    without_unknown.save(str(tmp_path / "tokenizer.json"))
    server = await serve(tokenizer=Tokenizer(tmp_path / "tokenizer.json"))
    response = await server.client.post("/generate", json={"inputs": "y"})
    assert response.status == 422
    assert (await response.json())["error"].startswith(PREFIX + "tokenizer error ")
