"""Finds the model that was asked for and reads what the router must know of it: limits, ends, tokenizer."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import structlog

from bros_router.chat_templates.source import ChatTemplate, find_chat_template
from bros_router.checkpoint_json import read_json, token_text
from bros_router.child_environment import child_environment
from bros_router.config import HubConfig, ModelConfig
from bros_router.hub import download
from bros_router.startup_error import CheckpointError
from bros_router.tokenizer import Tokenizer, TokenizerError

#: What clients see as the name of the bundled model.
DEMO_MODEL_ID: Final = "bros-demo"

#: `transformers` writes 10^30 for a tokenizer without a limit.
_NO_LIMIT: Final = 2**31
#: SentencePiece, WordPiece and byte-pair vocabularies, as older checkpoints have them.
_SLOW_TOKENIZER_FILES: Final = ("*.model", "vocab.*", "*.tiktoken")
#: The conversion of a slow tokenizer takes seconds; a broken one may take forever.
_CONVERSION_TIMEOUT_S: Final = 300

#: `on_progress(phase, num_bytes_done, num_bytes_total)`; called from several threads.
OnProgress = Callable[[str, int, int], None]

log = structlog.get_logger()


@dataclass(frozen=True, slots=True)
class ModelFiles:
    """A model on this machine, and what its files say."""

    #: Folder with config.json and safetensors.
    path: Path
    #: As clients know it.
    model_id: str
    #: Commit on the hub; `None` for a folder.
    sha: str | None
    pipeline_tag: str | None
    tokenizer: Tokenizer
    #: `None`: the model was not made for chats.
    chat_template: ChatTemplate | None
    #: Any of these ends a reply. Empty: only lengths and stop sequences do.
    eos_token_ids: frozenset[int]
    #: Tokens that the model's positions reach; `None`: not said.
    max_position_embeddings: int | None
    #: Tokens that the tokenizer's configuration allows; `None`: not said.
    model_max_length: int | None
    vocab_size: int
    #: Name of the format of the weights, such as `bfloat16`; `None`: not said.
    dtype: str | None

    @property
    def max_length(self) -> int | None:
        """The smaller of the two limits, as far as they are known."""
        return min(
            (limit for limit in (self.max_position_embeddings, self.model_max_length) if limit is not None),
            default=None,
        )


def resolve_model(model: ModelConfig, hub: HubConfig, on_progress: OnProgress) -> ModelFiles:
    """Find, fetch and read the model. Blocks for as long as a download takes: call it in a thread.

    Raises:
        ModelNotFoundError: it is not there and cannot be fetched.
        CheckpointError: its files are broken, or do not belong together.
    """
    if model.model_id is None:
        return read(demo_model_path(), DEMO_MODEL_ID, model.tokenizer_config_path)
    path = Path(model.model_id)
    if path.is_dir():
        return read(path.resolve(), model.model_id, model.tokenizer_config_path)
    snapshot = download(
        model.model_id,
        model.revision,
        hub,
        lambda done, total: on_progress("downloading", done, total),
    )
    return read(
        snapshot.path,
        model.model_id,
        model.tokenizer_config_path,
        sha=snapshot.sha,
        pipeline_tag=snapshot.pipeline_tag,
    )


def demo_model_path() -> Path:
    """The folder of the bundled model, found without importing its package (and torch with it)."""
    spec = importlib.util.find_spec("bros_shard")
    assert spec is not None
    assert spec.submodule_search_locations is not None
    return Path(spec.submodule_search_locations[0]) / "demo_model"


def read(
    path: Path,
    model_id: str,
    tokenizer_config_path: Path | None = None,
    *,
    sha: str | None = None,
    pipeline_tag: str | None = None,
) -> ModelFiles:
    """Read a model's folder. Weights are not opened: that is for the ranks.

    Raises:
        CheckpointError: a file is missing or broken, or the tokenizer is another model's.
    """
    config = read_json(path / "config.json")
    if config is None:
        raise CheckpointError(f"{model_id}: there is no config.json.")
    if not any(path.glob("*.safetensors")):
        raise CheckpointError(f"{model_id}: there are no safetensors weights, and other formats are not loaded.")
    # Models of several modalities keep the part that generates text in a configuration of its own.
    text_config = config.get("text_config", config)
    if not isinstance(text_config, dict):
        raise CheckpointError(f"{model_id}: text_config of config.json is not an object.")
    tokenizer_config = read_json(tokenizer_config_path or path / "tokenizer_config.json") or {}
    tokenizer = _load_tokenizer(path, model_id)
    vocab_size = _positive_integer(text_config, "vocab_size")
    if vocab_size is None:
        raise CheckpointError(f"{model_id}: config.json has no vocab_size.")
    if tokenizer.vocab_size > vocab_size:
        raise CheckpointError(
            f"{model_id}: the tokenizer has {tokenizer.vocab_size} tokens and the model {vocab_size}:"
            " they do not belong together."
        )
    eos_token_ids = _eos_token_ids(path, text_config, tokenizer_config, tokenizer)
    if not eos_token_ids:
        log.warning("the model names no end-of-sequence token: replies end by length or stop sequence alone")
    return ModelFiles(
        path=path,
        model_id=model_id,
        sha=sha,
        pipeline_tag=pipeline_tag,
        tokenizer=tokenizer,
        chat_template=find_chat_template(path, tokenizer_config, is_config_replaced=tokenizer_config_path is not None),
        eos_token_ids=eos_token_ids,
        max_position_embeddings=_positive_integer(text_config, "max_position_embeddings", "n_positions"),
        model_max_length=_positive_integer(tokenizer_config, "model_max_length"),
        vocab_size=vocab_size,
        dtype=text_config.get("dtype") or text_config.get("torch_dtype"),
    )


def _load_tokenizer(path: Path, model_id: str) -> Tokenizer:
    try:
        if (path / "tokenizer.json").is_file():
            return Tokenizer(path / "tokenizer.json")
        if not any(file for pattern in _SLOW_TOKENIZER_FILES for file in path.glob(pattern)):
            raise CheckpointError(f"{model_id}: there is no tokenizer.json, nor an older form of a tokenizer.")
        with tempfile.TemporaryDirectory(prefix="bros-tokenizer-") as folder:
            converted = Path(folder) / "tokenizer.json"
            _convert_tokenizer(path, converted, model_id)
            return Tokenizer(converted)
    except TokenizerError as error:
        raise CheckpointError(f"{model_id}: the tokenizer cannot be read ({error}).") from None


def _convert_tokenizer(path: Path, target: Path, model_id: str) -> None:
    """Turn a slow tokenizer into a `tokenizer.json`, in a process that may import what the router must not."""
    log.info("converting the tokenizer", model_id=model_id)
    command = [sys.executable, "-m", "bros_shard.convert_tokenizer", str(path), str(target)]
    try:
        result = subprocess.run(
            command,
            env=child_environment(),
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=_CONVERSION_TIMEOUT_S,
        )
    except subprocess.TimeoutExpired:
        raise CheckpointError(f"{model_id}: the conversion of its tokenizer does not end.") from None
    if result.returncode != 0:
        reason = (result.stderr.strip().splitlines() or ["no reason given"])[-1]
        raise CheckpointError(
            f"{model_id}: there is no tokenizer.json, and the slow tokenizer cannot be converted ({reason})."
        )


def _eos_token_ids(
    path: Path, config: Mapping[str, Any], tokenizer_config: Mapping[str, Any], tokenizer: Tokenizer
) -> frozenset[int]:
    """The list of generation_config.json, else the tokenizer's own, else the one id of either (TGI's order)."""
    generation_config = read_json(path / "generation_config.json") or {}
    declared = generation_config.get("eos_token_id", config.get("eos_token_id"))
    ids = [token_id for token_id in _as_list(declared) if _is_token_id(token_id)]
    if isinstance(declared, list) and ids:
        return frozenset(ids)
    special_tokens = read_json(path / "special_tokens_map.json") or {}
    for source in (tokenizer_config, special_tokens):
        token_id = _token_id(tokenizer, source.get("eos_token"))
        if token_id is not None:
            return frozenset({token_id})
    return frozenset(ids)


def _token_id(tokenizer: Tokenizer, token: object) -> int | None:
    text = token_text(token)
    return None if text is None else tokenizer.token_id(text)


def _as_list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]


def _is_token_id(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _positive_integer(source: Mapping[str, Any], *names: str) -> int | None:
    """The first of the named fields that is a limit worth the name."""
    for name in names:
        value = source.get(name)
        if isinstance(value, int | float) and not isinstance(value, bool) and 0 < value < _NO_LIMIT:
            return int(value)
    return None
