"""The spans of one sampled generation: the request, its parts, and some of its steps."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

from coordinator.requests import GenerateParams
from coordinator.session_plan import Plan
from coordinator.summary import Summary
from longreach.errors import LongreachError
from longreach.steps import StepOutcome, StepRow
from longreach.telemetry import genai, tracing
from longreach.telemetry.tracing import Span

STEPS_FIRST = 8
"""Steps that are traced at the beginning of a generation..."""
STEPS_EVERY = 64
"""... and one of so many later: a trace of a long answer stays readable."""


class RequestTrace:
    """The trace of a generation that is sampled."""

    def __init__(self, span: Span) -> None:
        self._span = span
        self._steps = 0
        self._ended = False

    @classmethod
    def begin(cls, params: GenerateParams) -> RequestTrace | None:
        """None where the request is not sampled."""
        asked = genai.request(
            params.request_id,
            params.model,
            params.sampling,
            params.max_tokens,
            params.stop_texts,
        )
        span = tracing.begin(genai.span_name(params.model), params.traceparent, asked)
        return cls(span) if span is not None else None

    @property
    def traceparent(self) -> str:
        """The request's span, as the parent of others."""
        return self._span.traceparent

    def planned(self, plan: Plan) -> None:
        """Says what was decided."""
        self._span.rename(genai.span_name(plan.model.model))
        self._span.set(
            {
                "longreach.session.id": plan.record.session_id,
                "longreach.context.id": plan.record.context_id,
                "longreach.budget": str(plan.budget),
            }
        )

    def step_due(self) -> bool:
        """Counts a step; whether it is to be traced."""
        self._steps += 1
        return self._steps <= STEPS_FIRST or self._steps % STEPS_EVERY == 0

    def finished(self, plan: Plan, summary: Summary) -> None:
        """The generation ended well."""
        self._end(
            {
                **genai.response(
                    plan.model.model,
                    summary.finish_reason.name.lower(),
                    summary.context_tokens + summary.prompt_tokens,
                    summary.context_tokens,
                    summary.completion_tokens,
                ),
                "longreach.queue_s": summary.queue_s,
                "longreach.open_s": summary.open_s,
                "longreach.first_token_s": summary.first_token_s,
                "longreach.per_token_s": summary.per_token_s,
                "longreach.scan_fraction": summary.work.scan_fraction,
                "longreach.attended_fraction": summary.work.attended_fraction,
                "longreach.coverage": summary.coverage,
                "longreach.failovers": summary.failovers,
                "longreach.worker.id": summary.worker_id,
            }
        )

    def failed(self, error: BaseException) -> None:
        """The generation ended with an error, or its client has left."""
        if isinstance(error, LongreachError):
            self._end({"error.type": error.reason}, error.message)
        elif isinstance(error, asyncio.CancelledError | GeneratorExit):
            self._end({"error.type": "CANCELLED"}, "the client left")
        else:
            self._end({"error.type": type(error).__name__}, type(error).__name__)

    def _end(self, attributes: dict[str, tracing.Value], error: str = "") -> None:
        if not self._ended:
            self._ended = True
            self._span.end(attributes, error=error)


def begin_step(traces: Sequence[RequestTrace], rows: Sequence[StepRow]) -> Span | None:
    """The span of a step with rows of these traced generations: part of the first one's trace, and
    linked with the others'. None where none of them has this step traced."""
    due = [trace.traceparent for trace in traces if trace.step_due()]
    if not due:
        return None
    attributes = {
        "longreach.step.rows": len(rows),
        "longreach.step.tokens": sum(len(row.token_ids) for row in rows),
    }
    return tracing.child("step", due[0], attributes, links=due[1:])


def end_step(span: Span, outcome: StepOutcome | None) -> None:
    """Ends a step's span; without an outcome the step failed as a whole."""
    if outcome is None:
        span.end(error="the step failed")
        return
    failed = sum(result.error is not None for result in outcome.results)
    span.end({"longreach.step.rows_failed": failed})
