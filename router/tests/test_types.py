"""Bodies as TGI's JSON reader takes them: what passes, and what each fault is answered."""

import contextlib
import json

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from bros_router.api.body import decode_json
from bros_router.api.errors import Rejection
from bros_router.api.types import CompatGenerateRequest, GenerateParameters, GenerateRequest
from bros_router.request import RequestClass

decoder = msgspec.json.Decoder(GenerateRequest)
SYNTAX = "Failed to parse the request body as JSON: "
DATA = "Failed to deserialize the JSON body into the target type: "


def with_parameters(parameters: str) -> bytes:
    return b'{"inputs":"x","parameters":' + parameters.encode() + b"}"


SYNTAX_ERRORS = {
    "empty": b"",
    "blank": b" \n ",
    "cut": b'{"inputs":"x"',
    "word": b"hello",
    "trailing comma": b'{"inputs":"x",}',
    "single quotes": b"{'inputs':'x'}",
    "byte order mark": b'\xef\xbb\xbf{"inputs":"x"}',
    "NaN": with_parameters('{"temperature":NaN}'),
    "Infinity": with_parameters('{"temperature":Infinity}'),
    "-Infinity": with_parameters('{"temperature":-Infinity}'),
    "NaN in an unknown field": b'{"inputs":"x","unknown":NaN}',
    "leading zero": with_parameters('{"top_k":01}'),
    "bare fraction": with_parameters('{"temperature":.5}'),
    "raw newline": b'{"inputs":"a\nb"}',
    "raw NUL": b'{"inputs":"a\x00b"}',
    "raw control character in an unknown field": b'{"inputs":"x","unknown":"\x01"}',
    "lone high surrogate": b'{"inputs":"\\ud800"}',
    "lone low surrogate": b'{"inputs":"\\udc00"}',
    "reversed surrogates": b'{"inputs":"\\udc00\\ud800"}',
    "surrogate before another escape": b'{"inputs":"\\ud800\\u0041"}',
    "number beyond any float": b'{"inputs":"x","parameters":{"temperature":1e999}}',
    "bad escape": b'{"inputs":"\\x41"}',
    "invalid UTF-8": b'{"inputs":"\xff"}',
    "overlong UTF-8": b'{"inputs":"\xc0\x80"}',
    "surrogate in UTF-8": b'{"inputs":"\xed\xa0\x80"}',
    "too deep": b'{"inputs":"x","unknown":' + b"[" * 128 + b"]" * 128 + b"}",
    "too deep, in objects": b'{"inputs":"x","unknown":' + b'{"a":' * 128 + b"1" + b"}" * 128 + b"}",
    "far too deep, and cut": b'{"inputs":' + b"[" * 100_000,
}


@pytest.mark.parametrize("body", SYNTAX_ERRORS.values(), ids=SYNTAX_ERRORS)
def test_what_is_not_json_is_a_syntax_error(body: bytes):
    with pytest.raises(Rejection) as caught:
        decode_json(decoder, body)
    assert caught.value.status == 400
    assert str(caught.value).startswith(SYNTAX)


DATA_ERRORS = {
    b"[]": "Expected `object`, got `array`",
    b"null": "Expected `object`, got `null`",
    b'"x"': "Expected `object`, got `str`",
    b"{}": "Object missing required field `inputs`",
    b'{"inputs":null}': "inputs: Expected `str`, got `null`",
    b'{"inputs":["x"]}': "inputs: Expected `str`, got `array`",
    with_parameters("null"): "parameters: Expected `object`, got `null`",
    with_parameters('{"max_new_tokens":5.0}'): "parameters.max_new_tokens: Expected `int | null`, got `float`",
    with_parameters('{"max_new_tokens":1e3}'): "parameters.max_new_tokens: Expected `int | null`, got `float`",
    with_parameters('{"max_new_tokens":true}'): "parameters.max_new_tokens: Expected `int | null`, got `bool`",
    with_parameters('{"max_new_tokens":"5"}'): "parameters.max_new_tokens: Expected `int | null`, got `str`",
    with_parameters('{"max_new_tokens":-1}'): "parameters.max_new_tokens: Expected `int` >= 0",
    with_parameters('{"max_new_tokens":4294967296}'): "parameters.max_new_tokens: Expected `int` <= 4294967295",
    with_parameters(f'{{"max_new_tokens":{2**63}}}'): "parameters.max_new_tokens: Expected `int` <= 4294967295",
    with_parameters('{"top_k":2147483648}'): "parameters.top_k: Expected `int` <= 2147483647",
    with_parameters('{"best_of":-1}'): "parameters.best_of: Expected `int` >= 0",
    with_parameters('{"truncate":-1}'): "parameters.truncate: Expected `int` >= 0",
    with_parameters('{"seed":-1}'): "parameters.seed: Expected `int` >= 0",
    with_parameters(f'{{"seed":{2**64}}}'): f"parameters: Expected `seed` <= {2**64 - 1}",
    with_parameters('{"temperature":"1"}'): "parameters.temperature: Expected `float | null`, got `str`",
    with_parameters('{"temperature":true}'): "parameters.temperature: Expected `float | null`, got `bool`",
    with_parameters('{"do_sample":1}'): "parameters.do_sample: Expected `bool`, got `int`",
    with_parameters('{"do_sample":null}'): "parameters.do_sample: Expected `bool`, got `null`",
    with_parameters('{"details":"true"}'): "parameters.details: Expected `bool`, got `str`",
    with_parameters('{"stop":null}'): "parameters.stop: Expected `array`, got `null`",
    with_parameters('{"stop":"x"}'): "parameters.stop: Expected `array`, got `str`",
    with_parameters('{"stop":["a",1]}'): "parameters.stop[1]: Expected `str`, got `int`",
    with_parameters('{"grammar":"[a-z]"}'): "parameters.grammar: Expected `object | null`, got `str`",
    with_parameters('{"priority":"fast"}'): "parameters.priority: Invalid enum value 'fast'",
    with_parameters('{"ignore_eos":"yes"}'): "parameters.ignore_eos: Expected `bool`, got `str`",
}


@pytest.mark.parametrize(("body", "reason"), DATA_ERRORS.items())
def test_json_of_another_shape_is_a_data_error_with_its_path(body: bytes, reason: str):
    with pytest.raises(Rejection) as caught:
        decode_json(decoder, body)
    assert caught.value.status == 422
    assert str(caught.value) == DATA + reason


def test_absent_parameters_sample_and_present_ones_are_greedy():
    assert decode_json(decoder, b'{"inputs":"x"}').parameters == GenerateParameters(do_sample=True)
    assert decode_json(decoder, b'{"inputs":"x","parameters":{}}').parameters == GenerateParameters(do_sample=False)


def test_defaults_are_the_contract():
    assert msgspec.to_builtins(GenerateParameters()) == {
        "best_of": None,
        "temperature": None,
        "repetition_penalty": None,
        "frequency_penalty": None,
        "top_k": None,
        "top_p": None,
        "typical_p": None,
        "do_sample": False,
        "max_new_tokens": None,
        "return_full_text": None,
        "stop": [],
        "truncate": None,
        "watermark": False,
        "details": False,
        "decoder_input_details": False,
        "seed": None,
        "top_n_tokens": None,
        "grammar": None,
        "adapter_id": None,
        "priority": None,
        "ignore_eos": False,
    }
    assert decode_json(msgspec.json.Decoder(CompatGenerateRequest), b'{"inputs":"x"}').stream is False


@pytest.mark.parametrize(
    ("parameters", "expected"),
    [
        ('{"temperature":1}', GenerateParameters(temperature=1.0)),
        ('{"seed":18446744073709551615}', GenerateParameters(seed=2**64 - 1)),
        ('{"max_new_tokens":4294967295}', GenerateParameters(max_new_tokens=2**32 - 1)),
        ('{"priority":"be"}', GenerateParameters(priority=RequestClass.BE)),
        ('{"top_k":1,"top_k":2}', GenerateParameters(top_k=2)),
        ('{"top_k":null,"unknown":{"a":[1e999]}}', GenerateParameters()),
    ],
)
def test_what_passes(parameters: str, expected: GenerateParameters):
    assert decode_json(decoder, with_parameters(parameters)).parameters == expected


@pytest.mark.parametrize(
    "text", ["", "a\0b", "</s>", "{{ x }}", "![](http://localhost/)", "\U0001f642", "\ufffd", "\u2028"]
)
def test_any_text_is_literal(text: str):
    assert decode_json(decoder, json.dumps({"inputs": text}).encode()).inputs == text
    assert decode_json(decoder, json.dumps({"inputs": text}, ensure_ascii=False).encode()).inputs == text


@pytest.mark.parametrize(
    "trailing", [b"x", b"{", b"]", b'{"inputs":"y"}', b"\x00", b"\xff\xff", b"[" * 1000, b" \n ", b"NaN"]
)
@pytest.mark.parametrize("leading", [b"", b" \t\r\n"])
def test_bytes_behind_the_first_value_are_ignored(leading: bytes, trailing: bytes):
    body = leading + '{"inputs":"é\\"}","n":1e5}'.encode() + b" " + trailing
    assert decode_json(decoder, body).inputs == 'é"}'


def test_long_numbers_do_not_hide_the_end_of_the_first_value():
    body = b'{"unknown":' + b"9" * 10_000 + b',"inputs":"x"} trailing'
    assert decode_json(decoder, body).inputs == "x"


def test_the_deepest_body_that_passes():
    body = b'{"inputs":"x","unknown":' + b"[" * 127 + b"]" * 127 + b"}"
    assert decode_json(decoder, body).inputs == "x"


@given(st.lists(st.sampled_from(["[", "]", "{", "}", '\\"', "\\\\", "a", "é"]), min_size=130, max_size=400))
def test_brackets_in_text_are_not_nesting(pieces: list[str]):
    text = "".join(pieces)
    body = f'{{"unknown":[{",".join(["[]"] * 200)}],"inputs":"{text}"}}'.encode()
    assert decode_json(decoder, body).inputs == json.loads(f'"{text}"')


@given(st.binary(max_size=60) | st.text(alphabet='{}[]":,\\ue0129xyinputsarmet', max_size=60).map(str.encode))
def test_any_bytes_are_read_or_rejected(body: bytes):
    with contextlib.suppress(Rejection):
        assert isinstance(decode_json(decoder, body), GenerateRequest)
