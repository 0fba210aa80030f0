"""Spans of requests for an OpenTelemetry collector. Where there is none they go nowhere, and cost next to nothing."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Final

from aiohttp import web
from aiohttp.typedefs import Handler
from opentelemetry import trace
from opentelemetry.trace import Span, SpanKind, StatusCode
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

from bros_router.about import server_version
from bros_router.config import TraceConfig
from bros_router.request import RequestClass
from bros_router.startup_error import UsageError

#: How long one export may take, and so the last one, at the end of the server.
_EXPORT_TIMEOUT_S: Final = 3

_tracer = trace.get_tracer("bros", server_version())
_propagator = TraceContextTextMapPropagator()


@contextmanager
def exporting(config: TraceConfig) -> Iterator[None]:
    """Send spans to the collector inside the `with` block, if there is one; what is left is sent at its end.

    Raises:
        UsageError: the packages that this takes are not installed.
    """
    if config.otlp_endpoint is None:
        yield
        return
    try:
        from opentelemetry.exporter.otlp.proto.grpc.trace_exporter import OTLPSpanExporter
        from opentelemetry.sdk.resources import Resource
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.sdk.trace.export import BatchSpanProcessor
    except ImportError:
        raise UsageError("--otlp-endpoint needs OpenTelemetry's exporter: pip install 'bros[otlp]'.") from None
    resource = Resource.create({"service.name": config.otlp_service_name, "service.version": server_version()})
    provider = TracerProvider(resource=resource, shutdown_on_exit=False)
    exporter = OTLPSpanExporter(endpoint=config.otlp_endpoint, timeout=_EXPORT_TIMEOUT_S)
    provider.add_span_processor(BatchSpanProcessor(exporter))
    trace.set_tracer_provider(provider)
    try:
        yield
    finally:
        provider.shutdown()


@web.middleware
async def trace_request(request: web.Request, handler: Handler) -> web.StreamResponse:
    """A span for each POST, named by OpenTelemetry's conventions. It goes on with the client's trace, if it has one."""
    if request.method != "POST":
        return await handler(request)
    resource = request.match_info.route.resource
    route = {} if resource is None else {"http.route": resource.canonical}
    with _tracer.start_as_current_span(
        " ".join(["POST", *route.values()]),
        _propagator.extract(request.headers),
        kind=SpanKind.SERVER,
        attributes={"http.request.method": "POST", "url.path": request.path, **route},
        record_exception=False,
    ) as span:
        response = await handler(request)
        span.set_attribute("http.response.status_code", response.status)
        if response.status >= 500:
            span.set_status(StatusCode.ERROR)
        return response


def inference_span(request_id: str, request_class: RequestClass) -> Span:
    """The span of one generation, of which a request may have several. Whoever starts it ends it."""
    return _tracer.start_span("inference", attributes={"request_id": request_id, "class": request_class.value})


def note_failure(span: Span, error_type: str) -> None:
    """The generation failed, or was refused."""
    span.set_status(StatusCode.ERROR, error_type)


def note_success(
    span: Span,
    *,
    total_s: float,
    validation_s: float,
    queue_s: float,
    inference_s: float,
    num_prompt_tokens: int,
    num_generated_tokens: int,
    finish_reason: str,
) -> None:
    """The generation has ended: where its time went, in seconds and under TGI's names, and what it was."""
    span.set_attributes(
        {
            "total_time": total_s,
            "validation_time": validation_s,
            "queue_time": queue_s,
            "inference_time": inference_s,
            "time_per_token": inference_s / num_generated_tokens,
            "prompt_tokens": num_prompt_tokens,
            "generated_tokens": num_generated_tokens,
            "finish_reason": finish_reason,
        }
    )
