"""A server with int8 weights: the C kernels and PyTorch's answer alike."""

import json
import urllib.request

import pytest

from bros_kernels.native import NativeLibraryError, load_library

PROMPTS = ("The module defines", "def read_lines(path):\n", "Return a list of the", "class Queue:\n")


def greedy_ids(url: str, prompt: str) -> list[int]:
    parameters = {"max_new_tokens": 24, "details": True, "ignore_eos": True}
    body = json.dumps({"inputs": prompt, "parameters": parameters}).encode()
    request = urllib.request.Request(f"{url}/generate", body, {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=60) as reply:
        return [token["id"] for token in json.load(reply)["details"]["tokens"]]


def test_int8_answers_the_same_with_all_kernels(launch):
    """In float32, so that nothing but the rounding to int8, which is exact, could tell them apart."""
    try:
        load_library(1)
    except NativeLibraryError as error:
        pytest.skip(str(error))
    flags = ("--quantize", "int8", "--dtype", "float32", "--kv-cache-memory", "64MiB")
    servers = [launch(*flags, "--kernels", kernels) for kernels in ("cpu", "torch")]
    urls = [server.wait_until_ready().url for server in servers]
    of_cpu, of_torch = ([greedy_ids(url, prompt) for prompt in PROMPTS] for url in urls)
    assert of_cpu == of_torch
    for server in servers:
        server.process.kill()
