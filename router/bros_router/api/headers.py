"""The `x-…` headers of a reply: TGI's names and units, and ours."""

from __future__ import annotations

from bros_router.api.call import Call, Timings
from bros_router.request import Admission, Finish, RequestClass
from bros_router.service import ServedModel


def compute_headers(model: ServedModel, prompt: str, request_class: RequestClass) -> dict[str, str]:
    """What is known before anything was generated: every reply and every stream has these."""
    return {
        "x-compute-type": model.compute_type,
        "x-compute-characters": str(len(prompt)),
        "x-request-class": request_class.value,
    }


def terms_headers(call: Call) -> dict[str, str]:
    """On which terms the request was accepted: the targets that were set, in milliseconds, and what became of them."""
    request, terms = call.request, call.generation.terms
    headers = {}
    if terms.targets is not None and request.ttft_s is not None:
        headers["x-slo-ttft-ms"] = _decimal(terms.targets.ttft_s * 1000)
    if terms.targets is not None and request.tpot_s is not None:
        headers["x-slo-tpot-ms"] = _decimal(terms.targets.tpot_s * 1000)
    if terms.admission is not Admission.AS_ASKED:
        headers["x-admission"] = terms.admission.value
    return headers


def timing_headers(call: Call, finish: Finish, timings: Timings) -> dict[str, str]:
    """What is known at the end: milliseconds, rounded down, but for `x-compute-time`, which is in seconds."""
    return {
        "x-compute-time": f"{timings.total_s:.9f}",
        "x-total-time": _milliseconds(timings.total_s),
        "x-validation-time": _milliseconds(timings.validation_s),
        "x-queue-time": _milliseconds(timings.queue_s),
        "x-inference-time": _milliseconds(timings.inference_s),
        "x-time-per-token": _milliseconds(timings.inference_s / finish.num_generated_tokens),
        "x-prompt-tokens": str(len(call.request.prompt_token_ids)),
        "x-generated-tokens": str(finish.num_generated_tokens),
    }


def _decimal(value: float) -> str:
    """As short as it was given: seconds and back are exact to twelve digits."""
    return f"{value:.12g}"


def _milliseconds(seconds: float) -> str:
    return str(int(seconds * 1000))
