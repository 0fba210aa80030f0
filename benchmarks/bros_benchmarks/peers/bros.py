"""This server, as a user would start it."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from bros_benchmarks.load import Load, send_all
from bros_benchmarks.peers.engine import EngineError, SendAll
from bros_benchmarks.server_under_test import ServerUnderTest


@dataclass(frozen=True, slots=True)
class Bros:
    """TGI's dialect over HTTP, streamed; prefix cache off."""

    weights: str = "bf16"

    @property
    def name(self) -> str:
        return "bros" if self.weights == "bf16" else f"bros, {self.weights}"

    def prepare(self, model: Path) -> None:
        """Nothing: it runs where this benchmark runs."""

    @contextmanager
    def start(self, model: Path, num_threads: int, log: Path) -> Iterator[SendAll]:
        flags = ["--disable-prefix-caching"] + (["--quantize", self.weights] if self.weights != "bf16" else [])
        try:
            server = ServerUnderTest(model, num_threads, log, *flags)
        except RuntimeError as error:
            raise EngineError(str(error)) from None

        def send(prompts: list[list[int]], num_new_tokens: int) -> Load:
            return asyncio.run(send_all(server.url, prompts, num_new_tokens))

        with server:
            yield send
