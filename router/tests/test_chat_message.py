"""Messages: which shapes there are, what templates see of them, and where a prompt is cut for a reply to go on."""

import json

import msgspec
import pytest

from bros_router.api.body import decode_json
from bros_router.api.chat_message import Message, cut_behind
from bros_router.api.errors import Rejection

decoder = msgspec.json.Decoder(Message)
CALL = {"id": "0", "type": "function", "function": {"name": "add", "arguments": {"a": 1, "b": [2.5, "é"]}}}


def message(**fields: object) -> Message:
    return decode_json(decoder, json.dumps({"role": "user"} | fields).encode())


@pytest.mark.parametrize(
    ("fields", "text"),
    [
        ({"content": "a\0b </s>"}, "a\0b </s>"),
        ({"content": ""}, ""),
        ({"content": []}, ""),
        ({"content": [{"type": "text", "text": "a"}, {"type": "text", "text": " b"}]}, "a b"),
        (
            {
                "content": [
                    {"type": "text", "text": "See "},
                    {"type": "image_url", "image_url": {"url": "http://x/y.png", "detail": "low"}},
                ]
            },
            "See ![](http://x/y.png)",
        ),
        ({"content": "kept", "tool_calls": [CALL]}, "kept"),
        ({"content": None, "tool_calls": []}, "[]"),
        (
            {"content": None, "tool_calls": [CALL]},
            '[{"id":"0","type":"function","function":{"description":null,"name":"add",'
            '"arguments":"{\\"a\\":1,\\"b\\":[2.5,\\"é\\"]}"}}]',
        ),
        (
            # As OpenAI's clients send it back: the arguments are a text already.
            {"tool_calls": [CALL | {"function": {"name": "add", "description": "d", "parameters": '{"a": 1}'}}]},
            '[{"id":"0","type":"function","function":{"description":"d","name":"add","arguments":"{\\"a\\": 1}"}}]',
        ),
        ({"content": "x", "name": "ann", "tool_call_id": "7", "refusal": None, "unknown": {}}, "x"),
    ],
)
def test_a_message_is_one_flat_text(fields, text):
    assert message(**fields).text == text


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        ({}, "Object missing required field `role`"),
        ({"role": "user"}, "Expected `content` or `tool_calls`"),
        ({"role": "user", "content": None}, "Expected `content` or `tool_calls`"),
        ({"role": None, "content": "x"}, "role: Expected `str`, got `null`"),
        ({"role": 5, "content": "x"}, "role: Expected `str`, got `int`"),
        ({"role": "user", "content": 5}, "content: Expected `str | array | null`, got `int`"),
        ({"role": "user", "content": {"type": "text"}}, "content: Expected `str | array | null`, got `object`"),
        ({"role": "user", "content": ["x"]}, "content[0]: Expected `object`, got `str`"),
        ({"role": "user", "content": [{"text": "x"}]}, "content[0]: Object missing required field `type`"),
        ({"role": "user", "content": [{"type": "text"}]}, "content[0]: Object missing required field `text`"),
        ({"role": "user", "content": [{"type": "input_audio"}]}, "content[0].type: Invalid value 'input_audio'"),
        ({"role": "user", "content": [{"type": "image_url"}]}, "content[0]: Object missing required field `image_url`"),
        ({"role": "a", "tool_calls": {}}, "tool_calls: Expected `array | null`, got `object`"),
        ({"role": "a", "tool_calls": [{}]}, "tool_calls[0]: Object missing required field `id`"),
        (
            {"role": "a", "tool_calls": [{"id": "0", "type": "function", "function": {"name": "f"}}]},
            "tool_calls[0].function: Object missing required field `arguments`",
        ),
    ],
)
def test_another_shape_is_refused_with_its_path(body, reason):
    with pytest.raises(Rejection) as caught:
        decode_json(decoder, json.dumps(body).encode())
    assert str(caught.value) == f"Failed to deserialize the JSON body into the target type: {reason}"


@pytest.mark.parametrize(
    ("prompt", "text", "expected"),
    [
        ("user: Hi\nassistant: Well,</s>\n", "Well,", "user: Hi\nassistant: Well,"),
        ("user: Hi\nassistant: Well,</s>\n", "  Well, \n", "user: Hi\nassistant: Well,"),
        ("[Yes][Yes]", "Yes", "[Yes][Yes"),
        ("[YES]", "Yes", "[YES]"),  # the template changed it
        ("user: Hi\nassistant: </s>", "", "user: Hi\nassistant: </s>"),
        ("a  b </s>", "a  b ", "a  b"),
    ],
)
def test_a_prompt_ends_where_the_last_message_does(prompt, text, expected):
    assert cut_behind(prompt, Message("assistant", text)) == expected
