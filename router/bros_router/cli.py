"""The command line and the environment, turned into a configuration once. Nothing else reads either."""

from __future__ import annotations

import ipaddress
import os
import tempfile
from collections import defaultdict
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import click
from click.core import ParameterSource

from bros_router import tgi_flags
from bros_router.config import (
    SECTIONS,
    ConfigError,
    HubConfig,
    LogConfig,
    ModelConfig,
    ServerConfig,
    flags_of,
)
from bros_router.flag_options import SectionedCommand, config_option, serve_options
from bros_router.host import Host
from bros_router.logs import level_of

#: The token budget of a step where none is given: what a step of some 100 ms can prefill.
_STEP_TOKENS_ON_CPU: Final = 512
_STEP_TOKENS_ON_GPU: Final = 4096
#: The rest is for weights, activations and the host's other work.
_KV_SHARE_OF_FREE_MEMORY: Final = 0.25

_TRUE: Final = {"1", "true", "yes", "on"}


@dataclass(frozen=True, slots=True)
class Invocation:
    """What a command line asked for."""

    config: ServerConfig
    #: One line each, for the log.
    warnings: tuple[str, ...]
    #: `--env`
    shows_environment: bool


def serve_command(run: Callable[[Invocation], int]) -> click.Command:
    """The command that serves. `run` returns the exit status."""

    def callback(**values: Any) -> None:
        context = click.get_current_context()
        given = {
            name: value
            for name, value in values.items()
            if context.get_parameter_source(name) is not ParameterSource.DEFAULT
        }
        context.exit(run(invocation(given, os.environ, Host.read(os.environ))))

    return SectionedCommand(
        "serve",
        callback=callback,
        params=list(serve_options()),
        help="Serve a model over HTTP, in place of Text Generation Inference.",
        epilog="Exit status: 0 asked to end, 1 internal error, 2 usage, 3 model not found, 4 model unusable,"
        " 5 rank died.",
        context_settings={"max_content_width": 110},
    )


def download_command(run: Callable[[ModelConfig, HubConfig], int]) -> click.Command:
    """The command that only fetches a model. `run` returns the exit status."""

    def callback(model_id: str, revision: str | None, cache_dir: Path | None) -> None:
        hub = _hub_config({"cache_dir": cache_dir} if cache_dir else {}, os.environ)
        model = ModelConfig(model_id=model_id, revision=revision)
        click.get_current_context().exit(run(model, hub))

    options = [config_option(ModelConfig, "revision"), config_option(HubConfig, "cache_dir")]
    return click.Command(
        "download-weights",
        callback=callback,
        params=[click.Argument(["model_id"]), *options],
        help="Fetch a model from the hub into the cache.",
    )


def invocation(given: Mapping[str, Any], environment: Mapping[str, str], host: Host) -> Invocation:
    """Check the values that were given and fill in those that follow from others or from the machine.

    Args:
        given: by field name, what the command line or the environment set.
        environment: for what has no flag.

    Raises:
        click.UsageError: values that contradict each other, or that this server cannot honour.
    """
    values = dict(given)
    warnings = _check_foreign(values) + _foreign_variables(environment)
    shows_environment = bool(values.pop("env", False))
    try:
        _fold_input_length(values)
        _fold_sharded(values, host)
        _fold_prefix_caching(values, environment)
        _fold_vertex_port(values, environment)
        _check_gpus(values, host)
        _fill_in(values, host)
        warnings += _replace_hostname(values)
        config = _build(values, environment)
    except ConfigError as error:
        raise click.UsageError(str(error)) from None
    return Invocation(config, tuple(warnings), shows_environment)


def _check_foreign(values: dict[str, Any]) -> list[str]:
    """Take out the flags that are not ours to honour: refuse, or say that they have no effect."""
    for foreign in tgi_flags.REFUSED:
        if values.pop(foreign.name, None) not in foreign.neutral:
            raise click.UsageError(f"{foreign.flag.option} is refused. {foreign.reason}")
    max_total, max_batch_total = values.get("max_total_tokens"), values.get("max_batch_total_tokens")
    if max_total is not None and max_batch_total is not None and max_total > max_batch_total:
        raise click.UsageError(
            f"--max-total-tokens ({max_total}) must not exceed --max-batch-total-tokens ({max_batch_total})."
        )
    prefill = values.get("max_batch_prefill_tokens")
    if prefill is not None and max_batch_total is not None and prefill > max_batch_total:
        raise click.UsageError(
            f"--max-batch-prefill-tokens ({prefill}) must not exceed --max-batch-total-tokens ({max_batch_total})."
        )
    return [
        f"{foreign.flag.option} has no effect. {foreign.reason}"
        for foreign in tgi_flags.ACCEPTED
        if values.pop(foreign.name, None) not in foreign.neutral
    ]


def _foreign_variables(environment: Mapping[str, str]) -> list[str]:
    """Say which variables of TGI's have no effect."""
    return [
        f"{foreign.name} has no effect. {foreign.reason}"
        for foreign in tgi_flags.VARIABLES
        if environment.get(foreign.name, "").lower() not in ("", *foreign.neutral)
    ]


def _fold_input_length(values: dict[str, Any]) -> None:
    length = values.pop("max_input_length", None)
    if length is None:
        return
    if "max_input_tokens" in values:
        raise ConfigError(
            "--max-input-tokens and its old name --max-input-length are both set: keep --max-input-tokens."
        )
    values["max_input_tokens"] = length


def _fold_sharded(values: dict[str, Any], host: Host) -> None:
    """TGI's table of `sharded` and `num-shard`."""
    sharded = values.pop("sharded", None)
    if "num_shard" not in values:
        is_on_cpu = values.get("device") == "cpu"
        values["num_shard"] = 1 if sharded is False or is_on_cpu else host.default_num_shard
        if sharded and values["num_shard"] <= 1:
            raise ConfigError("--sharded is true and one device is visible: give --num-shard, or more devices.")
    if sharded and values["num_shard"] <= 1:
        raise ConfigError("--sharded is true and --num-shard is 1: raise one or drop the other.")


def _fold_prefix_caching(values: dict[str, Any], environment: Mapping[str, str]) -> None:
    """TGI turns its prefix cache off by a variable; our flag goes before it."""
    given = (environment.get(name, "").lower() for name in tgi_flags.PREFIX_CACHING)
    if any(value and value not in _TRUE for value in given):
        values.setdefault("disable_prefix_caching", True)


def _fold_vertex_port(values: dict[str, Any], environment: Mapping[str, str]) -> None:
    """Vertex AI says where it will ask; as in TGI, that goes before the flag."""
    port = environment.get("AIP_HTTP_PORT")
    if not port:
        return
    if not port.isascii() or not port.isdigit() or int(port) > 65535:
        raise ConfigError(f"AIP_HTTP_PORT ({port}) is not a port.")
    values["port"] = int(port)


def _check_gpus(values: dict[str, Any], host: Host) -> None:
    device, num_shard = values.get("device", "auto"), values["num_shard"]
    if device == "cpu" or (device == "auto" and host.num_gpus == 0):
        return
    if num_shard > host.num_gpus:
        raise ConfigError(
            f"--num-shard {num_shard} needs {num_shard} GPUs and {host.num_gpus} can be seen:"
            " lower it, check CUDA_VISIBLE_DEVICES, or use --device cpu."
        )


def _fill_in(values: dict[str, Any], host: Host) -> None:
    """Defaults that depend on the machine or on other flags."""
    is_on_gpu = host.num_gpus > 0 and values.get("device") != "cpu"
    if "max_batch_prefill_tokens" not in values:
        values["max_batch_prefill_tokens"] = _STEP_TOKENS_ON_GPU if is_on_gpu else _STEP_TOKENS_ON_CPU
    if "kv_cache_memory_bytes" not in values and not is_on_gpu:
        values["kv_cache_memory_bytes"] = int(host.free_memory_bytes * _KV_SHARE_OF_FREE_MEMORY)
    if "rope_factor" in values:
        values.setdefault("rope_scaling", "linear")


def _replace_hostname(values: dict[str, Any]) -> list[str]:
    """Containers set HOSTNAME to the container's name, which nobody can listen on."""
    hostname = values.get("hostname")
    if hostname is None:
        return []
    try:
        ipaddress.ip_address(hostname)
    except ValueError:
        values["hostname"] = "0.0.0.0"
        return [f"--hostname {hostname} is not an IP address: listening on 0.0.0.0."]
    return []


def _build(values: Mapping[str, Any], environment: Mapping[str, str]) -> ServerConfig:
    """Hand each value to the section it belongs to."""
    sections: dict[str, dict[str, Any]] = defaultdict(dict)
    for section, _, config_class in SECTIONS:
        for name in flags_of(config_class):
            if name in values:
                sections[section][name] = values[name]
    sections["http"]["compute_type"] = environment.get("COMPUTE_TYPE") or None
    sections["api"]["vertex_predict_route"] = environment.get("AIP_PREDICT_ROUTE") or None
    sections["api"]["vertex_health_route"] = environment.get("AIP_HEALTH_ROUTE") or None
    config = {
        section: config_class(**sections[section])
        for section, _, config_class in SECTIONS
        if section not in ("hub", "log")
    }
    return ServerConfig(
        **config,
        hub=_hub_config(sections["hub"], environment),
        log=_log_config(sections["log"], environment),
        runtime_base=_runtime_base(environment),
    )


def _runtime_base(environment: Mapping[str, str]) -> Path:
    """The user's own folder for sockets where the system gives one, else the temporary folder."""
    base = environment.get("XDG_RUNTIME_DIR")
    return Path(base) if base and os.access(base, os.W_OK | os.X_OK) else Path(tempfile.gettempdir())


def _hub_config(values: Mapping[str, Any], environment: Mapping[str, str]) -> HubConfig:
    tokens = (environment.get(name) for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "HF_API_TOKEN"))
    return HubConfig(
        **values,
        token=next((token for token in tokens if token), None),
        is_offline=environment.get("HF_HUB_OFFLINE", "").lower() in _TRUE,
        endpoint=environment.get("HF_ENDPOINT") or None,
    )


def _log_config(values: Mapping[str, Any], environment: Mapping[str, str]) -> LogConfig:
    colorize = environment.get("LOG_COLORIZE")
    return LogConfig(
        **values,
        level=level_of(environment.get("LOG_LEVEL", "")),
        colorize=None if not colorize else colorize.lower() in _TRUE,
    )
