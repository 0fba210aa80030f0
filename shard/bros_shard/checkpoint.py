"""Reading a checkpoint: safetensors only, slice by slice, and refused where a tensor is not what the model needs."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Final, TypeAlias

from safetensors import SafetensorError, safe_open
from torch import Tensor

INDEX_FILE: Final = "model.safetensors.index.json"
SINGLE_FILE: Final = "model.safetensors"
#: Names of safetensors dtypes that can be served; everything else is quantised or no weight at all.
_FLOAT_BYTES: Final = {"F32": 4, "F16": 2, "BF16": 2}

#: Called with (bytes done, bytes in total).
OnProgress: TypeAlias = Callable[[int, int], None]


class CheckpointError(Exception):
    """The checkpoint cannot be served. The text names the file and the tensor."""


class Checkpoint:
    """The tensors of a folder, read where the model asks for them.

    Use as a context manager; `close` without having taken every tensor is fine, `check_all_taken` is what refuses
    a checkpoint that holds more than the model.

    Raises:
        CheckpointError: no safetensors, or files that are missing, truncated or inconsistent.
    """

    def __init__(
        self,
        folder: Path,
        on_progress: OnProgress = lambda done, total: None,
        file_name: str | None = None,
        title: str = "",
    ) -> None:
        """Open the files.

        Args:
            file_name: the only one; `None`: those that hold a model.
            title: what messages say before a file's name.
        """
        self._on_progress = on_progress
        self._title = title
        self._stack = ExitStack()
        self._slices: dict[str, Any] = {}
        self._file_of: dict[str, str] = {}
        self._left: set[str] = set()
        self._num_done_bytes = 0
        try:
            files = _files(folder) if file_name is None else {file_name: None}
            for name, expected in files.items():
                self._open(folder / name, expected)
        except BaseException:
            self._stack.close()
            raise
        self._left = set(self._slices)
        self._num_total_bytes = sum(map(self._num_bytes, self._slices))

    def __enter__(self) -> Checkpoint:
        return self

    def __exit__(self, *exception: object) -> None:
        self._slices.clear()
        self._stack.close()

    def __contains__(self, name: str) -> bool:
        return name in self._slices

    def __iter__(self) -> Iterator[str]:
        return iter(self._slices)

    def shape(self, name: str) -> list[int]:
        """Of a tensor that is there."""
        return list(self._slices[name].get_shape())

    def take(self, name: str, shape: Sequence[int], dim: int = 0, start: int = 0, stop: int | None = None) -> Tensor:
        """Rows or columns [start, stop) along `dim` of a tensor that must have this whole `shape`.

        Returns:
            A CPU tensor in the checkpoint's dtype.

        Raises:
            CheckpointError: no such tensor, another shape, not a floating-point dtype, or unreadable.
        """
        found = self._slices.get(name)
        if found is None:
            raise CheckpointError(f"{self._title}tensor {name!r} is missing from the checkpoint")
        where = f"{self._file_of[name]}: tensor {name!r}"
        if self.shape(name) != list(shape):
            raise CheckpointError(f"{where} has shape {self.shape(name)}, the model needs {list(shape)}")
        if found.get_dtype() not in _FLOAT_BYTES:
            raise CheckpointError(f"{where} has dtype {found.get_dtype()}, which is not a weight this server can use")
        try:
            part: Tensor = found[(slice(None),) * dim + (slice(start, stop),) if shape else ...]
        except SafetensorError as error:
            raise CheckpointError(f"{where} cannot be read: {error}") from None
        if name in self._left:
            self._left.discard(name)
            self._num_done_bytes += self._num_bytes(name)
            self._on_progress(self._num_done_bytes, self._num_total_bytes)
        return part

    def skip(self, names: Iterable[str]) -> None:
        """Let these be: the model is known to have no use for them."""
        self._left.difference_update(names)

    def check_all_taken(self, ignored: Iterable[str] = ()) -> None:
        """Refuse tensors that the model has no use for: they mean that it is not the model it says it is.

        Args:
            ignored: names that may stay; one that begins with a dot stands for every name that ends so.
        """
        suffixes = tuple(name for name in ignored if name.startswith("."))
        extra = sorted(name for name in self._left.difference(ignored) if not name.endswith(suffixes))
        if extra:
            raise CheckpointError(
                f"{self._file_of[extra[0]]}: tensor {extra[0]!r} is not part of the model ({len(extra)} such tensors)"
            )
        self._on_progress(self._num_total_bytes, self._num_total_bytes)

    def _open(self, path: Path, expected: set[str] | None) -> None:
        shown_name = self._title + path.name
        try:
            file = self._stack.enter_context(safe_open(path, framework="pt"))
            names = set(file.keys())
            slices = {name: file.get_slice(name) for name in names}
        except (SafetensorError, OSError) as error:
            raise CheckpointError(f"{shown_name} cannot be read: {error}") from None
        for name in sorted((expected or set()) - names):
            raise CheckpointError(f"{shown_name}: tensor {name!r} is missing, though {INDEX_FILE} names it there")
        for name in sorted(names & self._slices.keys()):
            raise CheckpointError(f"{shown_name}: tensor {name!r} stands in {self._file_of[name]} too")
        self._slices.update(slices)
        self._file_of.update(dict.fromkeys(names, shown_name))

    def _num_bytes(self, name: str) -> int:
        num_bytes = _FLOAT_BYTES.get(self._slices[name].get_dtype(), 1)
        for size in self.shape(name):
            num_bytes *= size
        return num_bytes


def _files(folder: Path) -> dict[str, set[str] | None]:
    """The safetensors files of a folder, with the tensors each should hold where an index says so."""
    if (folder / INDEX_FILE).is_file():
        return _indexed_files(folder)
    if (folder / SINGLE_FILE).is_file():
        return {SINGLE_FILE: None}
    if any(folder.glob("*.bin")) or any(folder.glob("*.pt")):
        raise CheckpointError(
            "the model has only PyTorch .bin weights, which can run code when they are read: convert it to safetensors"
        )
    raise CheckpointError(f"the model folder holds neither {SINGLE_FILE} nor {INDEX_FILE}")


def _indexed_files(folder: Path) -> dict[str, set[str] | None]:
    try:
        weight_map = json.loads((folder / INDEX_FILE).read_bytes())["weight_map"]
        entries = [(str(name), str(file_name)) for name, file_name in weight_map.items()]
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        raise CheckpointError(f"{INDEX_FILE} is not a weight index") from None
    files: dict[str, set[str]] = {}
    for name, file_name in entries:
        if Path(file_name).name != file_name or not file_name.endswith(".safetensors"):
            raise CheckpointError(f"{INDEX_FILE}: tensor {name!r} is said to be in {file_name!r}, not a file beside it")
        files.setdefault(file_name, set()).add(name)
    return dict(files)
