"""Checkpoints are read slice by slice, and refused by file and tensor where they are not what the model needs."""

from __future__ import annotations

import contextlib
import json
import re
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor

from bros_kernels.torch_kernels import TorchKernels
from bros_shard.checkpoint import Checkpoint, CheckpointError
from bros_shard.parallel import part_of
from bros_shard.weights import RankWeights

EMBEDDING = "model.embed_tokens.weight"
DOWN = "model.layers.1.mlp.down_proj.weight"


@dataclass(frozen=True)
class Ranks:
    """What `RankWeights` asks of a `ParallelGroup`."""

    rank: int
    world_size: int


def rank_weights(checkpoint: Checkpoint, rank: int, world_size: int) -> RankWeights:
    ranks: Any = Ranks(rank, world_size)
    dtype = torch.float32
    return RankWeights(checkpoint, ranks, torch.device("cpu"), dtype, TorchKernels(dtype))


def save(folder: Path, tensors: dict[str, Tensor]) -> Path:
    save_file(tensors, folder / "model.safetensors")
    return folder


@pytest.fixture
def llama(reference, tmp_path: Path) -> Path:
    """A copy of a good checkpoint."""
    shutil.copytree(reference("llama").path, tmp_path, dirs_exist_ok=True)
    return tmp_path


def test_take_reads_the_slice_asked_for(tmp_path: Path) -> None:
    matrix = torch.arange(24.0).view(6, 4)
    done: list[tuple[int, int]] = []
    with Checkpoint(
        save(tmp_path, {"a": matrix, "b": matrix.half()}), lambda *progress: done.append(progress)
    ) as checkpoint:
        assert "a" in checkpoint
        assert "c" not in checkpoint
        assert torch.equal(checkpoint.take("a", (6, 4)), matrix)
        assert torch.equal(checkpoint.take("a", (6, 4), 0, 2, 5), matrix[2:5])
        assert torch.equal(checkpoint.take("b", (6, 4), 1, 1, 3), matrix.half()[:, 1:3])
        checkpoint.check_all_taken()
    assert done == [(96, 144), (144, 144), (144, 144)]


@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_ranks_hold_the_whole_between_them(world_size: int, tmp_path: Path) -> None:
    matrix = torch.randn(8, 12)
    save(tmp_path, {"m": matrix})
    with Checkpoint(tmp_path) as checkpoint:
        ranks = [rank_weights(checkpoint, rank, world_size) for rank in range(world_size)]
        assert torch.equal(torch.cat([rank.columns("m", (8, 12)) for rank in ranks], 1), matrix)
        assert all(torch.equal(rank.whole("m", (8, 12)), matrix) for rank in ranks)
        assert torch.equal(torch.cat([rank.transposed().columns("m", (12, 8)) for rank in ranks], 1), matrix.T)
        assert ranks[0].transposed().columns("m", (12, 8)).is_contiguous()


def test_rows_come_in_the_order_asked_for(tmp_path: Path) -> None:
    matrix, bias = torch.randn(6, 4), torch.randn(6)
    save(tmp_path, {"m": matrix, "b": bias, "t": matrix.T.contiguous()})
    ranges = [range(4, 6), range(2)]
    with Checkpoint(tmp_path) as checkpoint:
        weights = rank_weights(checkpoint, 0, 1)
        expected = torch.cat([matrix[4:], matrix[:2]])
        assert torch.equal(weights.rows("m", (6, 4), ranges), expected)
        assert torch.equal(weights.rows("b", (6,), ranges), torch.cat([bias[4:], bias[:2]]))
        assert torch.equal(weights.transposed().rows("t", (6, 4), ranges), expected)
        assert weights.transposed().rows("t", (6, 4), ranges[:1]).is_contiguous()
        assert torch.equal(weights.transposed().rows("b", (6,), ranges[1:]), bias[:2])


def test_ranks_share_parts_and_pad_the_last(tmp_path: Path) -> None:
    matrix = torch.arange(10.0).view(5, 2)
    ranks: list[Any] = [Ranks(rank, 4) for rank in range(4)]
    assert [part_of(parallel, 8) for parallel in ranks] == [range(2), range(2, 4), range(4, 6), range(6, 8)]
    assert [part_of(parallel, 4, num_parts=2) for parallel in ranks] == [range(2), range(2), range(2, 4), range(2, 4)]
    with Checkpoint(save(tmp_path, {"m": matrix})) as checkpoint:
        padded = torch.cat([rank_weights(checkpoint, rank, 4).padded_rows("m", (5, 2)) for rank in range(4)])
    assert padded.tolist() == [*matrix.tolist(), [0, 0], [0, 0], [0, 0]]


def _drop(tensors: dict[str, Tensor]) -> None:
    del tensors[DOWN]


def _add(tensors: dict[str, Tensor]) -> None:
    tensors["model.layers.3.mlp.down_proj.weight"] = tensors[DOWN].clone()


def _reshape(tensors: dict[str, Tensor]) -> None:
    tensors[DOWN] = tensors[DOWN].T.contiguous()


def _quantise(tensors: dict[str, Tensor]) -> None:
    tensors[DOWN] = tensors[DOWN].to(torch.int8)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (_drop, f"tensor '{DOWN}' is missing from the checkpoint"),
        (_add, "model.safetensors: tensor 'model.layers.3.mlp.down_proj.weight' is not part of the model"),
        (_reshape, f"model.safetensors: tensor '{DOWN}' has shape [96, 64], the model needs [64, 96]"),
        (_quantise, f"model.safetensors: tensor '{DOWN}' has dtype I8"),
    ],
)
def test_wrong_tensors_are_refused_by_name(change, message: str, llama: Path, make_worker) -> None:
    tensors = load_file(llama / "model.safetensors")
    change(tensors)
    save(llama, tensors)
    with pytest.raises(CheckpointError, match=re.escape(message)):
        make_worker(llama)


def test_sharded_checkpoint_equals_single_file(llama: Path, reference, make_worker, scripted_router) -> None:
    write_shards(llama)
    expected = reference("llama")
    router = scripted_router(make_worker(llama))
    router.add(expected.prompts[0])
    assert router.run() == expected.outputs[:1]


def write_shards(folder: Path) -> dict[str, str]:
    """Split a checkpoint in two files with an index. Returns the weight map."""
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    names = sorted(tensors)
    weight_map = {name: f"model-{index % 2}.safetensors" for index, name in enumerate(names)}
    for file_name in set(weight_map.values()):
        save_file({n: tensors[n] for n in names if weight_map[n] == file_name}, folder / file_name)
    write_index(folder, weight_map)
    return weight_map


def write_index(folder: Path, weight_map: object) -> None:
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))


def test_lying_index_is_refused(llama: Path) -> None:
    weight_map = write_shards(llama)
    other = {"model-0.safetensors": "model-1.safetensors", "model-1.safetensors": "model-0.safetensors"}
    write_index(llama, weight_map | {DOWN: other[weight_map[DOWN]]})
    with pytest.raises(CheckpointError, match=f"tensor '{DOWN}' is missing, though"):
        Checkpoint(llama)
    write_index(llama, weight_map | {DOWN: "../model-0.safetensors"})
    with pytest.raises(CheckpointError, match=r"is said to be in '\.\./model-0\.safetensors'"):
        Checkpoint(llama)
    write_index(llama, weight_map | {DOWN: "model-2.safetensors"})
    with pytest.raises(CheckpointError, match=r"model-2\.safetensors cannot be read"):
        Checkpoint(llama)
    for broken in ([], 7, None):
        write_index(llama, broken)
        with pytest.raises(CheckpointError, match=r"index\.json is not a weight index"):
            Checkpoint(llama)
    shutil.copy(llama / "model-0.safetensors", llama / "model-1.safetensors")
    write_index(llama, {EMBEDDING: "model-0.safetensors", DOWN: "model-1.safetensors"})
    with pytest.raises(CheckpointError):
        Checkpoint(llama)


def test_tensor_in_two_files_is_refused(tmp_path: Path) -> None:
    for file_name in ("a.safetensors", "b.safetensors"):
        save_file({"x": torch.ones(1), file_name[0]: torch.ones(1)}, tmp_path / file_name)
    write_index(tmp_path, {"a": "a.safetensors", "b": "b.safetensors"})
    with pytest.raises(CheckpointError, match=r"b\.safetensors: tensor 'x' stands in a\.safetensors too"):
        Checkpoint(tmp_path)


def test_folders_without_safetensors_are_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"holds neither model\.safetensors nor"):
        Checkpoint(tmp_path)
    (tmp_path / "pytorch_model.bin").write_bytes(b"\x80\x02.")
    with pytest.raises(CheckpointError, match=r"only PyTorch \.bin weights"):
        Checkpoint(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"no header")
    with pytest.raises(CheckpointError, match=r"model\.safetensors cannot be read") as error:
        Checkpoint(tmp_path)
    assert str(tmp_path) not in str(error.value)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_mutilated_files_are_refused_or_harmless(data: st.DataObject, tmp_path: Path) -> None:
    """Cut anywhere, or with any bytes of the header changed: refused, or all tensors still as the header says."""
    good = tmp_path / "good"
    good.mkdir(exist_ok=True)
    save(good, {"a": torch.ones(4, 4), "b": torch.zeros(3)})
    content = bytearray((good / "model.safetensors").read_bytes())
    num_header_bytes = 8 + int.from_bytes(content[:8], "little")
    if data.draw(st.booleans()):
        content = content[: data.draw(st.integers(0, len(content) - 1))]
    else:
        for _ in range(data.draw(st.integers(1, 3))):
            content[data.draw(st.integers(0, num_header_bytes - 1))] = data.draw(st.integers(0, 255))
    (tmp_path / "model.safetensors").write_bytes(content)
    with contextlib.suppress(CheckpointError), Checkpoint(tmp_path) as checkpoint:
        assert checkpoint.take("a", (4, 4)).shape == (4, 4)
        assert checkpoint.take("b", (3,)).shape == (3,)
