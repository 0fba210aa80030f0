"""Everything that can go wrong for a client and how it is told: the one table of public errors."""

from __future__ import annotations

import math
from typing import ClassVar

import msgspec
from aiohttp import web

from bros_router.api.types import ErrorReply
from bros_router.metrics import Failure
from bros_router.service import Phase


class ApiError(Exception):
    """An error that the client gets as TGI's JSON object. The message is public."""

    status: ClassVar[int]
    error_type: ClassVar[str]
    #: How a call that ends this way is counted.
    failure: ClassVar[Failure] = "internal"
    #: Whether the connection cannot, or should not, be used again.
    closes_connection: bool = False
    #: Why, in a word, where TGI has no such error.
    code: ClassVar[str | msgspec.UnsetType] = msgspec.UNSET

    def body(self) -> bytes:
        """The JSON object."""
        return msgspec.json.encode(ErrorReply(str(self), self.error_type, self.code))

    def headers(self) -> dict[str, str]:
        """Headers of the response."""
        return {}


class ValidationError(ApiError):
    """The request breaks a rule of the contract."""

    status, error_type, failure = 422, "validation", "validation"

    def __init__(self, message: str) -> None:
        super().__init__(f"Input validation error: {message}")


class TemplateApiError(ApiError):
    """The chat template gave no prompt, or there is none."""

    status, error_type, failure = 422, "template_error", "template"

    def __init__(self, reason: str) -> None:
        super().__init__(f"Template error: {reason}")


class ToolApiError(ApiError):
    """The tools of a chat cannot be used, or the model's reply calls none of them."""

    status, error_type, failure = 422, "tool_error", "validation"

    def __init__(self, reason: str) -> None:
        super().__init__(f"Tool error: {reason}")


class SuffixError(ApiError):
    """Completions do not fill in between."""

    status, error_type, failure = 422, "suffix not supported", "validation"

    def __init__(self) -> None:
        super().__init__("Suffix is not supported and can be achieved by preprocessing the prompt.")


class ClientBatchSizeError(ApiError):
    """Too many prompts in one request."""

    status, error_type, failure = 422, "batch size exceeded", "validation"

    def __init__(self, max_client_batch_size: int) -> None:
        super().__init__(f"Number of prompts exceeds the maximum allowed batch size of {max_client_batch_size}")


class NoInstancesError(ApiError):
    """A body of Vertex AI that asks for nothing."""

    status, error_type, failure = 422, "Input validation error", "validation"

    def __init__(self) -> None:
        super().__init__("Input validation error")


class Utf8Error(ApiError):
    """A prompt of KServe that is no text, in the words of TGI's language."""

    status, error_type, failure = 422, "utf8", "validation"

    def __init__(self, error: UnicodeDecodeError) -> None:
        if error.reason == "unexpected end of data":
            super().__init__(f"incomplete utf-8 byte sequence from index {error.start}")
        else:
            num_bytes = error.end - error.start
            super().__init__(f"invalid utf-8 sequence of {num_bytes} bytes from index {error.start}")


class LengthMismatchError(ApiError):
    """A body of KServe with another number of outputs than of inputs."""

    status, error_type, failure = 422, "length mismatch", "validation"

    def __init__(self) -> None:
        super().__init__("Inputs and outputs length mismatch")


class OverloadedApiError(ApiError):
    """No concurrency permit, or a full queue. TGI does not say when to try again."""

    status, error_type = 429, "overloaded"
    failure: ClassVar[Failure] = "overloaded"
    message: ClassVar[str] = "Model is overloaded"

    def __init__(self, retry_after_s: float) -> None:
        super().__init__(self.message)
        self._retry_after_s = retry_after_s

    def headers(self) -> dict[str, str]:
        """`Retry-After`, in whole seconds: none would be an invitation to try at once."""
        return {"Retry-After": str(max(1, math.ceil(self._retry_after_s)))}


class InfeasibleApiError(OverloadedApiError):
    """The target cannot be met, and the operator wants such requests refused. Not TGI's."""

    code = "slo_infeasible"
    message = "Model is overloaded: the latency target cannot be met"


class ExpiredApiError(OverloadedApiError):
    """The deadline passed before any of the request was computed. Not TGI's."""

    failure = "deadline"
    code = "deadline_exceeded"
    message = "Model is overloaded: the deadline passed before the request could run"


class GenerationApiError(ApiError):
    """The engine could not finish the request."""

    status, error_type = 424, "generation"
    failure: ClassVar[Failure] = "generation"

    def __init__(self, message: str) -> None:
        super().__init__(f"Request failed during generation: {message}")


class DeadlineApiError(GenerationApiError):
    """The deadline passed while the request ran. Not TGI's."""

    failure = "deadline"
    code = "deadline_exceeded"


class IncompleteGenerationError(ApiError):
    """The engine's events ended without a last one."""

    status, error_type, failure = 500, "incomplete_generation", "incomplete"

    def __init__(self) -> None:
        super().__init__("Incomplete generation")


class IncompleteStreamError(ApiError):
    """The engine's events ended without a last one, in a stream."""

    status, error_type, failure = 500, "incomplete_generation_stream", "incomplete"

    def __init__(self) -> None:
        super().__init__("Incomplete generation stream")


class UnavailableError(ApiError):
    """The server is not ready. Not TGI's: TGI does not listen before it is, and dies with its shards."""

    status, error_type, failure = 503, "healthcheck", "unavailable"

    def __init__(self, phase: Phase) -> None:
        super().__init__(_UNAVAILABLE[phase])
        self.closes_connection = phase is Phase.DRAINING


_UNAVAILABLE = {
    Phase.RESOLVING: "The server is starting",
    Phase.LOADING: "The server is starting",
    Phase.WARMING: "The server is starting",
    Phase.READY: "The model is restarting",  # ready, but its ranks stopped making progress
    Phase.RESTARTING: "The model is restarting",
    Phase.FAILED: "The model has failed",
    Phase.DRAINING: "The server is shutting down",
}


class UnhealthyError(ApiError):
    """What `/health` says when a request sent now would not be served."""

    status, error_type = 503, "healthcheck"

    def __init__(self) -> None:
        super().__init__("unhealthy")


class BodyTimeoutError(ApiError):
    """The body did not arrive in time. Not TGI's: TGI waits for ever."""

    status, error_type = 408, "timeout"
    closes_connection = True

    def __init__(self) -> None:
        super().__init__("Request body was not received in time")


class InternalError(ApiError):
    """A fault of ours; the log has the details."""

    status, error_type = 500, "internal"

    def __init__(self) -> None:
        super().__init__("Internal server error")


class Rejection(Exception):
    """A request refused before its body was understood: plain text, as TGI's HTTP stack answers."""

    def __init__(self, status: int, text: str) -> None:
        super().__init__(text)
        self.status = status


def unsupported_content_type() -> Rejection:
    """The body is not declared as JSON."""
    return Rejection(415, "Expected request with `Content-Type: application/json`")


def unsupported_content_encoding() -> Rejection:
    """The body is compressed: refused unread, since its true size cannot be known. TGI reads it as bad JSON."""
    return Rejection(415, "Expected request without `Content-Encoding`")


def body_too_large() -> Rejection:
    """The body is longer than the payload limit."""
    return Rejection(413, "Failed to buffer the request body: length limit exceeded")


def unreadable_body() -> Rejection:
    """The body broke HTTP's own framing."""
    return Rejection(400, "Failed to buffer the request body: invalid framing")


def invalid_syntax(reason: str) -> Rejection:
    """The body is not JSON."""
    return Rejection(400, f"Failed to parse the request body as JSON: {reason}")


def invalid_shape(reason: str) -> Rejection:
    """The body is JSON of another shape."""
    return Rejection(422, f"Failed to deserialize the JSON body into the target type: {reason}")


def error_response(error: ApiError | Rejection) -> web.Response:
    """The response that tells the client of `error`."""
    if isinstance(error, Rejection):
        return web.Response(status=error.status, text=str(error))
    response = web.Response(
        status=error.status, body=error.body(), headers=error.headers(), content_type="application/json"
    )
    if error.closes_connection:
        response.force_close()
    return response
