"""The server's configuration: frozen, each field with its unit and its reason.

A field made by `flag` is also a flag of the command line and a variable of the environment; `cli` generates both. The
names, defaults and meanings are those of TGI's launcher unless `is_ours`.
"""

from __future__ import annotations

import re
import tempfile
from dataclasses import dataclass, field, fields, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Final

from bros_router.lora_adapters import AdapterSource, parse_adapters
from bros_shard.protocol import MAX_SPECULATIVE_TOKENS, MAX_TOP_TOKENS

#: Tokens of prompts whose log-probabilities, with those of the likeliest others, a frame from the ranks has room for.
_MOST_TOLD_TOKENS: Final = 100_000
#: Of a route: what needs no escape, and means nothing to the router of requests.
_PATH: Final = re.compile(r"/[\w.~:/-]*", re.ASCII)


class ConfigError(ValueError):
    """Values that contradict each other. The message is one line for the operator."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Flag:
    """How a value is given on the command line and in the environment."""

    help: str
    #: Without dashes in front; empty: the field's name.
    name: str = ""
    #: One letter.
    short: str = ""
    choices: tuple[str, ...] = ()
    minimum: float | None = None
    maximum: float | None = None
    #: A size: `2GiB`, `500MB` or a plain number of bytes.
    is_bytes: bool = False
    #: Not one of TGI's: the environment variable is prefixed, to meet nobody else's.
    is_ours: bool = False
    has_variable: bool = True
    #: What `--help` shows where the default is computed.
    default_text: str = ""

    @property
    def option(self) -> str:
        """`--max-best-of`"""
        return f"--{self.name.replace('_', '-')}"

    @property
    def variable(self) -> str:
        """`MAX_BEST_OF`; empty where the environment cannot set it."""
        if not self.has_variable:
            return ""
        return ("BROS_" if self.is_ours else "") + self.name.upper().replace("-", "_")


def flag(default: Any, help: str, **how: Any) -> Any:
    """A dataclass field that is also a flag; `how` are fields of `Flag`."""
    return field(default=default, metadata={"flag": Flag(help=help, **how)})


def flags_of(config_class: type) -> dict[str, Flag]:
    """The flags of a configuration class by field name, each with its own name filled in."""
    flags = {item.name: item.metadata["flag"] for item in fields(config_class) if "flag" in item.metadata}
    return {name: spec if spec.name else replace(spec, name=name) for name, spec in flags.items()}


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """Which model is served, and how its own configuration is overridden."""

    model_id: str | None = flag(
        None, "Name of a model on the hub, or a local folder.", default_text="the bundled demo model"
    )
    revision: str | None = flag(None, "Branch, tag or commit of the model on the hub.", default_text="main")
    dtype: str = flag(
        "auto",
        "Number format of weights and KV cache (float32 and auto are ours).",
        choices=("auto", "float16", "bfloat16", "float32"),
        default_text="as the checkpoint says",
    )
    quantize: str | None = flag(
        None,
        "int8: weights, and inputs of their products, have 8 bits, on a CPU (ours; TGI's methods are refused).",
        default_text="as --dtype says",
    )
    tokenizer_config_path: Path | None = flag(
        None, "File that replaces the model's tokenizer_config.json (chat template)."
    )
    rope_scaling: str | None = flag(None, "Rotary scaling that overrides the model's.", choices=("linear", "dynamic"))
    rope_factor: float | None = flag(None, "Factor of the rotary scaling; alone, it means linear.", minimum=1.0)
    lora_adapters: str | None = flag(
        None, "LoRA adapters that requests may name, separated by commas: id, id@revision or id=/path."
    )

    @cached_property
    def adapters(self) -> tuple[AdapterSource, ...]:
        """What `lora_adapters` says."""
        try:
            return parse_adapters(self.lora_adapters or "")
        except ValueError as error:
            raise ConfigError(f"--lora-adapters: {error}") from None

    def __post_init__(self) -> None:
        """Raises `ConfigError` for a method of TGI's that is not here, and for what is no list of adapters."""
        _ = self.adapters
        if self.quantize not in (None, "", "int8"):
            raise ConfigError(
                "--quantize is refused. Quantised checkpoints are not supported yet: serve the original model, with"
                " --quantize int8 or --dtype bfloat16 to save memory."
            )


@dataclass(frozen=True, kw_only=True)
class HubConfig:
    """How models are fetched."""

    cache_dir: Path | None = flag(
        None,
        "Folder of the hub's cache.",
        name="huggingface-hub-cache",
        default_text="$HF_HOME/hub",
    )
    #: Access token; shown nowhere.
    token: str | None = field(default=None, repr=False)
    #: Use the cache alone.
    is_offline: bool = False
    #: Address of the hub; `None`: the public one.
    endpoint: str | None = None


@dataclass(frozen=True, kw_only=True)
class ApiConfig:
    """What the HTTP side may accept."""

    #: Real-time requests alone: a batch dump never makes a chat answer 429.
    max_concurrent_requests: int = flag(128, "Real-time requests queued or running; more are answered 429.", minimum=1)
    #: Many times what a step holds: clients may leave a whole batch in the queue, where the scheduler sees it.
    max_concurrent_be_requests: int = flag(
        4096, "Best-effort requests queued or running; more are answered 429.", minimum=1, is_ours=True
    )
    default_class: str = flag(
        "rt",
        "Class of requests that name none: rt (real-time) or be (best-effort).",
        choices=("rt", "be"),
        is_ours=True,
    )
    slo_ttft_ms: float | None = flag(
        None,
        "Target of real-time requests that name none: milliseconds to the first token.",
        minimum=0.001,
        is_ours=True,
    )
    slo_tpot_ms: float | None = flag(
        None,
        "Target of real-time requests that name none: milliseconds a token after the first.",
        minimum=0.001,
        is_ours=True,
    )
    max_best_of: int = flag(2, "Largest best_of.", minimum=1)
    max_stop_sequences: int = flag(4, "Most stop sequences of a request.", minimum=0)
    max_top_n_tokens: int = flag(5, "Largest top_n_tokens.", minimum=0, maximum=MAX_TOP_TOKENS)
    enable_prefill_logprobs: bool = flag(
        False, "Tell the log-probabilities of prompts to those who ask; steps with such prompts take longer."
    )
    watermark_gamma: float = flag(0.5, "Share of green tokens.", minimum=0.001, maximum=1.0)
    watermark_delta: float = flag(2.0, "Bias of green tokens.", minimum=-100.0, maximum=100.0)
    disable_grammar_support: bool = flag(False, "Refuse grammars, formats of replies, and tools.")
    max_client_batch_size: int = flag(4, "Most prompts of a completions request, and most choices of each.", minimum=1)
    validation_workers: int = flag(2, "Threads that tokenise and validate.", minimum=1)
    payload_limit: int = flag(2_000_000, "Largest request body, in bytes.", minimum=1)
    api_key: str | None = field(
        default=None,
        repr=False,
        metadata={"flag": Flag(help="Key that clients must send as `Authorization: Bearer KEY`.")},
    )
    api_key_scope: str = flag(
        "tgi",
        "What the key guards: the routes that TGI guards, or all but health checks.",
        choices=("tgi", "all"),
        is_ours=True,
    )
    cors_allow_origin: tuple[str, ...] = flag((), "Origin allowed by CORS; repeatable.", default_text="any")
    strict_tgi: bool = flag(
        False,
        "Under /v1, answer with TGI's very bytes where they are not what OpenAI's clients expect.",
        is_ours=True,
    )
    kserve: bool = flag(False, "Serve KServe's routes too, under /v2.", is_ours=True)
    #: Where Vertex AI sends predictions and health checks; it has no key. `None`: nowhere.
    vertex_predict_route: str | None = None
    vertex_health_route: str | None = None

    def __post_init__(self) -> None:
        """Raises `ConfigError` for a key that would guard nothing, and for routes that are no paths."""
        if self.api_key is not None and not self.api_key.strip():
            raise ConfigError("--api-key is empty: leave it out to serve without a key.")
        for name, route in (
            ("AIP_PREDICT_ROUTE", self.vertex_predict_route),
            ("AIP_HEALTH_ROUTE", self.vertex_health_route),
        ):
            if route is not None and not _PATH.fullmatch(route):
                raise ConfigError(f"{name} ({route}) is not a path such as /predict.")


@dataclass(frozen=True, kw_only=True)
class BatchConfig:
    """How long sequences may be, and how much work one step may hold."""

    max_input_tokens: int | None = flag(
        None, "Longest prompt, in tokens.", minimum=1, default_text="max-total-tokens - 1"
    )
    max_total_tokens: int | None = flag(
        None,
        "Longest prompt and reply together, in tokens.",
        minimum=2,
        default_text="what model and KV cache allow",
    )
    #: The token budget of a step: larger steps prefill faster and delay the sequences that decode beside them.
    max_batch_prefill_tokens: int = flag(
        512, "Most tokens in one step.", minimum=1, default_text="512 on CPU, 4096 on GPU"
    )
    #: Bounds the memory of sampling, whose logits are sequences by vocabulary.
    max_batch_size: int = flag(256, "Most sequences in one step.", minimum=1)
    speculate: int = flag(
        0,
        "Most tokens that are guessed beyond the next one, from what came after the same words before, and kept where"
        " the model agrees. 0: none.",
        minimum=0,
        maximum=MAX_SPECULATIVE_TOKENS,
    )

    def __post_init__(self) -> None:
        """Raises `ConfigError` where the limits contradict each other."""
        if (
            self.max_input_tokens is not None
            and self.max_total_tokens is not None
            and self.max_input_tokens >= self.max_total_tokens
        ):
            raise ConfigError(
                f"--max-input-tokens ({self.max_input_tokens}) must be less than"
                f" --max-total-tokens ({self.max_total_tokens}): a reply needs room for a token."
            )


@dataclass(frozen=True, kw_only=True)
class SchedulingConfig:
    """What runs first, what gives way, and what is accepted at all."""

    scheduler: str = flag(
        "bros",
        "Policy; all but bros are there to compare with.",
        choices=("bros", "bros-paper", "fcfs", "tgi", "priority", "edf", "rr", "static"),
        is_ours=True,
    )
    admission_policy: str = flag(
        "queue",
        "What becomes of a real-time request whose target cannot be met: accepted all the same, answered 429,"
        " accepted as late, or accepted with the earliest target that can be met.",
        choices=("queue", "reject", "degrade", "relax"),
        is_ours=True,
    )
    #: 0: no limit beyond that of the requests, which is TGI's.
    max_queued_rt_tokens: int = flag(
        0,
        "Prompt tokens of real-time requests that may wait; what is more is answered 429.",
        minimum=1,
        is_ours=True,
        default_text="no limit",
    )
    #: A token takes some 40 bytes of the router while it waits.
    max_queued_be_tokens: int = flag(
        4_000_000,
        "Prompt tokens of best-effort requests that may wait; what is more is answered 429.",
        minimum=1,
        is_ours=True,
    )
    kv_preemption: str = flag(
        "bidir",
        "How best-effort requests give up KV cache: recompute drops all of it, block takes single blocks and keeps"
        " copies, bidir also lets both classes share blocks.",
        choices=("recompute", "block", "bidir"),
        is_ours=True,
    )
    kv_checkpoints: str = flag(
        "lazy",
        "When KV blocks of best-effort requests are copied to the host: when they are taken, or ahead of time as well.",
        choices=("lazy", "background"),
        is_ours=True,
    )
    batch_size_control: str = flag(
        "off",
        "How the most sequences of a step follow the load: not at all, as in the BROS paper, or in smaller steps.",
        choices=("off", "reset", "aimd"),
        is_ours=True,
    )
    be_max_wait_s: float = flag(
        30.0,
        "Seconds after which a best-effort request that got no token is given one.",
        minimum=0.0,
        is_ours=True,
    )
    be_floor: str = flag(
        "soft",
        "Whether that holds while real-time requests miss their targets: soft, no; hard, yes.",
        choices=("soft", "hard"),
        is_ours=True,
    )
    static_be_requests: int = flag(
        8, "Best-effort requests that --scheduler static runs at once.", minimum=0, is_ours=True
    )
    priority_preemption: str = flag(
        "kv",
        "When --scheduler priority preempts: when KV cache runs out, or also when a step is full.",
        choices=("kv", "full"),
        is_ours=True,
    )
    profile_grid: str = flag(
        "quick",
        "How closely step times are measured at the start, unless they are known from before.",
        choices=("quick", "full"),
        is_ours=True,
    )


@dataclass(frozen=True, kw_only=True)
class RankConfig:
    """The processes that run the model, and what each may take of the machine."""

    num_shard: int = flag(1, "Tensor-parallel ranks.", minimum=1, default_text="visible GPUs, else 1")
    device: str = flag(
        "auto",
        "Where the model runs; auto: on GPUs where there are any.",
        choices=("auto", "cpu", "cuda"),
        is_ours=True,
    )
    kernels: str = flag(
        "auto",
        "What the model computes with; cpu: C kernels for bfloat16 and float32 on AVX2 or AVX-512, torch: PyTorch's, "
        "slower; auto: the fastest that runs.",
        choices=("auto", "cpu", "torch"),
        is_ours=True,
    )
    #: Bytes over all ranks; 0: every rank takes what is free on its GPU.
    kv_cache_memory_bytes: int = flag(
        0,
        "Size of the KV cache over all ranks, such as 2GiB.",
        name="kv-cache-memory",
        is_bytes=True,
        minimum=1,
        is_ours=True,
        default_text="a quarter of the free memory on CPU, what is free on GPU",
    )
    #: 0: no limit.
    kv_slots_limit: int = flag(
        0, "Most tokens that the KV cache holds.", minimum=1, is_ours=True, default_text="no limit"
    )
    #: Bytes over all ranks; 0: as much as the KV cache, but at most a quarter of the free memory.
    kv_host_memory_bytes: int = flag(
        0,
        "Host memory for KV cache that best-effort requests give up, such as 2GiB.",
        name="kv-host-memory",
        is_bytes=True,
        minimum=1,
        is_ours=True,
        default_text="as much as the KV cache, at most a quarter of the free memory",
    )
    block_size: int = flag(64, "Tokens in a block of the KV cache: a power of two from 16 to 256.", is_ours=True)
    disable_prefix_caching: bool = flag(
        False, "Compute every prompt from its first token, whatever the KV cache holds of it.", is_ours=True
    )
    #: 0: the cores divided by the ranks.
    cpu_threads: int = flag(0, "CPU threads of each rank.", minimum=1, is_ours=True, default_text="cores / ranks")
    cuda_memory_fraction: float = flag(1.0, "Share of each GPU's memory that may be used.", minimum=0.01, maximum=1.0)

    def __post_init__(self) -> None:
        """Raises `ConfigError` for a block size that no kernel has."""
        if self.block_size not in (16, 32, 64, 128, 256):
            raise ConfigError(f"--block-size ({self.block_size}) must be 16, 32, 64, 128 or 256.")


@dataclass(frozen=True, kw_only=True)
class HttpConfig:
    """Where the server listens, and how long it waits when it is told to end."""

    #: An IP address: anything else was replaced when the configuration was read.
    hostname: str = flag("0.0.0.0", "IP address to listen on.")
    port: int = flag(3000, "Port to listen on.", short="p", minimum=0, maximum=65535)
    graceful_termination_timeout_s: int = flag(
        90,
        "Seconds that running requests get to finish after SIGTERM.",
        name="graceful-termination-timeout",
        short="g",
        minimum=0,
    )
    #: What the header `x-compute-type` says; `None`: ranks and device.
    compute_type: str | None = None


@dataclass(frozen=True, kw_only=True)
class LogConfig:
    """What is logged, and in which form."""

    json_output: bool = flag(False, "Log JSON, one object a line.")
    #: A name of `logging`: DEBUG, INFO, WARNING, ERROR or CRITICAL.
    level: str = "INFO"
    #: `None`: colours on a terminal.
    colorize: bool | None = None


@dataclass(frozen=True, kw_only=True)
class TraceConfig:
    """Where spans of requests go."""

    otlp_endpoint: str | None = flag(
        None, "Collector that spans of requests are sent to by OTLP over gRPC, such as http://collector:4317."
    )
    otlp_service_name: str = flag("text-generation-inference.router", "Name of the server in spans.")


@dataclass(frozen=True, kw_only=True)
class ServerConfig:
    """Everything the server was told, once."""

    model: ModelConfig = field(default_factory=ModelConfig)
    hub: HubConfig = field(default_factory=HubConfig)
    api: ApiConfig = field(default_factory=ApiConfig)
    batch: BatchConfig = field(default_factory=BatchConfig)
    scheduling: SchedulingConfig = field(default_factory=SchedulingConfig)
    ranks: RankConfig = field(default_factory=RankConfig)
    http: HttpConfig = field(default_factory=HttpConfig)
    log: LogConfig = field(default_factory=LogConfig)
    trace: TraceConfig = field(default_factory=TraceConfig)
    #: Where the private folder of sockets is made. Short: a socket's path has at most 107 bytes.
    runtime_base: Path = field(default_factory=lambda: Path(tempfile.gettempdir()))

    def __post_init__(self) -> None:
        """Raises `ConfigError` where a step could tell more of prompts than a frame from the ranks may hold."""
        num_tokens = self.batch.max_batch_prefill_tokens
        if self.api.enable_prefill_logprobs and num_tokens > _MOST_TOLD_TOKENS:
            raise ConfigError(
                f"--max-batch-prefill-tokens ({num_tokens}) must be at most {_MOST_TOLD_TOKENS}"
                " with --enable-prefill-logprobs."
            )


#: The sections of `--help`, in order: field of `ServerConfig`, title, class.
SECTIONS: tuple[tuple[str, str, type], ...] = (
    ("model", "Model", ModelConfig),
    ("hub", "Hub", HubConfig),
    ("batch", "Tokens and batches", BatchConfig),
    ("scheduling", "Scheduling", SchedulingConfig),
    ("ranks", "Ranks and memory", RankConfig),
    ("http", "Server", HttpConfig),
    ("api", "Requests", ApiConfig),
    ("log", "Logs", LogConfig),
    ("trace", "Traces", TraceConfig),
)
