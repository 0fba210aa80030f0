"""The `x-…` headers of a reply: TGI's names and units, and ours."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from bros_router.api.call import Call, WholeReply
from bros_router.request import Admission, RequestClass
from bros_router.service import ServedModel


def compute_headers(model: ServedModel, num_prompt_characters: int, request_class: RequestClass) -> dict[str, str]:
    """What is known before anything was generated: every reply and every stream has these."""
    return {
        "x-compute-type": model.compute_type,
        "x-compute-characters": str(num_prompt_characters),
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


def timing_headers(replies: Sequence[WholeReply]) -> dict[str, str]:
    """What is known at the end, summed over the replies of one request: milliseconds, each rounded down, and tokens."""
    return {
        "x-total-time": _milliseconds(reply.timings.total_s for reply in replies),
        "x-validation-time": _milliseconds(reply.timings.validation_s for reply in replies),
        "x-queue-time": _milliseconds(reply.timings.queue_s for reply in replies),
        "x-inference-time": _milliseconds(reply.timings.inference_s for reply in replies),
        "x-time-per-token": _milliseconds(
            reply.timings.inference_s / reply.finish.num_generated_tokens for reply in replies
        ),
        "x-prompt-tokens": str(num_prompt_tokens(replies)),
        "x-generated-tokens": str(sum(reply.finish.num_generated_tokens for reply in replies)),
    }


def num_prompt_tokens(replies: Iterable[WholeReply]) -> int:
    """Of all prompts of one request; several replies to one prompt count it once."""
    return sum({reply.call.request.request_id: reply.num_prompt_tokens for reply in replies}.values())


def compute_time_header(reply: WholeReply) -> dict[str, str]:
    """The whole time in seconds: replies to several prompts go without."""
    return {"x-compute-time": f"{reply.timings.total_s:.9f}"}


def _decimal(value: float) -> str:
    """As short as it was given: seconds and back are exact to twelve digits."""
    return f"{value:.12g}"


def _milliseconds(times_s: Iterable[float]) -> str:
    return str(sum(int(time_s * 1000) for time_s in times_s))
