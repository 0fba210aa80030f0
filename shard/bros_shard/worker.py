"""One rank's model, memory and sampler, and the execution of one step's plan. It decides nothing."""

from __future__ import annotations

import hashlib
import math
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final, TypeAlias

import structlog
import torch
from torch import Tensor

from bros_kernels.kernels import select_kernels
from bros_kernels.low_rank import AdapterRouting
from bros_shard.batch import StepBatch, build_batch, build_sampling_batch
from bros_shard.grammar_compiler import GrammarCompiler
from bros_shard.guidance import GuidedSequences, TokenMasks
from bros_shard.host_pool import staging_bytes
from bros_shard.kv_cache import KVCache, block_bytes
from bros_shard.memory import InsufficientMemoryError, available_bytes, host_pool_bytes
from bros_shard.model_config import ConfigFields
from bros_shard.models.model import LayerKV, ModelLimits
from bros_shard.models.registry import DTYPES, load_model, read_dtype
from bros_shard.models.rotary import RopeOverride
from bros_shard.options import ShardOptions
from bros_shard.parallel import ParallelGroup
from bros_shard.profile_cache import ProfileCache, processor_name
from bros_shard.prompt_logprobs import prompt_logprobs
from bros_shard.protocol import PromptLogprobs, SampledToken, SequenceResult, StepPlan, StepShape
from bros_shard.rehearsal import GRID_VERSION, Rehearsal, Scene, largest_scenes, profiled_scenes
from bros_shard.sampling.sampler import SampledTokens, Sampler
from bros_shard.sequences import SequenceTable, TokenPool
from bros_shard.speculation import count_new_tokens, guess

#: Called with (phase, number done, number in total); the phase is "loading" (bytes) or "warming" (steps).
OnProgress: TypeAlias = Callable[[str, int, int], None]

#: What a client may be told of a sequence that the model had no answer for.
NO_TOKEN_FAULT: Final = "the model produced no valid token"
#: Warming up begins no further scene after this long: measuring a grid, or playing the quick one once.
_MEASURING_BUDGET_S: Final = {"quick": 3.5, "full": 26.0}
_PLAYING_BUDGET_S: Final = 2.0
#: Known step times are measured anew where steps take this many times as long, or as short.
_LARGEST_CHANGE: Final = 3.0

log = structlog.get_logger()


class DeviceError(Exception):
    """The device that a rank was told to use is not there."""


@dataclass(frozen=True)
class StepOutput:
    """What a step gave its sequences, in the plan's order. Empty on ranks other than 0."""

    sequences: list[SequenceResult] = field(default_factory=list)
    #: On a GPU, time spent issuing the forward pass; what it has left to run is waited for while sampling.
    forward_s: float = 0.0
    sampling_s: float = 0.0
    #: How long other steps ran in the middle of this one; not in the other two.
    interrupted_s: float = 0.0
    prompts: list[PromptLogprobs] = field(default_factory=list)
    #: How long these took; not in the others.
    prompts_s: float = 0.0


class Worker:
    """Everything one rank holds. All ranks must be given the same plans, in the same order."""

    def __init__(self, options: ShardOptions, on_progress: OnProgress = lambda phase, done, total: None) -> None:
        """Load this rank's slice of the model and allocate its KV region.

        Raises:
            UnsupportedModelError, CheckpointError: the model, or an adapter, cannot be served.
            UnknownKernelsError, DeviceError: `options` ask for what this machine does not have.
            InsufficientMemoryError: there is no room for a single block.
        """
        self.options = options
        self._on_progress = on_progress
        folder = Path(options.model_path)
        config = ConfigFields.load(folder)
        self._device = _device(options)
        self._dtype = _dtype(options, config, self._device)
        num_cores = len(os.sched_getaffinity(0))
        self._num_threads = options.num_threads or max(1, num_cores // options.world_size)
        self._kernels = select_kernels(
            options.kernels, self._device, self._dtype, self._num_threads, has_int8_weights=options.quantize == "int8"
        )
        self._parallel = ParallelGroup(options.rank, options.world_size, options.rendezvous, self._device.type)
        self._routing = AdapterRouting()
        self._adapters = options.adapter_folders
        self._model = load_model(
            folder,
            config,
            self._parallel,
            self._device,
            self._dtype,
            _limits(options),
            self._kernels,
            lambda done, total: on_progress("loading", done, total),
            self._adapters,
            self._routing,
        )
        self._sampler = Sampler(self._kernels)
        self._guided = _guided_sequences(options, self.vocab_size)
        self.block_bytes = block_bytes(self._model.kv_shape, options.block_size, self._dtype)
        num_blocks = self._choose_num_blocks()
        self._install_region(num_blocks, self._choose_num_host_blocks(num_blocks))

    @property
    def vocab_size(self) -> int:
        """Tokens the model knows."""
        return self._model.vocab_size

    @property
    def max_length(self) -> int:
        """Most tokens a sequence may hold."""
        return self._model.max_length

    @property
    def num_blocks(self) -> int:
        """Blocks of the KV region; the same on all ranks."""
        return self.cache.num_blocks

    @property
    def dtype_name(self) -> str:
        """The dtype of weights and KV region, as config.json would write it."""
        return str(self._dtype).removeprefix("torch.")

    @property
    def device_name(self) -> str:
        """`cpu`, or the GPU's product name in the form of TGI's `x-compute-type`."""
        if self._device.type == "cpu":
            return "cpu"
        return torch.cuda.get_device_name(self._device).replace(" ", "-").lower()

    def warm_up(self) -> list[tuple[StepShape, float]]:
        """Run made-up steps, so that the first real one is not the slowest.

        Returns:
            What steps take, in seconds: measured now, or, where that is known, when this machine last did.
        """
        grid = self.options.profile_grid
        cache = ProfileCache(self._profile_key())
        # Rank 0 decides for all: they must run the same steps.
        is_deciding = self.options.rank == 0
        points = cache.load(grid) if is_deciding else []
        if self._all_agree(not is_deciding or bool(points)):
            played = self._rehearse(self._scenes("quick"), _PLAYING_BUDGET_S, Rehearsal.play)
            if self._all_agree(not is_deciding or _are_alike(points, played)):
                return points
        scenes = self._scenes(grid)
        points = self._rehearse(scenes, _MEASURING_BUDGET_S[grid], Rehearsal.measure)
        if is_deciding and 2 * len(points) >= len(scenes):  # else the machine was too busy, or the model is too large
            cache.store(grid, points)
        return points

    def _scenes(self, grid: str) -> list[Scene]:
        num_host_slots = self.cache.num_host_blocks * self.cache.block_size
        return profiled_scenes(grid, self.max_length, self.options.max_batch_tokens, num_host_slots)

    def _rehearse(
        self, scenes: list[Scene], budget_s: float, run: Callable[[Rehearsal, Scene], float]
    ) -> list[tuple[StepShape, float]]:
        """Run scenes until the budget is spent on any rank. Returns their shapes and seconds."""
        rehearsal = self._rehearsal()
        points = []
        started_s = time.monotonic()
        for index, scene in enumerate(scenes):
            if not self._all_agree(time.monotonic() - started_s < budget_s):
                break
            self._on_progress("warming", index, len(scenes))
            self.cache.touch(scene.num_blocks(self.cache.block_size))
            points.append((scene.shape(), run(rehearsal, scene)))
        self._on_progress("warming", len(scenes), len(scenes))
        return points

    def _all_agree(self, is_true: bool) -> bool:
        """Whether it is true on every rank."""
        return bool(self._parallel.minimum(is_true, self._device))

    def _profile_key(self) -> dict[str, str]:
        """All that a step's time depends on, and which scenes are measured. Weights are not: any would do."""
        options = self.options
        return {
            "grid": str(GRID_VERSION),
            "config": hashlib.sha256((Path(options.model_path) / "config.json").read_bytes()).hexdigest(),
            "dtype": self.dtype_name,
            "quantize": options.quantize,
            "device": self.device_name,
            "processor": processor_name(),
            "threads": str(self._num_threads),
            "torch": str(torch.__version__),
            "kernels": self._kernels.name,
            "world_size": str(options.world_size),
            "block_size": str(options.block_size),
            "max_batch_tokens": str(options.max_batch_tokens),
            "max_length": str(self.max_length),
            "has_host_pool": str(self.cache.num_host_blocks > 0),
        }

    @property
    def can_interrupt(self) -> bool:
        """Whether a step may run between two layers of another: a GPU is handed all layers at once, and several ranks
        would have to agree on the layer."""
        return self._device.type == "cpu" and self.options.world_size == 1

    @torch.inference_mode()
    def execute(self, plan: StepPlan, between_layers: Callable[[], float] = lambda: 0.0) -> StepOutput:
        """Run one step.

        Args:
            between_layers: called before each layer; it may execute other plans, as long as they touch no slot and no
                sequence of this one, and returns the seconds that it took with them.

        Raises:
            PlanError: the plan contradicts what this rank knows.
            RuntimeError: the device or a peer failed.
        """
        runs = self._sequences.apply(plan)
        self._guided.apply(plan)
        self._copy(plan)
        if not runs:
            return StepOutput()
        started_s = time.monotonic()
        guess(runs, self._pool)
        batch = build_batch(runs, self._pool, self.cache.block_size, self._device)
        masks = self._guided.begin_masks(
            [run.sequence.sequence_id for run in batch.sampled for _ in range(run.num_rows)]
        )
        attention = self._kernels.attention(batch.attention)
        layers = _Layers(self.cache.layers, between_layers)
        with self._routing.routed(batch.adapted_rows):
            hidden = self._model.forward(batch.input_ids, batch.positions, layers, attention)
        logits = None
        if batch.sampled:
            logits = self._model.logits(hidden.index_select(0, batch.sampled_tokens))
        forward_done_s = time.monotonic()
        sampled = self._sample(batch, logits, masks)
        results = self._results(plan, batch, sampled) if self.options.rank == 0 else []
        sampling_done_s = time.monotonic()
        prompts = prompt_logprobs(batch.prompt_chunks, hidden, self._model, self._pool)
        return StepOutput(
            results,
            forward_s=forward_done_s - started_s - layers.interrupted_s,
            sampling_s=sampling_done_s - forward_done_s,
            interrupted_s=layers.interrupted_s,
            prompts=prompts,
            prompts_s=time.monotonic() - sampling_done_s,
        )

    def _copy(self, plan: StepPlan) -> None:
        """Host copies out, tail moves, host copies in: in this order, since one may free the slots of the next."""
        self._sequences.check_copies(plan.tail_moves, [*plan.copies_out, *plan.copies_in], self.cache.num_host_blocks)
        self.cache.host_pool.copy_out(plan.copies_out)
        self.cache.move_tails(plan.tail_moves)
        self.cache.host_pool.copy_in(plan.copies_in)

    def _sample(self, batch: StepBatch, logits: Tensor | None, masks: TokenMasks | None) -> SampledTokens | None:
        """Choose on rank 0 (which has logits), and append the tokens to their sequences on every rank."""
        if not batch.sampled:
            return None
        sampled = None
        if logits is not None:
            if masks is not None:
                masks.apply(logits)
            sampled = self._sampler.sample(logits, build_sampling_batch(batch, self._pool))
            token_ids = sampled.token_ids
        else:
            token_ids = torch.empty(len(batch.sampled_tokens), dtype=torch.int64, device=self._device)
        self._parallel.broadcast(token_ids)
        # What follows a guess that was wrong is written too, and read by nobody.
        self._pool.write(batch.sampled_rows, batch.sampled_columns, token_ids)
        for run, num_new_tokens in zip(batch.sampled, count_new_tokens(batch.sampled, token_ids), strict=True):
            run.sequence.num_known_tokens += num_new_tokens
        return sampled

    def _results(self, plan: StepPlan, batch: StepBatch, sampled: SampledTokens | None) -> list[SequenceResult]:
        results = {step.sequence_id: SequenceResult(step.sequence_id) for step in plan.sequences}
        if sampled is not None:
            tokens = iter(_tokens(sampled))
            for run in batch.sampled:
                sequence = run.sequence
                of_run = [next(tokens) for _ in range(run.num_rows)]
                result = _result(sequence.sequence_id, of_run[: sequence.num_known_tokens - run.stop], len(run.guesses))
                for token in result.tokens:
                    self._guided.advance(sequence.sequence_id, token.token_id)
                results[sequence.sequence_id] = result
        return list(results.values())

    def _install_region(self, num_blocks: int, num_host_blocks: int) -> None:
        """Allocate a region and its host pool, and forget all sequences."""
        block_size = self.options.block_size
        self.cache = KVCache(self._model.kv_shape, num_blocks, block_size, num_host_blocks, self._dtype, self._device)
        self._pool = TokenPool(self._device)
        self._sequences = SequenceTable(
            self._pool, self.vocab_size, self.max_length, num_blocks, block_size, len(self._adapters)
        )

    def _choose_num_blocks(self) -> int:
        options = self.options
        if options.kv_memory_bytes:
            num_bytes = options.kv_memory_bytes
        elif self._device.type == "cpu":
            num_bytes = available_bytes() // 4 // options.world_size
        else:
            num_bytes = self._measure_gpu_room()
        num_blocks = num_bytes // self.block_bytes
        if options.kv_slots_limit:
            num_blocks = min(num_blocks, options.kv_slots_limit // options.block_size)
        num_blocks = self._parallel.minimum(num_blocks, self._device)
        if num_blocks < 1:
            raise InsufficientMemoryError(
                f"{num_bytes} bytes hold no KV block of {options.block_size} slots ({self.block_bytes} bytes)"
            )
        return num_blocks

    def _choose_num_host_blocks(self, num_blocks: int) -> int:
        """Blocks of the host pool; the same on all ranks."""
        options = self.options
        num_bytes = options.host_memory_bytes
        if num_bytes == 0:
            region_bytes = num_blocks * self.block_bytes
            # On a CPU the regions of all ranks are promised, and taken as they are written.
            promised_bytes = region_bytes * options.world_size if self._device.type == "cpu" else 0
            num_bytes = host_pool_bytes(region_bytes, promised_bytes, options.world_size)
        return self._parallel.minimum(max(0, num_bytes) // self.block_bytes, self._device)

    def _measure_gpu_room(self) -> int:
        """Bytes of this GPU that a region may take: what is free beside the scratch memory of the largest steps."""
        self._install_region(-(-self.options.max_batch_tokens // self.options.block_size), num_host_blocks=0)
        rehearsal = self._rehearsal()
        torch.cuda.reset_peak_memory_stats(self._device)
        held_bytes = torch.cuda.memory_allocated(self._device)
        for scene in largest_scenes(self.options.max_batch_tokens, self.max_length):
            rehearsal.measure(scene)
        scratch_bytes = torch.cuda.max_memory_allocated(self._device) - held_bytes + staging_bytes(self.block_bytes)
        del self.cache
        torch.cuda.empty_cache()
        free_bytes, total_bytes = torch.cuda.mem_get_info(self._device)
        not_ours = int((1.0 - self.options.gpu_memory_fraction) * total_bytes)
        # The allocator's fragments, and libraries that allocate on their own: kept free as headroom.
        return int(free_bytes) - scratch_bytes - not_ours - int(total_bytes) // 50

    def _rehearsal(self) -> Rehearsal:
        return Rehearsal(self.execute, self.cache.num_blocks, self.cache.block_size)


class _Layers:
    """The region of each layer, and what happens before each."""

    def __init__(self, layers: list[LayerKV], between_layers: Callable[[], float]) -> None:
        self._layers = layers
        self._between_layers = between_layers
        self.interrupted_s = 0.0

    def __iter__(self) -> Iterator[LayerKV]:
        for layer in self._layers:
            self.interrupted_s += self._between_layers()
            yield layer


def _are_alike(known: list[tuple[StepShape, float]], played: list[tuple[StepShape, float]]) -> bool:
    """Whether steps still take about as long as what is known says: the machine may have been busy, or changed."""
    known_s = dict(known)
    ratios = sorted(seconds / known_s[shape] for shape, seconds in played if known_s.get(shape))
    return bool(ratios) and 1 / _LARGEST_CHANGE <= ratios[len(ratios) // 2] <= _LARGEST_CHANGE


def _guided_sequences(options: ShardOptions, vocab_size: int) -> GuidedSequences:
    """Those of the rank that samples; others guide nothing."""
    if options.rank > 0 or not options.tokenizer_path:
        return GuidedSequences(None)
    eos_token_ids = [int(token_id) for token_id in options.eos_token_ids.split(",")]
    return GuidedSequences(lambda: GrammarCompiler(Path(options.tokenizer_path), vocab_size, eos_token_ids))


def _tokens(sampled: SampledTokens) -> list[SampledToken | None]:
    """One for each row; `None` where there was none to choose."""
    columns = sampled.token_ids.tolist(), sampled.logprobs.tolist(), sampled.is_valid.tolist()
    return [
        SampledToken(token_id, logprob if math.isfinite(logprob) else None, sampled.top_tokens.get(row, []))
        if is_valid
        else None
        for row, (token_id, logprob, is_valid) in enumerate(zip(*columns, strict=True))
    ]


def _result(sequence_id: int, tokens: list[SampledToken | None], num_guesses: int) -> SequenceResult:
    chosen = [token for token in tokens if token is not None]
    if len(chosen) < len(tokens):
        return SequenceResult(sequence_id, fault=NO_TOKEN_FAULT)
    return SequenceResult(sequence_id, chosen, num_speculative_tokens=num_guesses)


def _device(options: ShardOptions) -> torch.device:
    kind = options.device
    if kind == "auto":
        kind = "cuda" if torch.cuda.is_available() else "cpu"
    if kind == "cpu":
        return torch.device("cpu")
    if options.rank >= torch.cuda.device_count():
        raise DeviceError(f"rank {options.rank} needs a GPU of its own, and there are {torch.cuda.device_count()}")
    device = torch.device("cuda", options.rank)
    torch.cuda.set_device(device)
    return device


def _dtype(options: ShardOptions, config: ConfigFields, device: torch.device) -> torch.dtype:
    if options.dtype != "auto":
        return DTYPES[options.dtype]
    dtype = read_dtype(config)
    if dtype == torch.float16 and device.type == "cpu":
        log.info("serving a float16 model in bfloat16: float16 is slow on this processor")
        return torch.bfloat16
    return dtype


def _limits(options: ShardOptions) -> ModelLimits:
    override = RopeOverride(options.rope_scaling, options.rope_factor) if options.rope_scaling else None
    return ModelLimits(options.max_length, override)
