"""What a step truly costs: the device behind a simulated replica, measured or derived from first principles.

The scheduler never sees these numbers. It predicts with a `LatencyModel` fitted to a profile of the hardware, as it
does in the server, so its errors are part of the simulation.
"""

from __future__ import annotations

import math
import random
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Protocol

import msgspec

from bros_router.scheduling.latency_model import LatencyModel
from bros_router.simulation.workload import Targets
from bros_shard.protocol import StepShape


class Hardware(Protocol):
    """One replica's devices with one model on them."""

    @property
    def name(self) -> str:
        """For reports."""
        ...

    @property
    def num_kv_tokens(self) -> int:
        """Tokens that the KV region holds."""
        ...

    @property
    def num_host_tokens(self) -> int:
        """Tokens that the host pool holds."""
        ...

    @property
    def max_length(self) -> int:
        """Most tokens of a sequence."""
        ...

    @property
    def copies_overlap(self) -> bool:
        """Whether copies from and to the host run beside the forward pass."""
        ...

    @property
    def can_interrupt(self) -> bool:
        """Whether a step can be run in the middle of another."""
        ...

    def seconds(self, shape: StepShape) -> float:
        """True duration of a step. With noise, another one each time."""
        ...


# --- from first principles -----------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Transformer:
    """A dense decoder, as far as its cost goes. Weights and KV are 16 bits wide."""

    name: str
    num_layers: int
    hidden_size: int
    num_kv_heads: int
    head_dim: int
    ffn_size: int
    #: Weight matrices of the feed-forward part: 3 where it is gated.
    num_ffn_matrices: int
    vocab_size: int
    max_length: int
    #: Whether the embedding is the output matrix as well. A lookup reads next to nothing, so only memory notices.
    is_tied: bool

    @property
    def num_layer_weights(self) -> int:
        """Weights that every token meets: all layers, without embedding and output matrix."""
        attention = 2 * self.hidden_size**2 + 2 * self.hidden_size * self.num_kv_heads * self.head_dim
        return self.num_layers * (attention + self.num_ffn_matrices * self.hidden_size * self.ffn_size)

    @property
    def num_output_weights(self) -> int:
        """Weights of the output matrix, which only sampled tokens meet."""
        return self.vocab_size * self.hidden_size

    @property
    def weight_bytes(self) -> int:
        """Memory for all weights."""
        num_embeddings = 1 if self.is_tied else 2
        return 2 * (self.num_layer_weights + num_embeddings * self.num_output_weights)

    @property
    def kv_bytes_per_token(self) -> int:
        """Keys and values, all layers."""
        return 2 * 2 * self.num_layers * self.num_kv_heads * self.head_dim


@dataclass(frozen=True, slots=True)
class Device:
    """A GPU by its data sheet."""

    name: str
    memory_bytes: float
    memory_bytes_per_s: float
    #: Dense, 16 bits.
    flop_per_s: float
    #: To and from the host, as one direction sustains it.
    host_bytes_per_s: float
    #: Share of `flop_per_s` that the matrix products of a whole prefill reach.
    flop_efficiency: float


#: Memory, bandwidth and dense BF16 peak are from the vendors' data sheets. The rest are estimates: 25 GB/s of PCIe 4
#: (which carries 32 at most), on an H200 as well, to be on the safe side of PCIe 5; 0.6 of the peak for what the large
#: matrix products reach in serving on an A100; 0.55 on an H200, which puts a prefill of 1,000 tokens of an 8B model at
#: 30 ms.
A100_40G: Final = Device("A100-40G", 40e9, 1.555e12, 312e12, 25e9, 0.6)
A100_80G: Final = Device("A100-80G", 80e9, 2.039e12, 312e12, 25e9, 0.6)
H200: Final = Device("H200", 141e9, 4.8e12, 989e12, 25e9, 0.55)

#: From the models' published configurations.
OPT_13B: Final = Transformer("OPT-13B", 40, 5120, 40, 128, 20480, 2, 50272, 2048, True)
OPT_30B: Final = Transformer("OPT-30B", 48, 7168, 56, 128, 28672, 2, 50272, 2048, True)
LLAMA_3_8B: Final = Transformer("Llama-3-8B", 32, 4096, 8, 128, 14336, 3, 128256, 8192, False)
LLAMA_3_70B: Final = Transformer("Llama-3-70B", 80, 8192, 8, 128, 28672, 3, 128256, 8192, False)

# All estimates:
#: Share of a device's memory that is used at all (vLLM's default) and what activations and the runtime take of that.
_MEMORY_SHARE: Final = 0.9
_ACTIVATION_BYTES: Final = 2e9
#: Share of the memory bandwidth that reading weights, keys and values reaches.
_MEMORY_EFFICIENCY: Final = 0.8
#: Share of the arithmetic peak that attention reaches in prefill.
_ATTENTION_EFFICIENCY: Final = 0.4
#: What a step costs whatever it holds, and an all-reduce of nothing.
_LAUNCH_S: Final = 1.5e-3
_ALL_REDUCE_S: Final = 20e-6
#: Bytes a second that an all-reduce moves between the devices of a group ("bus bandwidth"), by NVLink of an A100.
_LINK_BYTES_PER_S: Final = 230e9
#: Starting a transfer from or to the host.
_COPY_S: Final = 20e-6
#: Host memory for checkpoints, all devices together.
_HOST_POOL_BYTES: Final = 64 * 2**30


class Roofline:
    """Step time of a transformer on a tensor-parallel group, from arithmetic and bytes.

    With `m` rows (tokens computed), `q` of them sampled, over `n` devices:

        linear     max(bytes of weights / bandwidth, 2 * weights * m / arithmetic) / n
        output     max(bytes of the output matrix / bandwidth, 2 * its weights * q / arithmetic) / n
        prefill    4 * layers * hidden * A / arithmetic / n             A: pairs of query and key (`StepShape`)
        decode     KV bytes per token * C / bandwidth / n               C: sum of the contexts
        exchange   2 * layers * (latency + 2 (n - 1) / n * 2 * hidden * m / link),  nothing where n = 1
        step       max(launch + all of these, copied bytes / n / host link)

    The last line is the BROS paper's rule for transfers that overlap the step. Keys that prefill reads again are
    left out: they cost far less than its arithmetic.
    """

    def __init__(self, model: Transformer, device: Device, world_size: int) -> None:
        self.name = f"{model.name} on {world_size} x {device.name}"
        self.copies_overlap = True
        self.can_interrupt = False
        self.max_length = model.max_length
        usable_bytes = world_size * (_MEMORY_SHARE * device.memory_bytes - _ACTIVATION_BYTES) - model.weight_bytes
        self.num_kv_tokens = int(usable_bytes / model.kv_bytes_per_token)
        self.num_host_tokens = _HOST_POOL_BYTES // model.kv_bytes_per_token
        bandwidth = world_size * device.memory_bytes_per_s * _MEMORY_EFFICIENCY
        arithmetic = world_size * device.flop_per_s * device.flop_efficiency
        self._layers_s = 2 * model.num_layer_weights / bandwidth
        self._layers_row_s = 2 * model.num_layer_weights / arithmetic
        self._output_s = 2 * model.num_output_weights / bandwidth
        self._output_row_s = 2 * model.num_output_weights / arithmetic
        attention = world_size * device.flop_per_s * _ATTENTION_EFFICIENCY
        self._pair_s = 4 * model.num_layers * model.hidden_size / attention
        self._context_s = model.kv_bytes_per_token / bandwidth
        num_exchanges = 2 * model.num_layers if world_size > 1 else 0
        self._fixed_s = _LAUNCH_S + num_exchanges * _ALL_REDUCE_S
        volume = 2 * (world_size - 1) / world_size * 2 * model.hidden_size
        self._exchange_row_s = num_exchanges * volume / _LINK_BYTES_PER_S
        self._copy_token_s = model.kv_bytes_per_token / (world_size * device.host_bytes_per_s)

    def seconds(self, shape: StepShape) -> float:
        """Duration of a step. One that computes nothing takes its copies alone."""
        copy_s = _COPY_S + shape.num_copied_tokens * self._copy_token_s if shape.num_copied_tokens else 0.0
        num_rows = shape.num_prefill_tokens + shape.num_decode_sequences
        if num_rows == 0:
            return copy_s
        num_sampled = shape.num_decode_sequences + shape.num_prefill_sequences
        compute_s = (
            self._fixed_s
            + max(self._layers_s, num_rows * self._layers_row_s)
            + max(self._output_s, num_sampled * self._output_row_s)
            + num_rows * self._exchange_row_s
            + shape.prefill_attention * self._pair_s
            + shape.decode_context_tokens * self._context_s
        )
        return max(compute_s, copy_s)


# --- measured --------------------------------------------------------------------------------------------------


class Measurement(msgspec.Struct, frozen=True):
    """A real server's steps and sizes: what the JSON file of a fitted hardware holds."""

    name: str
    num_kv_tokens: int
    num_host_tokens: int
    max_length: int
    #: (shape, seconds) of real steps.
    points: list[tuple[StepShape, float]]
    #: Whether copies from and to the host run beside the forward pass: on CUDA, not on a CPU.
    copies_overlap: bool = False
    #: Whether a step can be run in the middle of another: on a single CPU rank.
    can_interrupt: bool = False


class Fitted:
    """Step time as a `LatencyModel` fits it to measured steps."""

    def __init__(self, measurement: Measurement) -> None:
        """Raises `ValueError` where nothing was measured."""
        self.name = measurement.name
        self.num_kv_tokens = measurement.num_kv_tokens
        self.num_host_tokens = measurement.num_host_tokens
        self.max_length = measurement.max_length
        self.copies_overlap = measurement.copies_overlap
        self.can_interrupt = measurement.can_interrupt
        self._model = LatencyModel(measurement.points, measurement.copies_overlap)
        #: Measured over fitted time of each point, in order: what the fit leaves out.
        self.ratios = [
            seconds / predicted_s
            for shape, seconds in measurement.points
            if seconds > 0 and (predicted_s := self._model.predict_s(shape)) > 0
        ]
        if not self.ratios:
            raise ValueError("it holds no step that took time")

    @classmethod
    def read(cls, path: Path) -> Fitted:
        """Raises `OSError`, `msgspec.MsgspecError` or `ValueError`: the file is missing, no `Measurement`, or empty."""
        return cls(msgspec.json.decode(path.read_bytes(), type=Measurement))

    def seconds(self, shape: StepShape) -> float:
        """Duration of a step, without noise."""
        return self._model.predict_s(shape)


# --- with noise ------------------------------------------------------------------------------------------------


class _Varying:
    """Hardware whose steps take their time multiplied by a factor, another one each time."""

    def __init__(self, hardware: Hardware, seed: int, index: int) -> None:
        """`index`: which of several replicas it belongs to; each has noise of its own."""
        self.name = hardware.name
        self.num_kv_tokens = hardware.num_kv_tokens
        self.num_host_tokens = hardware.num_host_tokens
        self.max_length = hardware.max_length
        self.copies_overlap = hardware.copies_overlap
        self.can_interrupt = hardware.can_interrupt
        self._hardware = hardware
        self._generator = random.Random(f"{seed}/noise/{index}")

    def seconds(self, shape: StepShape) -> float:
        """Another duration each time."""
        return self._factor() * self._hardware.seconds(shape)

    def _factor(self) -> float:
        raise NotImplementedError


class Noisy(_Varying):
    """Hardware whose steps vary by a log-normal factor with mean 1, each on its own."""

    def __init__(self, hardware: Hardware, sigma: float, seed: int, index: int = 0) -> None:
        """`index`: which of several replicas it belongs to; each has noise of its own."""
        super().__init__(hardware, seed, index)
        self._sigma = sigma

    def _factor(self) -> float:
        return self._generator.lognormvariate(-(self._sigma**2) / 2, self._sigma)


#: Steps in a row whose noise is taken over together, about: slow spells of a shared machine last some seconds.
_SPELL: Final = 128


class Resampled(_Varying):
    """Fitted hardware whose steps vary as the measured ones did: by the ratios of measured steps, stretches of them in
    their order, since slow steps come in spells (the stationary bootstrap of Politis and Romano, 1994)."""

    def __init__(self, hardware: Fitted, seed: int, index: int = 0) -> None:
        """`index`: which of several replicas it belongs to; each has noise of its own."""
        super().__init__(hardware, seed, index)
        self._ratios = hardware.ratios
        self._position = 0
        self._num_left = 0

    def _factor(self) -> float:
        if self._num_left <= 0:
            self._position = self._generator.randrange(len(self._ratios))
            self._num_left = math.ceil(self._generator.expovariate(1 / _SPELL))
        self._position = (self._position + 1) % len(self._ratios)
        self._num_left -= 1
        return self._ratios[self._position]


#: SmolLM2-135M in bfloat16 on two cores with AVX-512, as a rank measured it while warming up (the quick grid, C
#: kernels), and the KV region of the live evaluation. What a CPU is like, not what this one will do tomorrow.
SMOLLM2_ON_TWO_CORES: Final = Measurement(
    "SmolLM2-135M on two cores",
    num_kv_tokens=21_872,
    num_host_tokens=21_872,
    max_length=8192,
    points=[
        (StepShape(0, 0, 1, 0.0, 64), 0.0117),
        (StepShape(0, 0, 1, 0.0, 512), 0.0130),
        (StepShape(0, 0, 4, 0.0, 512), 0.0155),
        (StepShape(0, 0, 8, 0.0, 1024), 0.0160),
        (StepShape(0, 0, 16, 0.0, 2048), 0.0221),
        (StepShape(0, 0, 16, 0.0, 8192), 0.0371),
        (StepShape(0, 0, 32, 0.0, 16384), 0.0596),
        (StepShape(0, 0, 64, 0.0, 8192), 0.0738),
        (StepShape(16, 1, 0, 128.0), 0.0151),
        (StepShape(64, 1, 0, 2048.0), 0.0421),
        (StepShape(64, 1, 0, 30720.0), 0.0510),
        (StepShape(64, 1, 16, 2048.0, 4096), 0.0579),
        (StepShape(256, 1, 0, 32768.0), 0.1535),
        (StepShape(512, 1, 0, 131072.0), 0.3339),
        (StepShape(0, 0, 1, 0.0, 64, 1024), 0.0171),
    ],
    can_interrupt=True,
)

#: By name, for command lines: the BROS paper's two, two of today, and a CPU.
HARDWARE: Final[dict[str, Hardware]] = {
    "opt-13b": Roofline(OPT_13B, A100_40G, 2),
    "opt-30b": Roofline(OPT_30B, A100_40G, 4),
    "llama-3-70b": Roofline(LLAMA_3_70B, A100_80G, 8),
    "llama-3-8b": Roofline(LLAMA_3_8B, H200, 1),
    "smollm2-135m": Fitted(SMOLLM2_ON_TWO_CORES),
}

#: Sequences, and past tokens of each, of the profile's decode steps; new tokens and past of its chunks.
_DECODES: Final = tuple((num, past) for num in (1, 4, 16, 48, 128, 256) for past in (63, 511, 1535))
_CHUNKS: Final = tuple((num, past) for num in (16, 64, 256, 512, 1024, 2048) for past in (0, 448, 960))
#: Tokens copied beside a lone decode.
_COPIES: Final = (256, 1024, 4096)


def profile(hardware: Hardware) -> list[tuple[StepShape, float]]:
    """Step times as a warm-up measures them: decodes, chunks, both in one step, copies. Some 50 points.

    What exceeds the hardware's longest sequence or its KV region is left out.
    """
    shapes = []
    decodes = {pair: _decodes(*pair) for pair in _DECODES if _fits(hardware, pair[0], pair[1] + 1)}
    chunks = {pair: StepShape().with_sequence(pair[1], pair[0]) for pair in _CHUNKS if _fits(hardware, 1, sum(pair))}
    shapes += [*decodes.values(), *chunks.values()]
    for num_sequences, past in decodes:
        for num_tokens in (64, 512):
            if num_sequences >= 16 and past < 1024 and _fits(hardware, 1, num_tokens + 1):
                shapes.append(decodes[num_sequences, past].with_sequence(0, num_tokens))
    shapes += [_decodes(1, 63).with_copies(num) for num in _COPIES if num <= hardware.num_host_tokens]
    return [(shape, hardware.seconds(shape)) for shape in shapes]


def _decodes(num_sequences: int, num_past_tokens: int) -> StepShape:
    return StepShape(num_decode_sequences=num_sequences, decode_context_tokens=num_sequences * (num_past_tokens + 1))


def _fits(hardware: Hardware, num_sequences: int, length: int) -> bool:
    return length < hardware.max_length and num_sequences * length <= hardware.num_kv_tokens


def scaled_targets(hardware: Hardware, scale: float, max_batch_tokens: int) -> Targets:
    """`scale` times what the hardware alone takes: the prompt, and a step that decodes 32 sequences of 512 tokens.

    Args:
        max_batch_tokens: longer prompts take several steps.
    """
    tpot_s = scale * hardware.seconds(_decodes(32, 511))

    def targets(num_prompt_tokens: int) -> tuple[float, float]:
        seconds = 0.0
        for past in range(0, num_prompt_tokens, max_batch_tokens):
            chunk = min(max_batch_tokens, num_prompt_tokens - past)
            seconds += hardware.seconds(StepShape().with_sequence(past, chunk))
        return scale * seconds, tpot_s

    return targets
