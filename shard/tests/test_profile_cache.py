"""Step times are kept between starts, and nothing that is wrong with the file keeps a rank from starting."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from structlog.testing import capture_logs

from bros_shard.profile_cache import ProfileCache, processor_name
from bros_shard.protocol import StepShape

POINTS = [(StepShape(num_decode_sequences=1, decode_context_tokens=64), 0.02), (StepShape(64, 1, 0, 2048.0), 0.06)]
KEY = {"device": "cpu", "dtype": "bfloat16"}


@pytest.fixture(autouse=True)
def cache_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache"


def test_what_was_stored_is_loaded(cache_home: Path) -> None:
    assert ProfileCache(KEY).load("quick") == []
    ProfileCache(KEY).store("quick", POINTS)
    assert ProfileCache(KEY).load("quick") == POINTS
    assert ProfileCache(KEY | {"dtype": "float32"}).load("quick") == []
    assert [path.parent for path in cache_home.rglob("*") if path.is_file()] == [cache_home / "bros" / "step-times"]


def test_the_full_grid_serves_for_the_quick_one_but_not_the_reverse() -> None:
    cache = ProfileCache(KEY)
    cache.store("quick", POINTS[:1])
    assert cache.load("full") == []
    cache.store("full", POINTS)
    assert cache.load("full") == cache.load("quick") == POINTS


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"{",
        b"\xff\xfe",
        b"[]",
        b'{"key": {}, "grid": "full", "points": []}',
        b'{"key": {}, "grid": "full", "points": [[[1, 1, 0, 0.0, 0, 0], -1.0]]}',
        b'{"key": {}, "grid": "full", "points": [[["x"], 1.0]]}',
    ],
)
def test_a_broken_file_is_ignored_with_one_warning_and_replaced(content: bytes) -> None:
    cache = ProfileCache(KEY)
    cache.store("full", POINTS)
    assert cache.path is not None
    cache.path.write_bytes(content)
    with capture_logs() as logs:
        assert cache.load("full") == []
    assert [entry["log_level"] for entry in logs] == ["warning"]
    cache.store("full", POINTS)
    assert cache.load("full") == POINTS


def test_a_folder_that_cannot_be_made_is_one_warning(cache_home: Path) -> None:
    cache_home.write_text("a file where a folder should be")
    with capture_logs() as logs:
        assert ProfileCache(KEY).load("quick") == []
        ProfileCache(KEY).store("quick", POINTS)
    assert {entry["log_level"] for entry in logs} == {"warning"}


def test_a_store_that_fails_leaves_no_file(cache_home: Path) -> None:
    cache = ProfileCache(KEY)
    assert cache.path is not None
    cache.path.mkdir(parents=True)  # nothing can be renamed to it
    with capture_logs() as logs:
        cache.store("quick", POINTS)
    assert [entry["log_level"] for entry in logs] == ["warning"]
    assert [path for path in cache_home.rglob("*") if path.is_file()] == []


def test_without_a_home_nothing_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")
    monkeypatch.setattr(os.path, "expanduser", lambda path: path)  # as for a user that the system does not know
    cache = ProfileCache(KEY)
    cache.store("quick", POINTS)
    assert cache.load("quick") == []
    assert not Path("relative").exists()


def test_processor_name_counts_the_usable_cores() -> None:
    assert processor_name().startswith(f"{len(os.sched_getaffinity(0))} x ")
