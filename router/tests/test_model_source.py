"""Models found and read: the demo, folders with all the oddities of checkpoints, and folders that must be refused."""

import json
from pathlib import Path
from typing import Any

import pytest
import tokenizers

from bros_router.adapter_folders import resolve_adapters
from bros_router.config import HubConfig, ModelConfig
from bros_router.model_source import DEMO_MODEL_ID, ModelFiles, demo_model_path, read, resolve_model
from bros_router.startup_error import CheckpointError, ModelNotFoundError
from bros_router.tokenizer import Tokenizer

VOCABULARY = {"a": 0, "b": 1, "ab": 2, "<s>": 3, "</s>": 4, "<|im_end|>": 5}


def write_model(folder: Path, **files: Any) -> Path:
    """A folder that passes for a model; `files` by name with `_json` for `.json`, `None` to leave one out."""
    contents: dict[str, Any] = {
        "config_json": {"vocab_size": 6, "max_position_embeddings": 128, "dtype": "bfloat16"},
        "tokenizer_config_json": {"model_max_length": 64, "eos_token": "</s>"},
    } | files
    for name, content in contents.items():
        if content is not None:
            text = content if isinstance(content, str) else json.dumps(content)
            (folder / name.replace("_json", ".json")).write_text(text)
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE(vocab=VOCABULARY, merges=[("a", "b")]))
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "model.safetensors").touch()
    return folder


def read_model(folder: Path, **files: Any) -> ModelFiles:
    return read(write_model(folder, **files), "m")


def test_folder_is_read(tmp_path):
    files = read_model(tmp_path)
    assert (files.path, files.model_id, files.sha, files.pipeline_tag) == (tmp_path, "m", None, None)
    assert (files.max_position_embeddings, files.model_max_length, files.max_length) == (128, 64, 64)
    assert (files.vocab_size, files.dtype) == (6, "bfloat16")
    assert files.eos_token_ids == {4}
    assert files.tokenizer.encode("ab").ids == [2]


def resolve(adapters: str) -> dict[str, Path]:
    model = ModelConfig(lora_adapters=adapters)
    return resolve_adapters(model, HubConfig(is_offline=True), lambda phase, done, total: None)


def test_adapters_are_folders_by_id_in_the_order_given(tmp_path, monkeypatch):
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "adapter_config.json").touch()
    monkeypatch.chdir(tmp_path)
    folders = resolve(f"z={tmp_path}/two,./one@main,a=one")
    assert [*folders.items()] == [("z", tmp_path / "two"), ("./one", tmp_path / "one"), ("a", tmp_path / "one")]


def test_adapters_that_are_not_there_are_told_by_name(tmp_path):
    with pytest.raises(ModelNotFoundError, match="adapter a: /nowhere is not a folder"):
        resolve("a=/nowhere")
    with pytest.raises(ModelNotFoundError, match="org/nowhere is neither a local folder nor complete in the cache"):
        resolve("org/nowhere")
    with pytest.raises(CheckpointError, match=r"adapter b: there is no adapter_config\.json"):
        resolve(f"b={tmp_path}")


def test_demo_model_is_the_default():
    files = resolve_model(ModelConfig(), HubConfig(), lambda phase, done, total: None)
    assert files.model_id == DEMO_MODEL_ID
    assert files.path == demo_model_path()
    assert files.path.parent.name == "bros_shard"
    assert files.eos_token_ids
    assert files.max_length is not None


def test_folder_goes_by_the_name_it_was_given(tmp_path, monkeypatch):
    (tmp_path / "model").mkdir()
    write_model(tmp_path / "model")
    monkeypatch.chdir(tmp_path)
    files = resolve_model(ModelConfig(model_id="./model"), HubConfig(), lambda phase, done, total: None)
    assert files.model_id == "./model"
    assert files.path == tmp_path / "model"


def test_name_that_is_no_folder_is_looked_for_on_the_hub(tmp_path):
    hub = HubConfig(cache_dir=tmp_path, is_offline=True)
    with pytest.raises(ModelNotFoundError, match="org/model is neither a local folder nor complete in the cache"):
        resolve_model(ModelConfig(model_id="org/model"), hub, lambda phase, done, total: None)


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        # A list in generation_config.json has the last word.
        ({"generation_config_json": {"eos_token_id": [4, 5]}}, {4, 5}),
        # One id there does not: the tokenizer's own end token wins, as in TGI.
        ({"generation_config_json": {"eos_token_id": 5}}, {4}),
        ({"generation_config_json": {"eos_token_id": 5}, "tokenizer_config_json": {}}, {5}),
        ({"tokenizer_config_json": {"eos_token": {"content": "<|im_end|>"}}}, {5}),
        ({"tokenizer_config_json": None, "special_tokens_map_json": {"eos_token": "</s>"}}, {4}),
        ({"tokenizer_config_json": {}, "config_json": {"vocab_size": 6, "eos_token_id": 5}}, {5}),
        ({"tokenizer_config_json": {}, "config_json": {"vocab_size": 6, "eos_token_id": [3, 5]}}, {3, 5}),
        ({"tokenizer_config_json": {"eos_token": "<unknown>"}}, set()),
        ({"tokenizer_config_json": {"eos_token": None}}, set()),
        ({"tokenizer_config_json": {}, "generation_config_json": {"eos_token_id": True}}, set()),
        ({"tokenizer_config_json": {}, "generation_config_json": {"eos_token_id": "4"}}, set()),
        ({"tokenizer_config_json": {}, "generation_config_json": {"eos_token_id": []}}, set()),
        ({"tokenizer_config_json": {}, "generation_config_json": {"eos_token_id": [-1]}}, set()),
    ],
)
def test_end_of_sequence(tmp_path, files, expected):
    assert read_model(tmp_path, **files).eos_token_ids == expected


@pytest.mark.parametrize(
    ("config", "tokenizer_config", "expected"),
    [
        ({"max_position_embeddings": 128}, {"model_max_length": 1000000000000000019884624838656}, 128),
        ({"max_position_embeddings": 128}, {"model_max_length": 1e30}, 128),
        ({"max_position_embeddings": 128}, {}, 128),
        ({"n_positions": 32}, {"model_max_length": 64}, 32),
        ({}, {"model_max_length": 64.0}, 64),
        ({}, {}, None),
        ({"max_position_embeddings": -1}, {"model_max_length": 0}, None),
        ({"max_position_embeddings": "128"}, {"model_max_length": None}, None),
    ],
)
def test_longest_sequence(tmp_path, config, tokenizer_config, expected):
    files = read_model(tmp_path, config_json={"vocab_size": 6} | config, tokenizer_config_json=tokenizer_config)
    assert files.max_length == expected


def test_model_of_several_modalities_is_read_for_its_text(tmp_path):
    text_config = {"vocab_size": 6, "max_position_embeddings": 32, "torch_dtype": "float16"}
    files = read_model(tmp_path, config_json={"vision_config": {}, "text_config": text_config})
    assert (files.vocab_size, files.max_position_embeddings, files.dtype) == (6, 32, "float16")


def test_tokenizer_configuration_may_be_another_file(tmp_path):
    other = tmp_path / "other.json"
    other.write_text('{"model_max_length": 7, "eos_token": "<s>"}')
    write_model(tmp_path)
    config = ModelConfig(model_id=str(tmp_path), tokenizer_config_path=other)
    files = resolve_model(config, HubConfig(), lambda phase, done, total: None)
    assert (files.model_max_length, files.eos_token_ids) == (7, {3})


@pytest.mark.parametrize(
    ("files", "reason"),
    [
        ({"config_json": None}, r"there is no config\.json"),
        ({"config_json": "{"}, r"config\.json cannot be read"),
        ({"config_json": "[]"}, r"config\.json is not a JSON object"),
        ({"config_json": "[" * 100_000}, r"config\.json cannot be read"),
        ({"config_json": {}}, r"config\.json has no vocab_size"),
        ({"config_json": {"vocab_size": 5}}, "the tokenizer has 6 tokens and the model 5"),
        ({"generation_config_json": "nonsense"}, r"generation_config\.json cannot be read"),
        ({"config_json": {"text_config": "x"}}, r"text_config"),
    ],
)
def test_broken_folder_is_refused(tmp_path, files, reason):
    with pytest.raises(CheckpointError, match=reason):
        read_model(tmp_path, **files)


def test_pickled_weights_are_refused(tmp_path):
    write_model(tmp_path)
    (tmp_path / "model.safetensors").rename(tmp_path / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match="no safetensors weights"):
        read(tmp_path, "m")


def test_broken_tokenizer_is_refused(tmp_path):
    write_model(tmp_path)
    (tmp_path / "tokenizer.json").write_text('{"model": {}}')
    with pytest.raises(CheckpointError, match="m: the tokenizer cannot be read"):
        read(tmp_path, "m")


def test_slow_tokenizer_is_converted(tmp_path):
    """GPT-2's older form: the same vocabulary and merges in two files."""
    tokenizer_config = {"tokenizer_class": "GPT2Tokenizer", "eos_token": "</s>"}
    write_model(tmp_path, config_json={"vocab_size": 7}, tokenizer_config_json=tokenizer_config)
    (tmp_path / "tokenizer.json").unlink()
    (tmp_path / "vocab.json").write_text(json.dumps(VOCABULARY | {"<|endoftext|>": 6}))
    (tmp_path / "merges.txt").write_text("#version: 0.2\na b\n")
    before = sorted(tmp_path.iterdir())
    files = read(tmp_path, "m")
    assert isinstance(files.tokenizer, Tokenizer)
    assert files.tokenizer.encode("abb").ids == [2, 1]
    assert files.eos_token_ids == {4}
    assert sorted(tmp_path.iterdir()) == before


def test_tokenizer_that_is_missing_is_refused(tmp_path):
    write_model(tmp_path)
    (tmp_path / "tokenizer.json").unlink()
    with pytest.raises(CheckpointError, match=r"m: there is no tokenizer\.json, nor an older form"):
        read(tmp_path, "m")


def test_slow_tokenizer_that_is_broken_is_refused_in_one_line(tmp_path):
    write_model(tmp_path, tokenizer_config_json={"tokenizer_class": "GPT2Tokenizer"})
    (tmp_path / "tokenizer.json").unlink()
    (tmp_path / "vocab.json").write_text("not json")
    with pytest.raises(CheckpointError, match=r"the slow tokenizer cannot be converted \(") as refusal:
        read(tmp_path, "m")
    assert "\n" not in str(refusal.value)
