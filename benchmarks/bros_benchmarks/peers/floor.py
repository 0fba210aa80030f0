"""What this machine could do at best with a model of this shape, from what it was measured to do at best.

`python -m bros_benchmarks.peers.floor THREADS` measures memory and arithmetic, and prints them as JSON: in a process of
its own, so that no thread of it is left while engines run.
"""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import asdict, dataclass
from typing import Final

import torch

from bros_benchmarks.checkpoint import Shape
from bros_benchmarks.operations import measure, read_bandwidth
from bros_kernels.kernels import select_kernels

_NUM_ROUNDS: Final = 15
#: A product whose operands lie in a core's L2 cache: (rows, in_features, out_features), repeated.
_PRODUCT: Final = (240, 576, 576)
_NUM_REPEATS: Final = 100
_BYTES_OF_A_NUMBER: Final = 2


@dataclass(frozen=True, slots=True)
class Machine:
    """Bytes read a second, and operations in bfloat16 a second."""

    bandwidth: float
    peak: float


@dataclass(frozen=True, slots=True)
class Floor:
    """The shortest time that a load can take: nothing waits, and every step reads all weights once or multiplies,
    whichever takes longer, and then reads the keys and values."""

    shape: Shape
    machine: Machine

    @property
    def _head_dim(self) -> int:
        return self.shape.hidden_size // self.shape.num_heads

    @property
    def _num_layer_weights(self) -> int:
        kv_size = self.shape.num_kv_heads * self._head_dim
        attention = 2 * self.shape.hidden_size * (self.shape.hidden_size + kv_size)
        return self.shape.num_layers * (attention + 3 * self.shape.hidden_size * self.shape.intermediate_size)

    @property
    def _num_head_weights(self) -> int:
        return self.shape.hidden_size * self.shape.vocab_size

    def prefill_s(self, num_tokens: int) -> float:
        """Seconds of one prompt, with the logits of its last token. Attention counts the keys that a token may see."""
        products = 2 * (num_tokens * self._num_layer_weights + self._num_head_weights)
        # Scores and their sums, two operations each a key, and half of the keys on average.
        attention = 4 * self.shape.num_layers * self.shape.hidden_size * num_tokens * (num_tokens + 1) / 2
        return (products + attention) / self.machine.peak

    def step_s(self, num_sequences: int, context: float) -> float:
        """Seconds of one decode of each sequence, with `context` tokens on average."""
        num_weights = self._num_layer_weights + self._num_head_weights
        reading_s = _BYTES_OF_A_NUMBER * num_weights / self.machine.bandwidth
        multiplying_s = 2 * num_weights * num_sequences / self.machine.peak
        kv_bytes = 2 * self.shape.num_layers * self.shape.num_kv_heads * self._head_dim * _BYTES_OF_A_NUMBER
        return max(reading_s, multiplying_s) + num_sequences * context * kv_bytes / self.machine.bandwidth

    def tokens_per_s(self, num_clients: int, num_prompt_tokens: int, num_new_tokens: int) -> float:
        """Output tokens a second, prefill included, where all clients start at once. A prefill brings the first."""
        steps_s = sum(self.step_s(num_clients, num_prompt_tokens + number) for number in range(1, num_new_tokens))
        return num_clients * num_new_tokens / (num_clients * self.prefill_s(num_prompt_tokens) + steps_s)


def measure_machine(num_threads: int) -> Machine:
    """Measure in a process of its own."""
    command = [sys.executable, "-m", "bros_benchmarks.peers.floor", str(num_threads)]
    ended = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    return Machine(**json.loads(ended.stdout))


def _peak(num_threads: int) -> float:
    num_rows, num_inputs, num_outputs = _PRODUCT
    kernels = select_kernels("auto", torch.device("cpu"), torch.bfloat16, num_threads)
    linear = kernels.linear(torch.randn(num_outputs, num_inputs).bfloat16())
    x = torch.randn(num_rows, num_inputs).bfloat16()

    def run() -> None:
        for _ in range(_NUM_REPEATS):
            linear(x)

    seconds = measure({"products": run}, _NUM_ROUNDS)["products"]
    return 2 * num_rows * num_inputs * num_outputs * _NUM_REPEATS / seconds


def main() -> None:
    """Measure, and print."""
    num_threads = int(sys.argv[1])
    bandwidth = read_bandwidth(_NUM_ROUNDS, num_threads)
    print(json.dumps(asdict(Machine(bandwidth, _peak(num_threads)))))


if __name__ == "__main__":
    main()
