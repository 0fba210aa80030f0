"""Which file a model's chat template is taken from."""

import json
from pathlib import Path

import pytest

from bros_router.chat_templates.source import ChatTemplate, find_chat_template
from bros_router.startup_error import CheckpointError

NAMED = [{"name": "tool_use", "template": "with tools"}, {"name": "default", "template": "plain"}]


def write(folder: Path, **files: object) -> Path:
    """Files by name: `chat_template_json={...}`, `chat_template_jinja="..."`."""
    for name, content in files.items():
        stem, _, suffix = name.rpartition("_")
        text = content if isinstance(content, str) else json.dumps(content)
        (folder / f"{stem}.{suffix}").write_text(text)
    return folder


def source(folder: Path, tokenizer_config: dict | None = None, *, is_replaced: bool = False) -> str | None:
    template = find_chat_template(folder, tokenizer_config or {}, is_config_replaced=is_replaced)
    return None if template is None else template.source


@pytest.mark.parametrize(
    ("declared", "expected"),
    [
        ("plain", "plain"),
        (NAMED, "plain"),
        (NAMED[:1], None),
        ([], None),
        (None, None),
        (5, None),
        ([{"name": "default", "template": 5}, "x"], None),
    ],
)
def test_the_tokenizers_configuration_holds_one_or_several_by_name(tmp_path, declared, expected):
    assert source(tmp_path, {"chat_template": declared}) == expected


def test_a_model_without_a_template_has_none(tmp_path):
    assert find_chat_template(tmp_path, {}, is_config_replaced=False) is None


def test_sources_are_believed_in_this_order(tmp_path):
    own = {"chat_template": "own"}
    write(tmp_path, processor_config_json={"chat_template": "processor"})
    assert source(tmp_path) == "processor"
    assert source(tmp_path, own) == "own"
    write(tmp_path, chat_template_jinja="jinja")
    assert source(tmp_path) == "jinja"
    assert source(tmp_path, own) == "jinja"
    assert source(tmp_path, own, is_replaced=True) == "own"  # the operator named the file
    write(tmp_path, chat_template_json={"chat_template": NAMED})
    assert source(tmp_path, own, is_replaced=True) == "plain"


def test_special_tokens_are_texts_from_either_file(tmp_path):
    write(tmp_path, special_tokens_map_json={"bos_token": "<s>", "eos_token": {"content": "</s>"}})
    config = {"chat_template": "x", "eos_token": {"content": "<|im_end|>", "lstrip": False}, "pad_token": None}
    assert find_chat_template(tmp_path, config, is_config_replaced=False) == ChatTemplate(
        "x", {"bos_token": "<s>", "eos_token": "<|im_end|>"}
    )


@pytest.mark.parametrize("name", ["chat_template_json", "processor_config_json"])
def test_a_broken_file_is_refused_by_name(tmp_path, name):
    write(tmp_path, **{name: "{"})
    with pytest.raises(CheckpointError, match=name.replace("_json", r"\.json")):
        source(tmp_path)


def test_a_template_that_is_no_text_is_refused_by_name(tmp_path):
    (tmp_path / "chat_template.jinja").write_bytes(b"\xff\xfe")
    with pytest.raises(CheckpointError, match=r"chat_template\.jinja"):
        source(tmp_path)
