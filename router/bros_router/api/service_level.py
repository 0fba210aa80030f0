"""How urgent a request is: its class, its targets and its deadline, as its headers, its body and the operator say."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import msgspec

from bros_router.api.errors import ValidationError
from bros_router.config import ApiConfig
from bros_router.request import RequestClass

_number = msgspec.json.Decoder(float)


@dataclass(frozen=True, slots=True)
class ServiceLevel:
    """What is known of a request before its body is judged. Fields as those of `ValidRequest`."""

    request_class: RequestClass
    ttft_s: float | None = None
    tpot_s: float | None = None
    deadline_s: float | None = None

    @property
    def has_given_target(self) -> bool:
        """Whether somebody said when the first token is due; who misses that is counted."""
        return self.ttft_s is not None


def service_level(headers: Mapping[str, str], body_class: RequestClass | None, config: ApiConfig) -> ServiceLevel:
    """Headers go before the body, and the body before the operator's defaults.

    A target without a class means real-time; a best-effort request has no targets, whatever its headers say.

    Args:
        body_class: the class that the body names, if it does.

    Raises:
        ValidationError: a header has no valid value, be it used or not.
    """
    named_class = _class(headers.get("x-request-class"))
    ttft_s = _seconds(headers, "x-slo-ttft-ms")
    tpot_s = _seconds(headers, "x-slo-tpot-ms")
    deadline_s = _seconds(headers, "x-request-deadline-ms")
    if named_class is None and (ttft_s is not None or tpot_s is not None):
        named_class = RequestClass.RT
    request_class = named_class or body_class or RequestClass(config.default_class)
    if request_class is RequestClass.BE:
        return ServiceLevel(RequestClass.BE, deadline_s=deadline_s)
    if ttft_s is None and config.slo_ttft_ms is not None:
        ttft_s = config.slo_ttft_ms / 1000
    if tpot_s is None and config.slo_tpot_ms is not None:
        tpot_s = config.slo_tpot_ms / 1000
    return ServiceLevel(RequestClass.RT, ttft_s, tpot_s, deadline_s)


def _class(header: str | None) -> RequestClass | None:
    try:
        return None if header is None else RequestClass(header)
    except ValueError:
        raise ValidationError("`x-request-class` must be `rt` or `be`") from None


def _seconds(headers: Mapping[str, str], name: str) -> float | None:
    """A header in milliseconds: a number as JSON writes it, so neither NaN nor infinite."""
    header = headers.get(name)
    if header is None:
        return None
    try:
        seconds = _number.decode(header.encode(errors="surrogateescape")) / 1000
    except (msgspec.DecodeError, UnicodeDecodeError):
        seconds = math.nan
    if not seconds > 0.0:
        raise ValidationError(f"`{name}` must be a number of milliseconds, and strictly positive")
    return seconds
