"""Spans of sampled requests, through every service that works on them.

    span = tracing.begin("request", caller)      # None where the request is not sampled
    part = tracing.child("step", span.traceparent)
    ...
    part.end(rows=3)

Whoever begins a request decides: the caller, if it sent a W3C trace context, else the share of
`--trace-sample-share`. From then on only sampled work carries a context, so that all other work
costs a test of an empty text. Off, everything here is None and OpenTelemetry is not imported.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Generator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from longreach.telemetry import scope

if TYPE_CHECKING:
    from opentelemetry.trace import Span as OtelSpan
    from opentelemetry.trace import SpanKind, Tracer

Value = str | bool | int | float | Sequence[str]

_TRACEPARENT = re.compile(r"00-(?!0{32})[0-9a-f]{32}-(?!0{16})[0-9a-f]{16}-[0-9a-f]{2}")
_SAMPLED = 1
_tracer: Tracer | None = None


def switch_on(tracer: Tracer) -> None:
    """Makes spans by this tracer from now on."""
    global _tracer
    _tracer = tracer


def switch_off() -> None:
    """Makes no more spans."""
    global _tracer
    _tracer = None


def tracer() -> Tracer | None:
    """What makes the spans; None while nothing is traced."""
    return _tracer


class Span:
    """A sampled span that is under way. `traceparent` is how others name it as their parent."""

    __slots__ = ("_span", "traceparent")

    def __init__(self, span: OtelSpan) -> None:
        self._span = span
        context = span.get_span_context()
        self.traceparent = f"00-{context.trace_id:032x}-{context.span_id:016x}-01"

    def rename(self, name: str) -> None:
        """Gives it a better name."""
        self._span.update_name(name)

    def set(self, attributes: Mapping[str, Value]) -> None:
        """Adds attributes."""
        self._span.set_attributes(attributes)

    def end(self, attributes: Mapping[str, Value] | None = None, *, error: str = "") -> None:
        """Ends it, once; `error` says what went wrong."""
        from opentelemetry.trace import Status, StatusCode

        if attributes:
            self._span.set_attributes(attributes)
        if error:
            self._span.set_status(Status(StatusCode.ERROR, error))
        self._span.end()


def begin(name: str, caller: str, attributes: Mapping[str, Value] | None = None) -> Span | None:
    """The span of a request from outside; `caller` is its W3C trace context, if it sent one.

    None where the request is not sampled.
    """
    if _tracer is None:
        return None
    from opentelemetry.trace import SpanKind

    return _begin(name, caller if is_valid(caller) else "", SpanKind.SERVER, attributes)


def child(
    name: str,
    parent: str,
    attributes: Mapping[str, Value] | None = None,
    *,
    links: Sequence[str] = (),
) -> Span | None:
    """A span below another, of this process or of the one that called; None without a parent.

    links: contexts of further spans that it belongs to.
    """
    if _tracer is None or not parent or not is_valid(parent):
        return None
    from opentelemetry.trace import SpanKind

    return _begin(name, parent, SpanKind.INTERNAL, attributes, links)


@contextlib.contextmanager
def part(name: str, parent: str) -> Generator[Span | None, None, None]:
    """A span below `parent` around a piece of work, which logs and calls then belong to."""
    span = child(name, parent)
    with around(span):
        yield span


@contextlib.contextmanager
def around(span: Span | None) -> Generator[None, None, None]:
    """Ends a span, if there is one, with the piece of work that it stands for."""
    if span is None:
        yield
        return
    with scope.entered(span.traceparent):
        try:
            yield
        except BaseException as error:
            span.end(error=type(error).__name__)
            raise
        span.end()


def is_valid(traceparent: str) -> bool:
    """Whether a text is a W3C trace context of version 00."""
    return _TRACEPARENT.fullmatch(traceparent) is not None


def _begin(
    name: str,
    parent: str,
    kind: SpanKind,
    attributes: Mapping[str, Value] | None,
    links: Sequence[str] = (),
) -> Span | None:
    from opentelemetry import trace
    from opentelemetry.context import Context

    assert _tracer is not None
    around = Context()
    if parent:
        around = trace.set_span_in_context(trace.NonRecordingSpan(_context(parent)), around)
    more: Any = [trace.Link(_context(each)) for each in links]
    span = _tracer.start_span(name, around, kind=kind, attributes=attributes, links=more)
    return Span(span) if span.is_recording() else None


def _context(traceparent: str) -> Any:
    from opentelemetry.trace import SpanContext, TraceFlags

    _, trace_id, span_id, flags = traceparent.split("-")
    sampled = int(flags, 16) & _SAMPLED
    return SpanContext(int(trace_id, 16), int(span_id, 16), True, TraceFlags(sampled))
