"""OpenVINO GenAI's continuous batching, in a process of its own without a server."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import msgspec

from bros_benchmarks.load import Load, Timeline
from bros_benchmarks.peers.engine import EngineError, SendAll
from bros_benchmarks.peers.environment import Environment, bare_environment
from bros_benchmarks.peers.server_process import process

#: The exporter's names. Products are in bf16 with either: the precision of the weights in the file is another matter.
_WEIGHT_FORMATS: Final = {"bf16": "fp16", "int8": "int8"}
#: Not imported here: it needs the peer's environment.
_PROGRAM: Final = Path(__file__).with_name("openvino_process.py")


@dataclass(frozen=True, slots=True)
class OpenVino:
    """No HTTP, no text: less to do than the servers have."""

    folder: Path
    weights: str

    @property
    def name(self) -> str:
        return f"OpenVINO GenAI, {self.weights}"

    @property
    def _runtime(self) -> Environment:
        return Environment(self.folder / "openvino", requirements=(("openvino-genai==2026.4.1.0", "numpy"),))

    @property
    def _exported(self) -> Path:
        return self.folder / f"openvino-{self.weights}"

    def prepare(self, model: Path) -> None:
        self._runtime.install()
        # The exporter wants another transformers than the rest does.
        exporter = Environment(
            self.folder / "openvino-export",
            requirements=(("torch==2.13.0",), ("optimum-intel==2.2.0", "nncf==3.4.0", "transformers==5.5.4")),
            unwanted=("torchvision",),
        )
        exporter.install()
        if self._exported.exists():
            return
        partial = self._exported.with_suffix(".partial")
        shutil.rmtree(partial, ignore_errors=True)
        arguments = ("--task", "text-generation-with-past", "--weight-format", _WEIGHT_FORMATS[self.weights])
        exporter.run("optimum-cli", "export", "openvino", "-m", str(model.absolute()), *arguments, str(partial))
        partial.rename(self._exported)

    @contextmanager
    def start(self, model: Path, num_threads: int, log: Path) -> Iterator[SendAll]:
        # Isolated: the program's own folder would hide OpenVINO behind this module.
        command = [self._runtime.program("python"), "-I", str(_PROGRAM), str(self._exported), str(num_threads)]
        with process(command, bare_environment(), log, talks=True) as child:
            assert child.stdin is not None and child.stdout is not None
            talk_to, listen_to = child.stdin, child.stdout

            def hear() -> Any:
                line = listen_to.readline()
                if not line:
                    raise EngineError(f"it ended: {log.read_text().strip()[-500:]}")
                return msgspec.json.decode(line)

            def send(prompts: list[list[int]], num_new_tokens: int) -> Load:
                talk_to.write(msgspec.json.encode([prompts, num_new_tokens]).decode() + "\n")
                talk_to.flush()
                sent_s, token_s, seconds = hear()
                if any(len(times) != num_new_tokens for times in token_s):
                    raise EngineError(f"{min(map(len, token_s))} to {max(map(len, token_s))} tokens came")
                return Load([Timeline(sent_s, times) for times in token_s], seconds)

            hear()  # that it is ready
            yield send
