"""Downloads from a hub on this machine: the endpoints that the library asks, with faults on request."""

import hashlib
import http.server
import json
import os
import resource
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from bros_router.config import HubConfig
from bros_router.hub import Snapshot, download, download_adapter, weight_files
from bros_router.startup_error import CheckpointError, ModelNotFoundError

SHA = "0123456789abcdef0123456789abcdef01234567"
WEIGHTS = bytes(range(256)) * 8192  # 2 MiB: several reads
FILES = {
    "config.json": b"{}",
    "tokenizer.json": b'{"a": 1}',
    "model.safetensors": WEIGHTS,
    "model.fp16.safetensors": b"another format",
    "pytorch_model.bin": b"pickled",
    "modeling.py": b"code",
    "original/params.json": b"{}",
}

KILLED_DOWNLOAD = """
import sys
from pathlib import Path
from bros_router.config import HubConfig
from bros_router.hub import download
hub = HubConfig(cache_dir=Path(sys.argv[1]), endpoint=sys.argv[2])
download("org/model", None, hub, lambda done, total: None)
"""


class FakeHub(http.server.ThreadingHTTPServer):
    """One model, `org/model`, with one commit."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.files = dict(FILES)
        #: Send so many bytes of a file and then, until the server ends, nothing.
        self.stall_after: dict[str, int] = {}
        self.is_ending = threading.Event()
        #: Status for every answer, instead of the right one.
        self.status: int | None = None
        self.error_code = ""
        self.downloads: list[str] = []
        self.tokens: set[str | None] = set()
        self.endpoint = f"http://127.0.0.1:{self.server_address[1]}"

    def handle_error(self, request: object, client_address: object) -> None:
        """A client that hangs up is no news."""


class Handler(http.server.BaseHTTPRequestHandler):
    server: FakeHub
    protocol_version = "HTTP/1.1"

    def log_message(self, *arguments: object) -> None:
        """Quiet."""

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        self.server.tokens.add(self.headers.get("authorization"))
        path = self.path.split("?")[0]
        if self.server.status is not None:
            self.answer(self.server.status, b"", {"X-Error-Code": self.server.error_code})
        elif path in (f"/api/models/org/model/revision/{name}" for name in ("main", SHA)):
            info = {"id": "org/model", "sha": SHA, "pipeline_tag": "text-generation", "siblings": []}
            self.answer(200, json.dumps(info).encode())
        elif path.startswith("/api/models/org/model/revision/"):
            self.answer(404, b"", {"X-Error-Code": "RevisionNotFound"})
        elif path == f"/api/models/org/model/tree/{SHA}":
            entries = [
                {"type": "file", "path": name, "size": len(content), "oid": hashlib.sha1(content).hexdigest()}
                for name, content in self.server.files.items()
            ]
            self.answer(200, json.dumps(entries).encode())
        elif path.startswith(f"/org/model/resolve/{SHA}/"):
            self.send_file(path.removeprefix(f"/org/model/resolve/{SHA}/"))
        else:
            self.answer(404, b"", {"X-Error-Code": "RepoNotFound"})

    def send_file(self, name: str) -> None:
        content = self.server.files[name]
        headers = {"X-Repo-Commit": SHA, "ETag": f'"{hashlib.sha1(content).hexdigest()}"'}
        if self.command == "HEAD":
            self.answer(200, content, headers)
        else:
            self.server.downloads.append(name)
            self.answer(200, content, headers, stall_after=self.server.stall_after.pop(name, None))

    def answer(
        self, status: int, body: bytes, headers: dict[str, str] | None = None, stall_after: int | None = None
    ) -> None:
        self.send_response(status)
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body[:stall_after])
            if stall_after is not None:
                self.server.is_ending.wait()


@pytest.fixture
def hub_server() -> Iterator[FakeHub]:
    with FakeHub() as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield server
        server.is_ending.set()
        server.shutdown()
        thread.join()


@pytest.fixture
def hub(hub_server, tmp_path) -> HubConfig:
    return HubConfig(cache_dir=tmp_path / "cache", endpoint=hub_server.endpoint, token="hf_secret")


def fetch(hub: HubConfig, revision: str | None = None) -> Snapshot:
    return download("org/model", revision, hub, lambda done, total: None)


def is_cached(hub: HubConfig, name: str) -> bool:
    assert hub.cache_dir is not None
    return (hub.cache_dir / "models--org--model" / "snapshots" / SHA / name).exists()


def offline(hub: HubConfig) -> HubConfig:
    return HubConfig(cache_dir=hub.cache_dir, is_offline=True)


def test_what_serving_needs_is_fetched_and_nothing_else(hub, hub_server):
    snapshot = fetch(hub)
    assert (snapshot.sha, snapshot.pipeline_tag) == (SHA, "text-generation")
    fetched = {path.name: path.read_bytes() for path in snapshot.path.iterdir()}
    assert fetched == {name: FILES[name] for name in ("config.json", "tokenizer.json", "model.safetensors")}
    assert hub_server.tokens == {"Bearer hf_secret"}


def test_of_an_adapters_repository_only_the_adapter_is_fetched(hub, hub_server):
    """Some hold the merged model as well."""
    adapter = {"adapter_config.json": b'{"r": 4}', "adapter_model.safetensors": b"factors"}
    hub_server.files |= adapter | {"adapter_model.bin": b"pickled"}
    folder = download_adapter("org/model", SHA, hub, lambda done, total: None)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == adapter
    assert download_adapter("org/model", SHA, offline(hub), lambda done, total: None) == folder


def test_progress_counts_the_bytes_of_the_weights(hub):
    seen: list[tuple[int, int]] = []
    download("org/model", None, hub, lambda done, total: seen.append((done, total)))
    assert seen[-1] == (len(WEIGHTS), len(WEIGHTS))
    assert seen == sorted(seen)


def test_weights_are_those_that_the_index_names(hub, hub_server):
    index = {"weight_map": {"a": "part-1.safetensors", "b": "part-2.safetensors", "c": "part-1.safetensors"}}
    hub_server.files |= {
        "model.safetensors.index.json": json.dumps(index).encode(),
        "part-1.safetensors": b"1",
        "part-2.safetensors": b"2",
        "consolidated.safetensors": b"the same once more",
    }
    names = {path.name for path in fetch(hub).path.glob("*.safetensors")}
    assert names == {"part-1.safetensors", "part-2.safetensors"}


def test_weights_of_an_unusual_name_are_found(hub, hub_server):
    del hub_server.files["model.safetensors"], hub_server.files["model.fp16.safetensors"]
    hub_server.files["diffusion.safetensors"] = b"x"
    assert [path.name for path in fetch(hub).path.glob("*.safetensors")] == ["diffusion.safetensors"]


def test_pickled_weights_are_not_fetched(hub, hub_server):
    hub_server.files = {"config.json": b"{}", "pytorch_model.bin": b"pickled"}
    with pytest.raises(CheckpointError, match="has no safetensors weights"):
        fetch(hub)
    assert hub_server.downloads == ["config.json"]


def test_complete_snapshot_serves_without_a_network(hub, hub_server):
    path = fetch(hub).path
    again = fetch(offline(hub))
    assert (again.path, again.sha, again.pipeline_tag) == (path, SHA, None)


def test_complete_snapshot_serves_while_the_hub_is_down(hub, hub_server):
    path = fetch(hub).path
    hub_server.status = 503
    assert fetch(hub).path == path


def test_second_download_fetches_nothing(hub, hub_server):
    fetch(hub)
    hub_server.downloads.clear()
    fetch(hub)
    assert hub_server.downloads == []


def test_download_that_was_killed_is_not_used_and_is_completed(hub, hub_server):
    index = {"weight_map": {"a": "part-1.safetensors", "b": "part-2.safetensors"}}
    hub_server.files |= {
        "model.safetensors.index.json": json.dumps(index).encode(),
        "part-1.safetensors": WEIGHTS,
        "part-2.safetensors": WEIGHTS[::-1],
    }
    hub_server.stall_after["part-2.safetensors"] = 1_000_000
    command = [sys.executable, "-c", KILLED_DOWNLOAD, str(hub.cache_dir), hub_server.endpoint]
    with subprocess.Popen(command) as process:
        deadline_s = time.monotonic() + 60
        while hub_server.stall_after or not is_cached(hub, "part-1.safetensors"):
            assert time.monotonic() < deadline_s
            time.sleep(0.01)
        process.kill()
    assert not is_cached(hub, "part-2.safetensors")
    with pytest.raises(ModelNotFoundError, match="HF_HUB_OFFLINE is set"):
        fetch(offline(hub))
    hub_server.downloads.clear()
    assert (fetch(hub).path / "part-2.safetensors").read_bytes() == WEIGHTS[::-1]
    assert hub_server.downloads == ["part-2.safetensors"]


@pytest.mark.parametrize(
    ("status", "error_code", "reason"),
    [
        (404, "RepoNotFound", "is neither a local folder nor a model on the hub"),
        (401, "RepoNotFound", "is neither a local folder nor a model on the hub"),
        (403, "GatedRepo", "is gated: accept its terms on the hub and set HF_TOKEN"),
        (500, "", "and the hub cannot be reached"),
    ],
)
def test_hub_says_no(hub, hub_server, status, error_code, reason):
    hub_server.status, hub_server.error_code = status, error_code
    with pytest.raises(ModelNotFoundError, match=reason):
        fetch(hub)


def test_unknown_revision(hub):
    with pytest.raises(ModelNotFoundError, match="org/model has no revision 'nightly' on the hub"):
        fetch(hub, "nightly")


def test_nobody_listens(tmp_path):
    hub = HubConfig(cache_dir=tmp_path, endpoint="http://127.0.0.1:9")
    with pytest.raises(ModelNotFoundError, match="and the hub cannot be reached"):
        fetch(hub)


@pytest.mark.parametrize("model_id", ["/no/such/folder", "./missing", "a/b/c", "org/" + "x" * 100, "org/mo del"])
def test_name_that_no_model_can_have(model_id, hub):
    with pytest.raises(ModelNotFoundError, match="neither a local folder nor a name of a model on the hub"):
        download(model_id, None, hub, lambda done, total: None)


def test_cache_that_cannot_be_written(hub, tmp_path):
    (tmp_path / "file").touch()
    config = HubConfig(cache_dir=tmp_path / "file" / "cache", endpoint=hub.endpoint)
    with pytest.raises(ModelNotFoundError, match=r"org/model could not be downloaded \(Not a directory\)"):
        fetch(config)


@pytest.mark.parametrize(
    "index",
    [
        "not json",
        "[]",
        "{}",
        '{"weight_map": []}',
        '{"weight_map": {"a": 1}}',
        '{"weight_map": {"a": "../../secret.safetensors"}}',
        '{"weight_map": {"a": "/etc/passwd"}}',
        '{"weight_map": {"a": "model.bin"}}',
    ],
)
def test_broken_index(tmp_path: Path, index):
    (tmp_path / "model.safetensors.index.json").write_text(index)
    with pytest.raises(CheckpointError, match=r"model\.safetensors\.index\.json"):
        weight_files(tmp_path)


def run_download_command(
    hub: HubConfig, max_file_bytes: int = resource.RLIM_INFINITY
) -> subprocess.CompletedProcess[str]:
    """`bros download-weights`, with a limit on the size of any file that it writes: a small disk."""
    command = [sys.executable, "-m", "bros_router", "download-weights", "org/model"]
    return subprocess.run(
        [*command, "--huggingface-hub-cache", str(hub.cache_dir)],
        env=os.environ | {"HF_ENDPOINT": str(hub.endpoint), "HF_TOKEN": "hf_secret"},
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (max_file_bytes, max_file_bytes)),
        capture_output=True,
        text=True,
        timeout=60,
    )


def test_command_prints_where_the_model_is(hub):
    ended = run_download_command(hub)
    assert ended.returncode == 0
    assert (Path(ended.stdout.strip()) / "model.safetensors").read_bytes() == WEIGHTS
    assert "hf_secret" not in ended.stderr


def test_full_disk_is_one_line_and_its_own_exit_status(hub):
    ended = run_download_command(hub, max_file_bytes=1_000_000)
    assert ended.returncode == 3
    assert "org/model could not be downloaded (File too large)" in ended.stderr
    assert "Traceback" not in ended.stderr
    assert not is_cached(hub, "model.safetensors")
