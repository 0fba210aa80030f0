"""Spans as a collector gets them, by OTLP over gRPC."""

import json
import os
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import grpc
import pytest
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import (
    ExportTraceServiceRequest,
    ExportTraceServiceResponse,
)
from opentelemetry.proto.trace.v1.trace_pb2 import Span, Status

SERVER = ("--dtype", "float32", "--kv-cache-memory", "64MiB", "--otlp-service-name", "chat")
TRACE, PARENT = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"


class Collector:
    """A collector that keeps what it gets."""

    def __init__(self) -> None:
        self.requests: list[ExportTraceServiceRequest] = []
        self.server = grpc.server(ThreadPoolExecutor(1))
        export = grpc.unary_unary_rpc_method_handler(
            self._export,
            request_deserializer=ExportTraceServiceRequest.FromString,
            response_serializer=ExportTraceServiceResponse.SerializeToString,
        )
        service = "opentelemetry.proto.collector.trace.v1.TraceService"
        self.server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(service, {"Export": export}),))
        self.endpoint = f"http://127.0.0.1:{self.server.add_insecure_port('127.0.0.1:0')}"
        self.server.start()

    def _export(self, request: ExportTraceServiceRequest, _: object) -> ExportTraceServiceResponse:
        self.requests.append(request)
        return ExportTraceServiceResponse()

    def spans(self) -> Iterator[Span]:
        for request in self.requests:
            for of_server in request.resource_spans:
                assert attributes(of_server.resource)["service.name"] == "chat"
                for of_library in of_server.scope_spans:
                    yield from of_library.spans


@pytest.fixture
def collector() -> Iterator[Collector]:
    collector = Collector()
    yield collector
    collector.server.stop(None)


def attributes(value) -> dict[str, object]:
    return {pair.key: getattr(pair.value, pair.value.WhichOneof("value")) for pair in value.attributes}


def post(url: str, body: dict, **headers: str) -> bytes:
    request = urllib.request.Request(url, json.dumps(body).encode(), {"Content-Type": "application/json", **headers})
    with urllib.request.urlopen(request, timeout=60) as response:
        return response.read()


def test_spans_go_on_with_the_clients_trace_and_reach_the_collector(launch, collector):
    server = launch(*SERVER, "--otlp-endpoint", collector.endpoint).wait_until_ready()
    traceparent = {"traceparent": f"00-{TRACE}-{PARENT}-01"}
    body = {"prompt": ["1", "23"], "max_tokens": 3}
    post(f"{server.url}/v1/completions", body, **traceparent)
    stream = {"inputs": "", "parameters": {"max_new_tokens": 1}}
    post(f"{server.url}/generate_stream", stream, traceparent="nonsense")
    server.get("/health")
    assert server.stop() == 0

    spans = list(collector.spans())
    (root,) = [span for span in spans if span.name == "POST /v1/completions"]
    assert (root.trace_id.hex(), root.parent_span_id.hex()) == (TRACE, PARENT)
    assert attributes(root) == {
        "http.request.method": "POST",
        "url.path": "/v1/completions",
        "http.route": "/v1/completions",
        "http.response.status_code": 200,
    }
    children = [span for span in spans if span.parent_span_id == root.span_id]
    assert [(span.name, span.trace_id.hex()) for span in children] == [("inference", TRACE)] * 2
    for child in children:
        said = attributes(child)
        assert said["class"] == "rt"
        assert said["finish_reason"] in ("length", "eos_token")
        assert 1 <= said["generated_tokens"] <= 3
        assert said["time_per_token"] == pytest.approx(said["inference_time"] / said["generated_tokens"])
        assert said["total_time"] >= said["queue_time"] >= 0
        assert root.start_time_unix_nano <= child.start_time_unix_nano <= child.end_time_unix_nano
    assert sorted(attributes(child)["prompt_tokens"] for child in children) == [1, 2]

    (refused,) = [span for span in spans if span.name == "POST /generate_stream"]
    assert refused.trace_id.hex() != TRACE
    (failed,) = [span for span in spans if span.parent_span_id == refused.span_id]
    assert (failed.status.code, failed.status.message) == (Status.STATUS_CODE_ERROR, "validation")
    assert len(spans) == 5


def test_a_collector_that_is_gone_hinders_nothing(launch, collector):
    collector.server.stop(None).wait()
    server = launch(*SERVER, "--otlp-endpoint", collector.endpoint).wait_until_ready()
    assert post(f"{server.url}/generate", {"inputs": "1", "parameters": {"max_new_tokens": 1}})
    assert server.stop(20) == 0


def test_without_the_packages_the_launcher_says_what_to_install(launch, tmp_path):
    """The real launcher, where the exporter cannot be imported."""
    without = "import sys\nsys.modules['opentelemetry.exporter.otlp.proto.grpc'] = None\n"
    (tmp_path / "sitecustomize.py").write_text(without)
    path = os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")])
    server = launch("--otlp-endpoint", "http://127.0.0.1:1", environment={"PYTHONPATH": path})
    server.wait_for("--otlp-endpoint needs OpenTelemetry's exporter: pip install 'bros[otlp]'.")
    assert server.process.wait(60) == 2
