"""Downloads from a hub on this machine: the endpoints that the library asks, with faults on request."""

import hashlib
import http.server
import json
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from bros_router.config import HubConfig
from bros_router.hub import Snapshot, download, weight_files
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


class FakeHub(http.server.ThreadingHTTPServer):
    """One model, `org/model`, with one commit."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.files = dict(FILES)
        #: `(file, bytes)`: end the connection after so many bytes of a file, once.
        self.cut_after: dict[str, int] = {}
        #: Status for every answer, instead of the right one.
        self.status: int | None = None
        self.error_code = ""
        self.downloads: list[tuple[str, str | None]] = []
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
        headers = {"X-Repo-Commit": SHA, "ETag": f'"{hashlib.sha1(content).hexdigest()}"', "Accept-Ranges": "bytes"}
        wanted = self.headers.get("range")
        if self.command == "GET":
            self.server.downloads.append((name, wanted))
        if wanted is None:
            self.answer(200, content, headers, cut_after=self.server.cut_after.pop(name, None))
        else:
            first = int(wanted.removeprefix("bytes=").split("-")[0])
            headers["Content-Range"] = f"bytes {first}-{len(content) - 1}/{len(content)}"
            self.answer(206, content[first:], headers)

    def answer(
        self, status: int, body: bytes, headers: dict[str, str] | None = None, cut_after: int | None = None
    ) -> None:
        self.send_response(status)
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body[:cut_after])
            self.close_connection = self.close_connection or cut_after is not None


@pytest.fixture
def hub_server() -> Iterator[FakeHub]:
    with FakeHub() as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield server
        server.shutdown()
        thread.join()


@pytest.fixture
def hub(hub_server, tmp_path) -> HubConfig:
    return HubConfig(cache_dir=tmp_path / "cache", endpoint=hub_server.endpoint, token="hf_secret")


def fetch(hub: HubConfig, revision: str | None = None) -> Snapshot:
    return download("org/model", revision, hub, lambda done, total: None)


def offline(hub: HubConfig) -> HubConfig:
    return HubConfig(cache_dir=hub.cache_dir, is_offline=True)


def test_what_serving_needs_is_fetched_and_nothing_else(hub, hub_server):
    snapshot = fetch(hub)
    assert (snapshot.sha, snapshot.pipeline_tag) == (SHA, "text-generation")
    fetched = {path.name: path.read_bytes() for path in snapshot.path.iterdir()}
    assert fetched == {name: FILES[name] for name in ("config.json", "tokenizer.json", "model.safetensors")}
    assert hub_server.tokens == {"Bearer hf_secret"}


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
    assert [name for name, _ in hub_server.downloads] == ["config.json"]


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


def test_interrupted_download_is_not_used_and_is_resumed(hub, hub_server, monkeypatch):
    """The connection breaks in the middle of the weights and the hub answers no more: as if the process were killed."""
    monkeypatch.setattr("time.sleep", lambda seconds: setattr(hub_server, "status", 500))
    hub_server.cut_after["model.safetensors"] = 1_500_000
    with pytest.raises(ModelNotFoundError, match="Starting again resumes the download"):
        fetch(hub)
    with pytest.raises(ModelNotFoundError, match="HF_HUB_OFFLINE is set"):
        fetch(offline(hub))
    hub_server.status = None
    hub_server.downloads.clear()
    assert (fetch(hub).path / "model.safetensors").read_bytes() == WEIGHTS
    assert hub_server.downloads == [("model.safetensors", "bytes=1500000-")]


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
