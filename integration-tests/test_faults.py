"""What goes wrong around a running server, and what its clients see of it."""

import http.client
import json
import os
import signal
import subprocess
import sys
import threading
import urllib.error
from collections.abc import Iterator

import psutil
import pytest
import zmq

from bros_router.model_source import demo_model_path
from bros_shard.options import ShardOptions
from bros_shard.protocol import Fault, Hello, StepPlan, StepResult, decode_from_rank, encode

PROMPT = "Return the"
#: No reply of the demo model ends by itself within a test that sets this many tokens.
LONG = 900


def request_stream(server, *, max_new_tokens=LONG, path="/generate_stream", **parameters) -> http.client.HTTPResponse:
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=60)
    parameters |= {"max_new_tokens": max_new_tokens, "ignore_eos": True}
    body = json.dumps({"inputs": PROMPT, "parameters": parameters})
    connection.request("POST", path, body, {"Content-Type": "application/json"})
    return connection.getresponse()


def events(response: http.client.HTTPResponse) -> Iterator[dict]:
    for line in response:
        if line.startswith(b"data: "):
            yield json.loads(line.removeprefix(b"data: "))


def used_blocks(server) -> float:
    return sum(server.metric(f'bros_kv_blocks{{owner="{name}"}}') for name in ("rt", "be"))


class Background(threading.Thread):
    """Runs a call and keeps what it gave, or raised."""

    def __init__(self, call):
        super().__init__(daemon=True)
        self._call = call
        self.value = None
        self.error = None
        self.start()

    def run(self):
        try:
            self.value = self._call()
        except Exception as error:
            self.error = error

    def result(self, timeout_s=60):
        self.join(timeout_s)
        assert not self.is_alive(), "no answer"
        if self.error is not None:
            raise self.error
        return self.value


def launched(launch, *flags: str):
    """A server in float32 that ends well after all that happened to it."""
    server = launch("--dtype", "float32", *flags).wait_until_ready()
    yield server
    assert server.stop() == 0


@pytest.fixture(scope="module")
def one_rank(launch):
    """A server whose rank fails."""
    yield from launched(launch)


@pytest.fixture(scope="module")
def two_ranks(launch):
    """A server whose ranks fail, and that listens to everybody."""
    yield from launched(launch, "--num-shard", "2", "--hostname", "0.0.0.0")


# --- clients that leave ------------------------------------------------------------------------------------


def test_stream_that_its_client_leaves_frees_its_blocks(server, eventually):
    response = request_stream(server)
    next(events(response))
    assert used_blocks(server) > 0
    response.close()
    eventually(lambda: used_blocks(server) == 0, timeout_s=10)


def test_plain_request_that_its_client_leaves_frees_its_blocks(server, eventually):
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=60)
    body = json.dumps({"inputs": PROMPT, "parameters": {"max_new_tokens": LONG, "ignore_eos": True}})
    connection.request("POST", "/generate", body, {"Content-Type": "application/json"})
    eventually(lambda: used_blocks(server) > 0, timeout_s=30)
    connection.close()
    eventually(lambda: used_blocks(server) == 0, timeout_s=10)


def test_queued_request_that_its_client_leaves_is_forgotten(launch, eventually):
    server = launch("--max-batch-size", "1").wait_until_ready()
    running = request_stream(server)
    next(events(running))
    queued = request_stream(server)
    eventually(lambda: server.metric("tgi_queue_size") == 1, timeout_s=10)
    queued.close()
    eventually(lambda: server.metric("tgi_queue_size") == 0, timeout_s=10)
    assert next(events(running))["token"]
    running.close()
    eventually(lambda: used_blocks(server) == 0, timeout_s=10)
    assert server.stop() == 0


# --- overload ----------------------------------------------------------------------------------------------


def test_request_over_the_limit_gets_429_at_once_and_the_others_go_on(launch):
    server = launch("--max-concurrent-requests", "2").wait_until_ready()
    streams = [request_stream(server) for _ in range(2)]
    first = [next(events(stream)) for stream in streams]
    refused = request_stream(server, path="/generate")
    assert refused.status == 429
    assert json.load(refused) == {"error": "Model is overloaded", "error_type": "overloaded"}
    assert [next(events(stream))["index"] for stream in streams] == [event["index"] + 1 for event in first]
    server.process.kill()


# --- the end of the server ---------------------------------------------------------------------------------


def test_sigterm_lets_replies_finish_and_refuses_new_requests(launch, eventually):
    server = launch().wait_until_ready()
    stream = request_stream(server, max_new_tokens=400)
    next(events(stream))
    server.process.send_signal(signal.SIGTERM)
    server.wait_for("draining")
    with pytest.raises(urllib.error.HTTPError) as unhealthy:
        server.get("/health")
    assert unhealthy.value.code == 503
    refused = request_stream(server)
    assert refused.status == 503
    assert refused.headers["Connection"] == "close"
    assert json.load(refused)["error_type"] == "healthcheck"
    last = list(events(stream))[-1]
    assert last["index"] == 400
    assert last["generated_text"] is not None
    assert server.process.wait(60) == 0


def test_grace_period_ends_what_is_left_with_an_error_event(launch):
    server = launch("--graceful-termination-timeout", "1").wait_until_ready()
    streams = [request_stream(server) for _ in range(4)]
    for stream in streams:
        next(events(stream))
    os.kill(server.ranks[0].pid, signal.SIGSTOP)  # nothing can finish any more
    server.process.send_signal(signal.SIGTERM)
    for stream in streams:
        last = list(events(stream))[-1]
        assert last["error_type"] == "generation"
    assert server.process.wait(60) == 0


def test_second_signal_ends_at_once(launch):
    server = launch().wait_until_ready()
    stream = request_stream(server)
    next(events(stream))
    server.process.send_signal(signal.SIGINT)
    server.wait_for("draining")
    server.process.send_signal(signal.SIGINT)
    assert list(events(stream))[-1]["error_type"] == "generation"
    assert server.process.wait(20) == 0


def test_killed_launcher_leaves_no_process_and_its_folder_is_swept(launch, eventually, tmp_path):
    environment = {"TMPDIR": str(tmp_path)}
    first = launch("--num-shard", "2", environment=environment).wait_until_ready()
    ranks = first.ranks
    assert len(ranks) == 2
    next(events(request_stream(first)))
    first.process.kill()
    eventually(lambda: not any(psutil.pid_exists(rank.pid) and rank.is_running() for rank in ranks), timeout_s=20)
    assert list(tmp_path.iterdir()) != []
    second = launch(environment=environment).wait_until_ready()
    assert len(list(tmp_path.iterdir())) == 1
    assert second.stop() == 0
    assert list(tmp_path.iterdir()) == []


# --- ranks that fail ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("ranks", ["one_rank", "two_ranks"])
def test_killed_rank_is_replaced_and_every_reply_goes_on_unchanged(eventually, ranks, request):
    server = request.getfixturevalue(ranks)
    sampled = {"do_sample": True, "seed": 11, "temperature": 0.8, "watermark": True}
    undisturbed = [event["token"]["id"] for event in events(request_stream(server, max_new_tokens=120, **sampled))]
    stream = events(request_stream(server, max_new_tokens=120, **sampled))
    tokens = [next(stream)["token"]["id"] for _ in range(10)]
    victim = server.ranks[-1]
    victim.kill()
    tokens += [event["token"]["id"] for event in stream]
    assert tokens == undisturbed
    assert victim.pid not in [rank.pid for rank in server.ranks]
    eventually(lambda: server.get("/health") == "", timeout_s=30)


def test_rank_that_falls_silent_is_replaced(one_rank):
    undisturbed = [event["token"]["id"] for event in events(request_stream(one_rank, max_new_tokens=60))]
    stream = events(request_stream(one_rank, max_new_tokens=60))
    tokens = [next(stream)["token"]["id"] for _ in range(5)]
    os.kill(one_rank.ranks[0].pid, signal.SIGSTOP)
    while "silent" not in one_rank.wait_for("ranks failed")["reason"]:
        pass  # the one that was killed before
    assert tokens + [event["token"]["id"] for event in stream] == undisturbed


def test_rank_told_to_end_from_outside_drains_the_server(launch):
    server = launch().wait_until_ready()
    stream = request_stream(server, max_new_tokens=100)
    next(events(stream))
    server.ranks[0].terminate()
    server.wait_for("draining")
    assert list(events(stream))[-1]["generated_text"] is not None
    assert server.process.wait(60) == 0


def test_malformed_and_stale_frames_are_dropped_and_counted(server, eventually):
    response = request_stream(server)
    stream = events(response)
    next(stream)
    command = server.ranks[0].cmdline()
    endpoint = command[command.index("--endpoint") + 1]
    context = zmq.Context()
    for identity, frame in [
        (b"g0/0/0/heartbeat2", b""),
        (b"intruder", b"\x92\xa5hello\x00"),
        (b"g0/9/0/steps", b"\x92\xa5drain\x00"),
        (b"g0/0/7/steps", b"\x92\xa5drain\x07"),
    ]:
        dealer = context.socket(zmq.DEALER)
        dealer.setsockopt(zmq.IDENTITY, identity)
        dealer.connect(endpoint)
        dealer.send(frame)
        dealer.close(linger=2000)
    context.term()
    eventually(lambda: server.metric('bros_frames_dropped_total{reason="malformed"}') == 3, timeout_s=10)
    assert server.metric('bros_frames_dropped_total{reason="stale"}') == 1
    assert next(stream)["token"]
    assert server.get("/health") == ""
    response.close()


def test_rank_that_sees_a_gap_in_the_steps_faults_and_its_group_is_restarted(launch, tmp_path):
    """A second router, on a socket of its own, drives a rank directly: plan 0, then plan 5."""
    context = zmq.Context()
    router = context.socket(zmq.ROUTER)
    router.setsockopt(zmq.RCVTIMEO, 60_000)
    endpoint = f"ipc://{tmp_path}/shards"
    router.bind(endpoint)
    options = ShardOptions(
        endpoint=endpoint,
        rendezvous=f"file://{tmp_path}/rendezvous",
        model_path=str(demo_model_path()),
        model_id="demo",
        kv_memory_bytes=16 << 20,
    )
    rank = subprocess.Popen([sys.executable, "-m", "bros_shard", *options.to_argv()], stderr=subprocess.DEVNULL)

    def next_of(kind):
        while True:
            identity, frame = router.recv_multipart()
            message = decode_from_rank(frame)
            if isinstance(message, kind):
                return identity, message

    identity, hello = next_of(Hello)
    assert hello.rank == 0
    router.send_multipart([identity, encode(StepPlan(0, 0))])
    assert next_of(StepResult)[1].step_id == 0
    router.send_multipart([identity, encode(StepPlan(0, 5))])
    assert "step 5 instead of 1" in next_of(Fault)[1].reason
    assert rank.wait(30) != 0
    router.close(linger=0)
    context.term()


# --- who listens -------------------------------------------------------------------------------------------


def test_http_port_is_the_only_listener_beyond_loopback(two_ranks):
    assert len(list(events(request_stream(two_ranks, max_new_tokens=2)))) == 2
    listening = subprocess.run(["ss", "-Hltnp"], capture_output=True, text=True, check=True).stdout.splitlines()
    ours = {two_ranks.process.pid, *(rank.pid for rank in two_ranks.ranks)}
    addresses = [line.split()[3] for line in listening if any(f"pid={pid}," in line for pid in ours)]
    beyond_loopback = [a for a in addresses if not a.startswith(("127.", "[::1]"))]
    assert beyond_loopback == [f"0.0.0.0:{two_ranks.port}"]
