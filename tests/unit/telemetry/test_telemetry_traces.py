"""What is traced, what is not, and what logs say of it."""

from __future__ import annotations

import contextvars
import io
import json
import logging
from collections.abc import Iterator

import pytest
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.sdk.trace.sampling import ParentBased, TraceIdRatioBased

from coordinator.request_trace import STEPS_EVERY, STEPS_FIRST, RequestTrace, begin_step
from coordinator.requests import GenerateParams, Prompt
from longreach.errors import InvalidRequest, Unavailable
from longreach.logging import JsonFormatter, configure
from longreach.sdk import messages
from longreach.telemetry import scope, tracing

TRACE, SPAN = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"
SAMPLED = f"00-{TRACE}-{SPAN}-01"


@pytest.fixture
def spans(request: pytest.FixtureRequest) -> Iterator[InMemorySpanExporter]:
    """Spans that ended; of requests without a context none is sampled."""
    exporter = InMemorySpanExporter()
    provider = TracerProvider(sampler=ParentBased(TraceIdRatioBased(0)), shutdown_on_exit=False)
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    tracing.switch_on(provider.get_tracer("test"))
    yield exporter
    tracing.switch_off()


def request(traceparent: str) -> GenerateParams:
    return GenerateParams(Prompt("what?"), request_id="r", traceparent=traceparent)


@pytest.mark.parametrize(
    "caller",
    [
        "",
        f"00-{TRACE}-{SPAN}-00",
        f"00-{'0' * 32}-{SPAN}-01",
        f"00-{TRACE}-{'0' * 16}-01",
        f"01-{TRACE}-{SPAN}-01",
        "00-xyz-1-01",
        SAMPLED + "\n",
        SAMPLED.upper(),
    ],
)
def test_only_a_sampled_and_valid_context_has_a_request_traced(
    spans: InMemorySpanExporter, caller: str
) -> None:
    assert RequestTrace.begin(request(caller)) is None
    assert tracing.child("below", caller) is None
    assert spans.get_finished_spans() == ()


def test_off_nothing_is_traced() -> None:
    assert RequestTrace.begin(request(SAMPLED)) is None
    with tracing.part("plan", SAMPLED) as span:
        assert span is None
        assert scope.traceparent() == ""


def test_a_request_is_a_span_below_its_callers(spans: InMemorySpanExporter) -> None:
    trace = RequestTrace.begin(request(SAMPLED))
    assert trace is not None
    with tracing.part("plan", trace.traceparent) as inner:
        assert inner is not None
        assert scope.traceparent() == inner.traceparent
        assert scope.fields()["trace_id"] == TRACE
    assert scope.traceparent() == ""
    assert scope.fields() == {}
    trace.failed(Unavailable("no worker", reason="NO_WORKER"))
    trace.failed(GeneratorExit())  # the first end counts
    plan, whole = spans.get_finished_spans()
    assert whole.parent is not None
    assert f"{whole.parent.span_id:016x}" == SPAN
    assert f"{whole.context.trace_id:032x}" == TRACE
    assert plan.parent is not None
    assert plan.parent.span_id == whole.context.span_id
    assert whole.attributes is not None
    assert whole.attributes["error.type"] == "NO_WORKER"
    assert not whole.status.is_ok


def test_the_first_steps_are_traced_and_then_one_of_many(spans: InMemorySpanExporter) -> None:
    trace = RequestTrace.begin(request(SAMPLED))
    assert trace is not None
    traced = [n for n in range(1, 300) if (span := begin_step([trace], [])) and not span.end()]
    assert traced == [
        *range(1, STEPS_FIRST + 1),
        *(n for n in range(STEPS_FIRST + 1, 300) if n % STEPS_EVERY == 0),
    ]


def test_a_step_of_several_traced_requests_is_linked_with_all(
    spans: InMemorySpanExporter,
) -> None:
    one, other = (RequestTrace.begin(request(f"00-{n * 32}-{SPAN}-01")) for n in ("1", "2"))
    assert one is not None
    assert other is not None
    span = begin_step([one, other], [])
    assert span is not None
    span.end()
    [step] = spans.get_finished_spans()
    assert step.parent is not None
    assert f"{step.parent.trace_id:032x}" == "1" * 32
    assert [f"{link.context.trace_id:032x}" for link in step.links] == ["2" * 32]


def test_the_sdk_sends_the_context_of_the_span_around_it() -> None:
    assert messages.traced((("authorization", "x"),)) == (("authorization", "x"),)
    provider = TracerProvider(shutdown_on_exit=False)
    with provider.get_tracer("application").start_as_current_span("outer") as outer:
        sent = dict(messages.traced((("authorization", "x"),)))
    context = outer.get_span_context()
    assert sent["traceparent"].startswith(f"00-{context.trace_id:032x}-{context.span_id:016x}-")
    assert tracing.is_valid(sent["traceparent"])
    assert sent["authorization"] == "x"


def logged(message: str, *arguments: object, failing: bool = False) -> dict[str, str]:
    stream = io.StringIO()
    handler = logging.StreamHandler(stream)
    handler.setFormatter(JsonFormatter())
    logger = logging.Logger("test")
    logger.addHandler(handler)
    try:
        if failing:
            raise OSError("disk")
        logger.info(message, *arguments)
    except OSError:
        logger.exception(message, *arguments)
    [line] = stream.getvalue().splitlines()
    read: dict[str, str] = json.loads(line)
    return read


def test_a_json_line_says_what_it_belongs_to() -> None:
    with scope.entered(SAMPLED, request_id='r"1\n', session_id="", context_id="ctx"):
        line = logged("%d of %s", 1, "zwölf")
    assert line["message"] == "1 of zwölf"
    assert line["request_id"] == 'r"1\n'
    assert (line["trace_id"], line["span_id"]) == (TRACE, SPAN)
    assert line["context_id"] == "ctx"
    assert "session_id" not in line
    assert line["time"].endswith("Z")
    assert "request_id" not in logged("later")


def test_an_exception_stays_on_its_line() -> None:
    line = logged("it failed", failing=True)
    assert line["level"] == "ERROR"
    assert "OSError: disk" in line["exception"]
    assert "Traceback" in line["exception"]


def test_what_is_entered_ends_with_its_context() -> None:
    contextvars.copy_context().run(scope.enter, SAMPLED, request_id="r")
    assert scope.fields() == {}


def test_an_unknown_log_format_is_refused() -> None:
    with pytest.raises(InvalidRequest, match="text, json"):
        configure(format="xml")
