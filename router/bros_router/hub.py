"""Fetches a model from the Hugging Face hub: what serving needs of it, pinned to one commit, into the cache."""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from bros_router.config import HubConfig
from bros_router.startup_error import CheckpointError, ModelNotFoundError

#: Configuration, tokenizers (fast and slow) and chat templates; never code, never pickled weights.
_METADATA_PATTERNS: Final = ["*.json", "*.model", "*.txt", "*.jinja", "*.tiktoken"]
#: Folders of a repository hold other formats of the same model.
_IGNORED_PATTERNS: Final = ["*/*"]
_INDEX: Final = "model.safetensors.index.json"
_SINGLE: Final = "model.safetensors"
#: What a LoRA adapter is, as PEFT saves it.
ADAPTER_CONFIG: Final = "adapter_config.json"
_ADAPTER_WEIGHTS: Final = "adapter_model.safetensors"

#: `on_progress(num_bytes_done, num_bytes_total)`; called from several threads.
OnProgress = Callable[[int, int], None]


@dataclass(frozen=True, slots=True)
class Snapshot:
    """One commit of a model in the local cache."""

    path: Path
    sha: str
    #: What the hub says the model is for; `None` where it does not say or was not asked.
    pipeline_tag: str | None


def download(model_id: str, revision: str | None, hub: HubConfig, on_progress: OnProgress) -> Snapshot:
    """Bring a model into the cache, or find it there.

    Files that an earlier, interrupted call completed are kept; half a file is never used. Without a network, a
    complete snapshot in the cache will do.

    Raises:
        ModelNotFoundError: no such model or revision, no permission, no network, no room.
        CheckpointError: the repository has no safetensors.
    """
    # Weights come in calls of their own: only what is there tells which of several formats to take.
    path = _fetch(model_id, revision, hub, _METADATA_PATTERNS, lambda done, total: None)
    sha = path.name
    for weights in (weight_files(path), [_SINGLE], ["*.safetensors"]):
        if weights:
            _fetch(model_id, sha, hub, weights, on_progress)
        if any(path.glob("*.safetensors")):
            return Snapshot(path, sha, _pipeline_tag(model_id, sha, hub))
    raise CheckpointError(f"{model_id} has no safetensors weights: other formats are not loaded.")


def download_adapter(adapter_id: str, revision: str | None, hub: HubConfig, on_progress: OnProgress) -> Path:
    """Bring a LoRA adapter into the cache, or find it there, as far as its repository has one. Returns its folder.

    Raises:
        ModelNotFoundError: as `download`.
    """
    return _fetch(adapter_id, revision, hub, [ADAPTER_CONFIG, _ADAPTER_WEIGHTS], on_progress)


def weight_files(path: Path) -> list[str]:
    """The files that the safetensors index of a folder names; empty without an index.

    Raises:
        CheckpointError: the index is not one, or names files outside the folder.
    """
    index = path / _INDEX
    if not index.is_file():
        return []
    try:
        names = sorted(set(json.loads(index.read_bytes())["weight_map"].values()))
    except (ValueError, KeyError, AttributeError, TypeError):
        raise CheckpointError(f"{_INDEX} is not an index of safetensors.") from None
    for name in names:
        if not isinstance(name, str) or "/" in name or not name.endswith(".safetensors"):
            raise CheckpointError(f"{_INDEX} names {name!r}, which is not a safetensors file beside it.")
    return names


def _fetch(model_id: str, revision: str | None, hub: HubConfig, patterns: list[str], on_progress: OnProgress) -> Path:
    # Imported here: it takes a quarter of a second, which `--help` and local folders need not wait for.
    from huggingface_hub import snapshot_download

    try:
        return Path(
            snapshot_download(
                model_id,
                revision=revision,
                cache_dir=hub.cache_dir,
                token=hub.token,
                endpoint=hub.endpoint,
                local_files_only=hub.is_offline,
                allow_patterns=patterns,
                ignore_patterns=_IGNORED_PATTERNS,
                tqdm_class=_progress_class(on_progress),
            )
        )
    except Exception as error:  # the classes of transport errors differ between versions of the library
        raise ModelNotFoundError(_explain(error, model_id, revision, hub)) from error


def _explain(error: Exception, model_id: str, revision: str | None, hub: HubConfig) -> str:
    """One line for the operator."""
    from huggingface_hub import errors

    match error:
        case errors.HFValidationError():
            return f"{model_id} is neither a local folder nor a name of a model on the hub."
        case errors.GatedRepoError():
            return f"{model_id} is gated: accept its terms on the hub and set HF_TOKEN."
        case errors.RepositoryNotFoundError():
            return f"{model_id} is neither a local folder nor a model on the hub (a private one needs HF_TOKEN)."
        case errors.RevisionNotFoundError():
            return f"{model_id} has no revision {revision!r} on the hub."
        case errors.LocalEntryNotFoundError() if hub.is_offline:
            return f"{model_id} is neither a local folder nor complete in the cache, and HF_HUB_OFFLINE is set."
        case errors.LocalEntryNotFoundError():
            return f"{model_id} is neither a local folder nor complete in the cache, and the hub cannot be reached."
        case errors.HfHubHTTPError():
            return f"{model_id}: the hub answered {error.response.status_code}. Starting again fetches the rest."
        case OSError(strerror=str(reason)):
            return f"{model_id} could not be downloaded ({reason}). Starting again fetches the rest."
        case _:
            return f"{model_id} could not be downloaded ({type(error).__name__}). Starting again fetches the rest."


def _progress_class(on_progress: OnProgress) -> Any:
    """What the library takes for a progress bar: it draws nothing and hands the bytes on."""
    from huggingface_hub.utils.tqdm import tqdm

    class Reporter(tqdm):
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            # The library opens bars for files, bytes sent and bytes written; this is the name of the last.
            self._counts_bytes = kwargs.get("unit") == "B" and kwargs.get("name") == "huggingface_hub.snapshot_download"
            super().__init__(*args, **kwargs | {"disable": False, "file": io.StringIO()})  # type: ignore[no-untyped-call]

        def display(self, *args: Any, **kwargs: Any) -> None:
            """Nothing to draw."""

        def update(self, n: float | None = 1) -> None:
            super().update(n)
            if self._counts_bytes:
                on_progress(int(self.n), int(self.total or 0))

    return Reporter


def _pipeline_tag(model_id: str, sha: str, hub: HubConfig) -> str | None:
    """Only decorates `/info` and one default, so a hub that does not answer is no failure."""
    if hub.is_offline:
        return None
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError

    try:
        return HfApi(endpoint=hub.endpoint, token=hub.token).model_info(model_id, revision=sha).pipeline_tag
    except (HfHubHTTPError, OSError):
        return None
