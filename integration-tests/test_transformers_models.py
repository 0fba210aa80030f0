"""A server of a model that has no decoder of its own: it says so, and its tokens are those of transformers."""

import concurrent.futures
import json
import shutil
import urllib.request
from pathlib import Path

import pytest
import torch
import transformers

from bros_router.model_source import demo_model_path
from bros_router.tokenizer import Tokenizer

NUM_TOKENS = 24
PROMPTS = [f"Return {what}" for what in ("a list of the", "None", "True if the file was opened for" * 8, "x")] * 2


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> tuple[Path, transformers.PreTrainedModel]:
    """An OLMo 2 of random weights that reads with the demo model's tokenizer."""
    path = tmp_path_factory.mktemp("olmo2")
    demo = json.loads((demo_model_path() / "config.json").read_text())
    config = transformers.Olmo2Config(
        vocab_size=demo["vocab_size"],
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        eos_token_id=None,
        pad_token_id=None,
    )
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0.0, 0.3)
    model.save_pretrained(path)
    shutil.copy(demo_model_path() / "tokenizer.json", path)
    return path, model


def test_tokens_of_many_requests_at_once_are_those_of_transformers(launch, model):
    path, reference = model
    flags = ("--model-id", str(path), "--dtype", "float32", "--block-size", "16", "--kv-slots-limit", "640")
    server = launch(*flags, "--max-batch-prefill-tokens", "32").wait_until_ready()
    (warning,) = (line for line in server.lines if "served through transformers" in line)
    assert "WARN" in warning and "Olmo2ForCausalLM" in warning

    def ask(index: int) -> list[int]:
        parameters = {"max_new_tokens": NUM_TOKENS, "details": True, "repetition_penalty": 1.3, "ignore_eos": True}
        request = urllib.request.Request(
            f"{server.url}/generate",
            json.dumps({"inputs": PROMPTS[index], "parameters": parameters}).encode(),
            {"Content-Type": "application/json", "x-request-class": ("rt", "be")[index % 2]},
        )
        with urllib.request.urlopen(request, timeout=120) as reply:
            return [token["id"] for token in json.load(reply)["details"]["tokens"]]

    with concurrent.futures.ThreadPoolExecutor(len(PROMPTS)) as pool:
        replies = list(pool.map(ask, range(len(PROMPTS))))

    tokenizer = Tokenizer(path / "tokenizer.json")
    for prompt, reply in zip(PROMPTS, replies, strict=True):
        input_ids = torch.tensor([tokenizer.encode(prompt).ids])
        expected = reference.generate(
            input_ids, do_sample=False, max_new_tokens=NUM_TOKENS, repetition_penalty=1.3, pad_token_id=0
        )
        assert reply == expected[0, input_ids.shape[1] :].tolist()
    assert server.stop() == 0
