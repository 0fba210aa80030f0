"""Finds the LoRA adapters that were asked for. What is in them is the ranks' to read."""

from __future__ import annotations

from pathlib import Path

from bros_router.config import HubConfig, ModelConfig
from bros_router.hub import ADAPTER_CONFIG, download_adapter
from bros_router.lora_adapters import AdapterSource
from bros_router.model_source import OnProgress
from bros_router.startup_error import CheckpointError, ModelNotFoundError


def resolve_adapters(model: ModelConfig, hub: HubConfig, on_progress: OnProgress) -> dict[str, Path]:
    """The folder of each adapter by its id, in the order given. Blocks for as long as downloads take.

    Raises:
        ModelNotFoundError: one is not there and cannot be fetched.
        CheckpointError: what is there is no adapter.
    """
    folders = {}
    for source in model.adapters:
        folders[source.adapter_id] = folder = _folder(source, hub, on_progress)
        if not (folder / ADAPTER_CONFIG).is_file():
            raise CheckpointError(f"adapter {source.adapter_id}: there is no {ADAPTER_CONFIG}.")
    return folders


def _folder(source: AdapterSource, hub: HubConfig, on_progress: OnProgress) -> Path:
    path = source.path or Path(source.adapter_id)
    if path.is_dir():
        return path.resolve()
    if source.path is not None:
        raise ModelNotFoundError(f"adapter {source.adapter_id}: {path} is not a folder.")
    return download_adapter(
        source.adapter_id, source.revision, hub, lambda done, total: on_progress("downloading", done, total)
    )
