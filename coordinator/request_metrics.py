"""The metrics of one generation (docs/metrics.md), counted as its life goes on."""

from __future__ import annotations

from dataclasses import dataclass

from coordinator.generation import FinishReason, Generation
from coordinator.summary import Summary
from longreach import telemetry
from longreach.errors import LongreachError
from longreach.telemetry.instruments import CounterSeries, HistogramSeries

# Numbers of gRPC's status codes, which the errors carry.
_CODES = (
    *("OK", "CANCELLED", "UNKNOWN", "INVALID_ARGUMENT", "DEADLINE_EXCEEDED", "NOT_FOUND"),
    *("ALREADY_EXISTS", "PERMISSION_DENIED", "RESOURCE_EXHAUSTED", "FAILED_PRECONDITION"),
    *("ABORTED", "OUT_OF_RANGE", "UNIMPLEMENTED", "INTERNAL", "UNAVAILABLE", "DATA_LOSS"),
    "UNAUTHENTICATED",
)
_FAILURES = telemetry.counter("request_failure")


@dataclass(frozen=True, slots=True)
class Objectives:
    """What a request should take at most: seconds to the first token, and between two."""

    ttft_s: float
    itl_s: float


class _Series:
    """The series of one model."""

    def __init__(self, model_name: str) -> None:
        def histogram(name: str) -> HistogramSeries:
            return telemetry.histogram(name).bind(model_name=model_name)

        def counter(name: str) -> CounterSeries:
            return telemetry.counter(name).bind(model_name=model_name)

        self.first_token = histogram("time_to_first_token_seconds")
        self.between_tokens = histogram("inter_token_latency_seconds")
        self.whole = histogram("e2e_request_latency_seconds")
        self.queue = histogram("request_queue_time_seconds")
        self.prefill = histogram("request_prefill_time_seconds")
        self.decode = histogram("request_decode_time_seconds")
        self.scanned = histogram("retrieval_scan_fraction")
        self.attended = histogram("retrieval_attended_fraction")
        self.bytes_read = histogram("retrieval_bytes_fraction")
        self.coverage = histogram("kv_coverage_ratio")
        self.prompt_tokens = counter("prompt_tokens")
        self.tokens = counter("generation_tokens")
        self.within = counter("requests_within_objectives")
        self.hedged = counter("hedged_requests")
        self.failovers = counter("failovers")
        self.recomputed = counter("recomputed_tokens")
        success = telemetry.counter("request_success")
        self.success = {
            reason: success.bind(model_name=model_name, finished_reason=reason.name.lower())
            for reason in FinishReason
        }


_by_model: dict[str, _Series] = {}


def series(model_name: str) -> _Series:
    """The series of a model, exported from the first time on."""
    found = _by_model.get(model_name)
    if found is None:
        found = _by_model[model_name] = _Series(model_name)
    return found


class RequestMetrics:
    """One generation that arrived at `arrived` (monotonic seconds).

    resumed: the client had its first tokens from another coordinator, so that times from the
    arrival are not known here.
    """

    def __init__(
        self, model_name: str, arrived: float, objectives: Objectives, *, resumed: bool
    ) -> None:
        self._series = series(model_name)
        self._arrived = arrived
        self._objectives = objectives
        self._resumed = resumed
        self._first_at = 0.0
        self._last_at = 0.0
        self._between_s = 0.0
        self._pairs = 0

    def token(self, now: float, queue_s: float) -> None:
        """A token was drawn; `queue_s` is what the request waited for a slot so far."""
        each = self._series
        each.tokens.add()
        if self._first_at:
            each.between_tokens.record(now - self._last_at)
            self._between_s += now - self._last_at
            self._pairs += 1
        else:
            self._first_at = now
            if not self._resumed:
                each.first_token.record(now - self._arrived)
                each.prefill.record(max(0.0, now - self._arrived - queue_s))
        self._last_at = now

    def finished(self, summary: Summary, now: float) -> None:
        """The generation has ended well."""
        each = self._series
        each.success[summary.finish_reason].add()
        each.prompt_tokens.add(summary.prompt_tokens)
        each.queue.record(summary.queue_s)
        each.coverage.record(summary.coverage)
        if self._first_at:
            each.decode.record(self._last_at - self._first_at)
        if not self._resumed:
            each.whole.record((self._last_at or now) - self._arrived)
        if summary.work.keys_in_scope:
            each.scanned.record(summary.work.scan_fraction)
            each.attended.record(summary.work.attended_fraction)
            each.bytes_read.record(summary.work.bytes_fraction)
        if self._within_objectives():
            each.within.add()

    def _within_objectives(self) -> bool:
        quick = self._resumed or self._first_at - self._arrived <= self._objectives.ttft_s
        return quick and self._between_s <= self._objectives.itl_s * self._pairs

    def failed_over(self) -> None:
        """The generation goes on elsewhere."""
        self._series.failovers.add()

    def ended(self, generation: Generation) -> None:
        """The generation has ended, well or not."""
        self._series.hedged.add(generation.figures.hedged_requests)
        self._series.recomputed.add(generation.recomputed_tokens)


def failed(error: BaseException) -> None:
    """A request ended with an error, or its client has left."""
    if telemetry.measuring():
        _FAILURES.add(code=_code(error))


def _code(error: BaseException) -> str:
    if isinstance(error, LongreachError):
        return _CODES[error.code]
    return "INTERNAL" if isinstance(error, Exception) else "CANCELLED"
