"""What is measured: TGI's series under TGI's names, ours beside them, and the text that `/metrics` answers."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Final, Literal, TypeAlias

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

from bros_router.request import Admission, RequestClass
from bros_shard.protocol import MAX_SPECULATIVE_TOKENS

#: How a request may end badly; `deadline`, `unavailable` and `internal` are ours.
Failure: TypeAlias = Literal[
    "validation", "template", "overloaded", "generation", "incomplete", "dropped", "deadline", "unavailable", "internal"
]
#: How a request may end.
Outcome: TypeAlias = Literal["success"] | Failure
#: Where copied blocks went: to the host pool, or back to the KV region.
CopyDirection: TypeAlias = Literal["out", "in"]
#: A step that has any prefill in it counts as `prefill`.
Method: TypeAlias = Literal["prefill", "decode"]

#: Why new sequences join others, in TGI's words: prefill and decode share steps.
_JOINED: Final = "chunking"

#: TGI's bounds, in seconds: 0.15 ms to 145.6 s.
_DURATION_BUCKETS: Final = tuple(0.0001 * 1.5 ** (k + 1) for k in range(35))
_BATCH_SIZE_BUCKETS: Final = tuple(range(1, 1025))
#: Ours, in seconds: fine where latency targets lie.
_TTFT_BUCKETS: Final = (0.01, 0.025, 0.05, 0.1, 0.2, 0.3, 0.5, 0.75, 1.0, 1.5, 2.0, 3.0, 5.0, 10.0, 30.0, 60.0)
_INTER_TOKEN_BUCKETS: Final = (
    0.002, 0.005, 0.01, 0.015, 0.02, 0.03, 0.04, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.5, 1.0, 2.0,
)  # fmt: skip
_ERROR_BUCKETS: Final = (0.01, 0.02, 0.05, 0.1, 0.15, 0.2, 0.3, 0.5, 1.0, 2.0, 5.0)


class Metrics:
    """One server's measurements. Callers say what happened; the names are chosen here.

    Every label has a fixed set of values, so the number of series is bounded.
    """

    def __init__(self) -> None:
        self._registry = CollectorRegistry()
        self._request_count = self._counter("tgi_request_count", "Requests received")
        self._request_success = self._counter("tgi_request_success", "Requests answered in full")
        self._request_failure = self._counter("tgi_request_failure", "Requests that failed, by reason", "err")
        self._request_duration = self._duration("tgi_request_duration", "From arrival to the last token")
        self._request_validation = self._duration("tgi_request_validation_duration", "From arrival to the queue")
        self._request_queue = self._duration("tgi_request_queue_duration", "From the queue to the first step")
        self._request_inference = self._duration(
            "tgi_request_inference_duration", "From the first step to the last token"
        )
        self._request_time_per_token = self._duration(
            "tgi_request_mean_time_per_token_duration", "Inference time divided by generated tokens"
        )
        self._lengths: _LengthHistograms | None = None

        self._queue_size = self._gauge("tgi_queue_size", "Requests that wait for their first step")
        self._batch_size = self._gauge("tgi_batch_current_size", "Sequences in the last step")
        self._batch_max_tokens = self._gauge(
            "tgi_batch_current_max_tokens", "Tokens that the sequences of the last step may grow to"
        )
        self._batch_max_total_tokens = self._gauge(
            "tgi_batch_max_total_tokens", "Tokens that the KV region holds: the most of all sequences together"
        )
        self._batch_next_size = Histogram(
            "tgi_batch_next_size",
            "Sequences that began in a step",
            buckets=_BATCH_SIZE_BUCKETS,
            registry=self._registry,
        )
        self._batch_concat = self._counter(
            "tgi_batch_concat", "Steps in which new sequences joined those that run, by reason", "reason"
        )
        self._step_count = self._counter("tgi_batch_inference_count", "Steps sent to the ranks", "method")
        self._step_success = self._counter("tgi_batch_inference_success", "Steps that gave a result", "method")
        self._step_failure = self._counter("tgi_batch_inference_failure", "Steps lost with their ranks", "method")
        self._step_duration = self._duration("tgi_batch_inference_duration", "From plan to result", "method")
        self._forward_duration = self._duration("tgi_batch_forward_duration", "Forward pass", "method")
        self._sampling_duration = self._duration("tgi_batch_decode_duration", "Choosing the tokens", "method")
        self._joining_duration = self._duration(
            "tgi_batch_concat_duration", "Planning a step in which new sequences join those that run", "method"
        )
        self._taking_in_duration = self._duration(
            "tgi_batch_filter_duration", "Taking in what a step gave, and letting go what ended", "method"
        )

        self._classes = _ClassSeries(self._registry)
        self._kv_blocks = Gauge("bros_kv_blocks", "KV blocks by owner", ["owner"], registry=self._registry)
        self._copied_blocks = self._counter(
            "bros_kv_blocks_copied_total", "KV blocks copied to the host and back, by direction", "direction"
        )
        self._rank_step = self._duration("bros_rank_step_duration", "A step on rank 0, from plan to result")
        self._rank_idle = self._duration(
            "bros_rank_idle_duration", "Rank 0 between a result and the next plan, while there was work"
        )
        self._step_error = Histogram(
            "bros_step_prediction_error",
            "How far the predicted time of a step is off, as a share of its time",
            buckets=_ERROR_BUCKETS,
            registry=self._registry,
        )
        self._step_margin = self._gauge(
            "bros_step_prediction_margin", "What predicted step times are multiplied by before deadlines are judged"
        )
        self._interruptions = Counter(
            "bros_steps_interrupted_total",
            "Steps that real-time prompts were run in the middle of",
            registry=self._registry,
        )
        self._skipped_tokens = Histogram(
            "tgi_request_skipped_tokens",
            "Tokens that a guess brought beyond the next one, for each sequence and step with guesses",
            buckets=range(MAX_SPECULATIVE_TOKENS + 1),
            registry=self._registry,
        )
        self._speculative_tokens = self._counter(
            "bros_speculative_tokens_total", "Tokens that were guessed, by what became of them", "outcome"
        )
        self._batch_cap = self._gauge("bros_batch_cap", "Most sequences that a step may hold now")
        self._frames_dropped = self._counter(
            "bros_frames_dropped_total", "Frames from ranks that were not used, by reason", "reason"
        )

    # --- requests, as the HTTP side sees them

    def request_received(self) -> None:
        """A request for inference was understood and will be counted once more as a success or a failure."""
        self._request_count.inc()

    def request_validated(
        self, num_input_tokens: int, max_new_tokens: int, *, max_input_tokens: int, max_total_tokens: int
    ) -> None:
        """A request is about to be queued. The limits are the served model's; they shape the histograms."""
        if self._lengths is None:
            self._lengths = _LengthHistograms(self._registry, max_input_tokens, max_total_tokens)
        self._lengths.num_input_tokens.observe(num_input_tokens)
        self._lengths.max_new_tokens.observe(max_new_tokens)

    def request_succeeded(
        self,
        *,
        total_s: float,
        validation_s: float,
        queue_s: float,
        inference_s: float,
        num_generated_tokens: int,
    ) -> None:
        """A validated request got its last token."""
        assert self._lengths is not None
        self._request_success.inc()
        self._request_duration.observe(total_s)
        self._request_validation.observe(validation_s)
        self._request_queue.observe(queue_s)
        self._request_inference.observe(inference_s)
        self._request_time_per_token.observe(inference_s / num_generated_tokens)
        self._lengths.num_generated_tokens.observe(num_generated_tokens)

    def request_failed(self, failure: Failure) -> None:
        """A request ended without its last token."""
        self._request_failure.labels(failure).inc()

    def request_ended(self, request_class: RequestClass, outcome: Outcome) -> None:
        """A request ended: told by class, which TGI's series do not know."""
        self._classes.requests.labels(request_class.value, outcome).inc()

    def request_admitted(self, request_class: RequestClass, admission: Admission) -> None:
        """A request was accepted, on these terms."""
        self._classes.admissions.labels(request_class.value, admission.value).inc()

    def request_refused(self, request_class: RequestClass) -> None:
        """A request was refused, since its target could not be met."""
        self._classes.admissions.labels(request_class.value, "refused").inc()

    def targets_judged(self, *, is_ttft_met: bool, is_tpot_met: bool) -> None:
        """A real-time request whose targets were given has ended; one that was refused has missed both.

        Args:
            is_tpot_met: true of a reply that has only one token.
        """
        for target, is_met in (
            ("ttft", is_ttft_met),
            ("tpot", is_tpot_met),
            ("both", is_ttft_met and is_tpot_met),
        ):
            self._classes.targets.labels(target, "met" if is_met else "missed").inc()

    # --- sequences, as the engine sees them

    def set_sequences(self, request_class: RequestClass, *, num_running: int, num_waiting: int) -> None:
        """How many sequences of a class own KV, and how many wait."""
        self._classes.sequences.labels(request_class.value, "running").set(num_running)
        self._classes.sequences.labels(request_class.value, "waiting").set(num_waiting)

    def sequences_relegated(self, num_sequences: int) -> None:
        """Real-time sequences can no longer meet their targets, and go after those that can."""
        self._classes.relegations.inc(num_sequences)

    def sequences_preempted(self, request_class: RequestClass, num_sequences: int) -> None:
        """Sequences of a class lost KV to others."""
        self._classes.preemptions.labels(request_class.value).inc(num_sequences)

    def blocks_copied(self, direction: CopyDirection, num_blocks: int) -> None:
        """KV blocks were copied to the host pool, or back from it."""
        self._copied_blocks.labels(direction).inc(num_blocks)

    # --- steps, as the engine sees them

    def step_sent(
        self,
        method: Method,
        *,
        num_sequences: int,
        num_new_sequences: int,
        num_running: int,
        max_tokens: int,
        planning_s: float,
    ) -> None:
        """A plan went to the ranks.

        Args:
            num_new_sequences: those that run for the first time.
            num_running: those that were let in, in this step or not.
            max_tokens: tokens that all sequences of the step together may grow to.
            planning_s: seconds that it took to make the plan.
        """
        self._step_count.labels(method).inc()
        self._batch_size.set(num_sequences)
        self._batch_max_tokens.set(max_tokens)
        if num_new_sequences:
            self._batch_next_size.observe(num_new_sequences)
        if 0 < num_new_sequences < num_running:
            self._batch_concat.labels(_JOINED).inc()
            self._joining_duration.labels("decode").observe(planning_s)

    def step_finished(
        self, method: Method, *, total_s: float, forward_s: float, sampling_s: float, taking_in_s: float
    ) -> None:
        """A step gave its result: seconds from plan to result, of those the ranks' own, and what came after it."""
        self._step_success.labels(method).inc()
        self._step_duration.labels(method).observe(total_s)
        self._forward_duration.labels(method).observe(forward_s)
        self._sampling_duration.labels(method).observe(sampling_s)
        self._taking_in_duration.labels(method).observe(taking_in_s)

    def rank_worked(self, step_s: float, idle_s: float | None) -> None:
        """Rank 0 spent `step_s` on a step, after `idle_s` without one; `None` where there was no work before."""
        self._rank_step.observe(step_s)
        if idle_s is not None:
            self._rank_idle.observe(idle_s)

    def step_predicted(self, predicted_s: float, actual_s: float, margin: float) -> None:
        """A step took `actual_s`, which is positive; the latency model had said `predicted_s`.

        The mean of the errors, sum by count, is the model's mean absolute percentage error.
        """
        self._step_error.observe(abs(predicted_s - actual_s) / actual_s)
        self._step_margin.set(margin)

    def step_interrupted(self) -> None:
        """A step was sent to be run in the middle of another."""
        self._interruptions.inc()

    def tokens_guessed(self, num_tokens: int, *, num_accepted: int) -> None:
        """A step guessed so many tokens of one sequence, and so many of them were right."""
        self._skipped_tokens.observe(num_accepted)
        self._speculative_tokens.labels("accepted").inc(num_accepted)
        self._speculative_tokens.labels("rejected").inc(num_tokens - num_accepted)

    def set_batch_cap(self, num_sequences: int) -> None:
        """Most sequences that the next step may hold."""
        self._batch_cap.set(num_sequences)

    def step_failed(self, method: Method) -> None:
        """A step was lost: its ranks are gone."""
        self._step_failure.labels(method).inc()

    def engine_idle(self) -> None:
        """No sequence is left to run."""
        self._batch_size.set(0)
        self._batch_max_tokens.set(0)

    def set_max_batch_total_tokens(self, num_tokens: int) -> None:
        """Tokens that the KV region holds."""
        self._batch_max_total_tokens.set(num_tokens)

    def set_queue_size(self, num_waiting: int) -> None:
        """How many requests wait for their first step."""
        self._queue_size.set(num_waiting)

    def set_kv_blocks(self, *, rt: int, be: int, cached: int, free: int) -> None:
        """Who has the KV blocks. One that both classes use counts as real-time, an idle one as cached where what it
        holds may be asked for again."""
        self._kv_blocks.labels("rt").set(rt)
        self._kv_blocks.labels("be").set(be)
        self._kv_blocks.labels("cached").set(cached)
        self._kv_blocks.labels("free").set(free)

    def prompt_computed(self, request_class: RequestClass, num_tokens: int, *, num_cached: int) -> None:
        """A prompt has so many tokens, and so many of them were in the KV cache when it began."""
        self._classes.prompt_tokens.labels(request_class.value).inc(num_tokens)
        self._classes.cached_tokens.labels(request_class.value).inc(num_cached)

    def observe_first_token(self, request_class: RequestClass, *, queue_s: float, ttft_s: float) -> None:
        """A sequence got its first token.

        Args:
            queue_s: seconds from the queue to the first step.
            ttft_s: seconds from the queue to the token.
        """
        self._classes.queue_wait.labels(request_class.value).observe(queue_s)
        self._classes.ttft.labels(request_class.value).observe(ttft_s)

    def observe_inter_token(self, request_class: RequestClass, seconds: float) -> None:
        """A sequence got a token this long after the one before."""
        self._classes.inter_token_of(request_class).observe(seconds)

    def frame_dropped(self, reason: str) -> None:
        """A frame from a rank was not used. `reason` comes from a small fixed set."""
        self._frames_dropped.labels(reason).inc()

    # --- exposition

    def render(self) -> bytes:
        """The Prometheus text format. Counters and histograms appear after their first use, as in TGI.

        TGI's counters do not end in `_total`, which the library's own exposition would insist on.
        """
        lines: list[str] = []
        for family in self._registry.collect():
            samples = [sample for sample in family.samples if not sample.name.endswith("_created")]
            if not samples or (family.type != "gauge" and not any(sample.value for sample in samples)):
                continue
            is_suffixed = family.type == "counter" and not family.name.startswith("tgi_")
            name = f"{family.name}_total" if is_suffixed else family.name
            lines += [f"# HELP {name} {family.documentation}", f"# TYPE {name} {family.type}"]
            for sample in samples:
                sample_name = name if family.type == "counter" else sample.name
                lines.append(f"{sample_name}{_labels(sample.labels)} {sample.value}")
        return "".join(f"{line}\n" for line in lines).encode()

    # --- construction

    def _counter(self, name: str, help: str, *labels: str) -> Counter:
        return Counter(name, help, labels, registry=self._registry)

    def _gauge(self, name: str, help: str) -> Gauge:
        return Gauge(name, help, registry=self._registry)

    def _duration(self, name: str, help: str, *labels: str) -> Histogram:
        return Histogram(name, f"{help}, in seconds", labels, buckets=_DURATION_BUCKETS, registry=self._registry)


class _ClassSeries:
    """Our own series about requests, by class."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self.ttft = Histogram(
            "bros_time_to_first_token_seconds",
            "From arrival in the queue to the first token, in seconds",
            ["class"],
            buckets=_TTFT_BUCKETS,
            registry=registry,
        )
        self.queue_wait = Histogram(
            "bros_queue_wait_seconds",
            "From arrival in the queue to the first step, in seconds",
            ["class"],
            buckets=_TTFT_BUCKETS,
            registry=registry,
        )
        inter_token = Histogram(
            "bros_inter_token_latency_seconds",
            "Between two tokens of a reply, in seconds",
            ["class"],
            buckets=_INTER_TOKEN_BUCKETS,
            registry=registry,
        )
        #: For each class its own. Finding a series by its labels takes longer than adding to it, and this is done for
        #: every token.
        self.inter_token_of: Callable[[RequestClass], Histogram] = cache(
            lambda request_class: inter_token.labels(request_class.value)
        )
        self.requests = Counter(
            "bros_requests_total", "Requests by class and how they ended", ["class", "outcome"], registry=registry
        )
        self.admissions = Counter(
            "bros_admissions_total",
            "Requests by class and what admission made of them",
            ["class", "admission"],
            registry=registry,
        )
        self.targets = Counter(
            "bros_targets_total",
            "Real-time requests with given targets: which they met and which they missed",
            ["target", "outcome"],
            registry=registry,
        )
        self.sequences = Gauge(
            "bros_sequences", "Sequences by class, and whether they own KV", ["class", "state"], registry=registry
        )
        self.relegations = Counter(
            "bros_relegations_total",
            "Real-time sequences put after those that can meet their targets",
            registry=registry,
        )
        self.preemptions = Counter(
            "bros_preemptions_total", "Times that a sequence lost KV to another, by class", ["class"], registry=registry
        )
        self.prompt_tokens = Counter(
            "bros_prompt_tokens_total",
            "Tokens of prompts that got a first token, by class",
            ["class"],
            registry=registry,
        )
        self.cached_tokens = Counter(
            "bros_prompt_tokens_cached_total",
            "Prompt tokens that were in the KV cache when their prompt began, by class",
            ["class"],
            registry=registry,
        )


class _LengthHistograms:
    """The histograms whose buckets follow from the served model: a hundred, evenly spaced up to the limit."""

    def __init__(self, registry: CollectorRegistry, max_input_tokens: int, max_total_tokens: int) -> None:
        self.num_input_tokens = Histogram(
            "tgi_request_input_length",
            "Prompt tokens",
            buckets=_hundred_buckets(max_input_tokens),
            registry=registry,
        )
        self.max_new_tokens = Histogram(
            "tgi_request_max_new_tokens",
            "New tokens asked for, at most 1024",
            buckets=_hundred_buckets(max_total_tokens),
            registry=registry,
        )
        self.num_generated_tokens = Histogram(
            "tgi_request_generated_tokens",
            "Tokens generated",
            buckets=_hundred_buckets(max_total_tokens),
            registry=registry,
        )


def _hundred_buckets(limit: int) -> list[float]:
    return [limit / 100 * (k + 1) for k in range(100)]


def _labels(labels: dict[str, str]) -> str:
    """The labels of a sample; no value of ours needs escaping."""
    if not labels:
        return ""
    return "{" + ",".join(f'{name}="{value}"' for name, value in labels.items()) + "}"
