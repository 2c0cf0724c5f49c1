"""The spans of a traced step on the worker: the step, and its layers in groups."""

from __future__ import annotations

import contextlib
from collections.abc import Generator

from longreach.telemetry import tracing
from longreach.telemetry.tracing import Span

LAYERS_PER_GROUP = 8
"""Layers that share a span; each still has a span of its own on every node that it asks."""


class StepTrace:
    """A step that is traced. Used by the thread that owns the device."""

    def __init__(self, span: Span) -> None:
        self._span = span
        self._group: Span | None = None
        self._group_number = -1

    def layer(self, layer: int) -> str:
        """A layer asks its nodes now; the context that its requests carry."""
        number = layer // LAYERS_PER_GROUP
        if number != self._group_number:
            self.end_group()
            self._group_number = number
            first = number * LAYERS_PER_GROUP
            self._group = tracing.child(
                "layers", self._span.traceparent, {"longreach.layer.first": first}
            )
        return self._group.traceparent if self._group is not None else ""

    def end_group(self) -> None:
        """The layers of the group are done."""
        if self._group is not None:
            self._group.end()
            self._group = None


@contextlib.contextmanager
def traced_step(traceparent: str, queue_s: float) -> Generator[StepTrace | None, None, None]:
    """Makes the spans of a step that the coordinator has traced; None for all others."""
    if not traceparent:
        yield None
        return
    with tracing.part("device step", traceparent) as span:
        if span is None:
            yield None
            return
        span.set({"longreach.queue_s": queue_s})
        trace = StepTrace(span)
        try:
            yield trace
        finally:
            trace.end_group()
