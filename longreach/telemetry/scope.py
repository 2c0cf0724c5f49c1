"""What the work at hand belongs to: carried by context variables into logs and outgoing calls.

A task or a `contextvars.copy_context()` takes the fields along to where the work goes on.
"""

from __future__ import annotations

import contextlib
from collections.abc import Generator, Mapping
from contextvars import ContextVar

FIELDS = ("request_id", "session_id", "context_id", "trace_id", "span_id")
"""Fields that logs carry, as far as they are known."""

_NOTHING: Mapping[str, str] = {}
_fields: ContextVar[Mapping[str, str]] = ContextVar("longreach-scope", default=_NOTHING)
_traceparent: ContextVar[str] = ContextVar("longreach-traceparent", default="")


def fields() -> Mapping[str, str]:
    """What is known of the work at hand."""
    return _fields.get()


def traceparent() -> str:
    """The W3C trace context of the span under way here; empty where nothing is traced."""
    return _traceparent.get()


def enter(traceparent: str = "", **known: str) -> None:
    """Says for the rest of this task, or of this context, what it belongs to."""
    if traceparent:
        _traceparent.set(traceparent)
        _, known["trace_id"], known["span_id"], _ = traceparent.split("-")
    _fields.set({**_fields.get(), **{name: value for name, value in known.items() if value}})


@contextlib.contextmanager
def entered(traceparent: str = "", **known: str) -> Generator[None, None, None]:
    """The same for a while."""
    before, trace_before = _fields.get(), _traceparent.get()
    enter(traceparent, **known)
    try:
        yield
    finally:
        _fields.set(before)
        _traceparent.set(trace_before)
