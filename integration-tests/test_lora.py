"""Servers with LoRA adapters: what every request gets is what `transformers` gives with merged weights."""

from __future__ import annotations

import concurrent.futures
import copy
import itertools
import json
import random
import urllib.request
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from bros_router.model_source import demo_model_path

NUM_NEW_TOKENS = 16
#: What each adapter changes.
TARGETS = {"one": ("q_proj", "v_proj", "down_proj"), "org/two": ("o_proj", "gate_proj")}
PROMPTS = (
    "def read_lines(path):\n",
    'class Queue:\n    """A queue of items."""\n\n    def put(self, item):\n        """Put an item at the end."""\n',
    "Return a list of the names of the files in the directory, without those that begin with a dot. " * 3,
)
CACHED = 'bros_prompt_tokens_cached_total{{class="{}"}}'


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(demo_model_path())


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> dict[str | None, Any]:
    """The demo model, and the same with the weights of each adapter merged, which lies in its `path`."""
    base = AutoModelForCausalLM.from_pretrained(demo_model_path(), dtype=torch.float32).eval()
    base.generation_config.eos_token_id = None  # as `ignore_eos`
    return {None: base} | {name: merge(base, name, tmp_path_factory.mktemp("adapter")) for name in TARGETS}


def merge(base: Any, name: str, folder: Path) -> Any:
    """Save a random adapter as PEFT does. Returns the model with its weights merged."""
    merged = copy.deepcopy(base)
    generator = torch.Generator().manual_seed(len(name))
    tensors = {}
    for module, layer in merged.named_modules():
        if module.endswith(TARGETS[name]):
            out_features, in_features = layer.weight.shape
            down = torch.randn(8, in_features, generator=generator) / in_features**0.5
            up = 0.3 * torch.randn(out_features, 8, generator=generator)
            tensors[f"base_model.model.{module}.lora_A.weight"] = down
            tensors[f"base_model.model.{module}.lora_B.weight"] = up
            with torch.no_grad():
                layer.weight += 2.0 * up @ down
    save_file(tensors, folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": 8, "lora_alpha": 16}))
    merged.path = folder
    return merged


@pytest.fixture(scope="module")
def greedy_ids(models, tokenizer) -> dict[tuple[str | None, str], list[int]]:
    """By adapter and prompt, in float32."""
    return {
        (name, prompt): generate(model, tokenizer(prompt, return_tensors="pt"))
        for (name, model), prompt in itertools.product(models.items(), PROMPTS)
    }


def generate(model: Any, inputs: Any) -> list[int]:
    output = model.generate(**inputs, max_new_tokens=NUM_NEW_TOKENS, do_sample=False)
    return output[0, inputs.input_ids.shape[1] :].tolist()


@pytest.fixture(scope="module", params=["1", "2"], ids=["1 rank", "2 ranks"])
def lora_server(launch, models, request):
    """Both adapters, and blocks so small that every prompt but the first fills some."""
    adapters = ",".join(f"{name}={models[name].path}" for name in TARGETS)
    flags = ("--dtype", "float32", "--block-size", "16", "--kv-cache-memory", "64MiB", "--num-shard", request.param)
    return launch(*flags, environment={"LORA_ADAPTERS": adapters}).wait_until_ready()


def post(url: str, body: dict[str, Any], **headers: str) -> Any:
    request = urllib.request.Request(url, json.dumps(body).encode(), {"Content-Type": "application/json"} | headers)
    with urllib.request.urlopen(request, timeout=120) as reply:
        return json.load(reply)


def test_every_request_goes_through_its_adapter_whatever_runs_beside_it(lora_server, greedy_ids):
    jobs = [(name, prompt, request_class) for (name, prompt) in greedy_ids for request_class in ("rt", "be")] * 2
    random.Random(2).shuffle(jobs)

    def ids_of(name: str | None, prompt: str, request_class: str) -> list[int]:
        parameters = {"max_new_tokens": NUM_NEW_TOKENS, "details": True, "ignore_eos": True}
        parameters |= {} if name is None else {"adapter_id": name}
        body = {"inputs": prompt, "parameters": parameters}
        reply = post(f"{lora_server.url}/generate", body, **{"x-request-class": request_class})
        return [token["id"] for token in reply["details"]["tokens"]]

    with concurrent.futures.ThreadPoolExecutor(12) as threads:
        replies = [*threads.map(lambda job: ids_of(*job), jobs)]
    assert replies == [greedy_ids[name, prompt] for name, prompt, _ in jobs]
    assert len({*map(tuple, greedy_ids.values())}) == len(greedy_ids), "some are one"
    assert sum(lora_server.metric(CACHED.format(request_class)) for request_class in ("rt", "be")) > 0


def test_routes_of_openai_take_adapters_for_models(lora_server, greedy_ids, tokenizer):
    for model, name in (("one", "one"), ("org/two", "org/two"), ("bros-demo", None), ("tgi", None), ("nobody", None)):
        body = {"model": model, "prompt": PROMPTS[2], "max_tokens": 8, "temperature": 0}
        reply = post(f"{lora_server.url}/v1/completions", body)
        assert reply["model"] == "bros-demo"
        assert reply["choices"][0]["text"] == tokenizer.decode(greedy_ids[name, PROMPTS[2]][:8])
    texts = set()
    for model in ("one", "bros-demo"):
        chat = {"model": model, "messages": [{"role": "user", "content": "What does str.strip do?"}]}
        reply = post(f"{lora_server.url}/v1/chat/completions", chat | {"max_tokens": 16, "temperature": 0})
        assert reply["model"] == model
        texts.add(reply["choices"][0]["message"]["content"])
    assert len(texts) == 2
    models = json.loads(lora_server.get("/v1/models"))["data"]
    assert [each["id"] for each in models] == ["bros-demo", "one", "org/two"]
