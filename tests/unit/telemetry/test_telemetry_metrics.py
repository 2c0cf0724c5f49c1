"""Metrics as exporters give them: on /metrics over HTTP, at a collector over gRPC, and not at all.

`prometheus_client` with instruments of its own, and its parser, are the reference.
"""

from __future__ import annotations

import subprocess
import sys
import threading
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import prometheus_client
import pytest
from prometheus_client.parser import text_string_to_metric_families

from longreach import telemetry
from longreach.errors import Unavailable
from longreach.telemetry.document import tables
from longreach.telemetry.instruments import collect, switch_off, switch_on
from longreach.telemetry.names import METRICS, Kind
from longreach.telemetry.service import Telemetry
from tests.unit.telemetry.collector import collecting

Sample = tuple[str, frozenset[tuple[str, str]]]


@contextmanager
def running(settings: telemetry.TelemetrySettings, service: str = "node") -> Iterator[Telemetry]:
    started = Telemetry(settings)
    started.begin(service, "the-engine", model_name="the-model")
    try:
        yield started
    finally:
        started.stop()


PROMETHEUS_2 = (
    "application/openmetrics-text;version=1.0.0,application/openmetrics-text;version=0.0.1;q=0.75,"
    "text/plain;version=0.0.4;q=0.5,*/*;q=0.1"
)
PROMETHEUS_3 = (
    "application/openmetrics-text;version=1.0.0;escaping=allow-utf-8;q=0.6,"
    "text/plain;version=1.0.0;escaping=allow-utf-8;q=0.4,text/plain;version=0.0.4;q=0.3,*/*;q=0.2"
)


def scraped(address: str, accept: str = "*/*") -> dict[Sample, float]:
    request = urllib.request.Request(f"http://{address}/metrics", headers={"Accept": accept})
    with urllib.request.urlopen(request, timeout=30) as reply:
        text = reply.read().decode()
    return {
        (sample.name, frozenset(sample.labels.items())): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


def own(**labels: str) -> frozenset[tuple[str, str]]:
    return frozenset({"engine": "the-engine", **labels}.items())


def test_a_scrape_has_what_was_counted_under_the_labels_of_the_table() -> None:
    with running(telemetry.TelemetrySettings(metrics_listen="127.0.0.1:0")) as started:
        copied = telemetry.counter("copy_bytes").bind(direction="in")
        copied.add(100)
        copied.add(28)
        telemetry.counter("retrieval_quality_samples").add(result="done")
        telemetry.gauge("sessions_open").observe(lambda: 3)
        telemetry.gauge("memory_used_bytes").observe(
            lambda: [({"kind": "kv"}, 10.0), ({"kind": "tail"}, 20.0)]
        )
        found = scraped(started.metrics_address)
    assert found["longreach:copy_bytes_total", own(direction="in")] == 128
    assert found["longreach:retrieval_quality_samples_total", own(result="done")] == 1
    assert found["longreach:sessions_open", own()] == 3
    assert found["longreach:memory_used_bytes", own(kind="tail")] == 20
    assert any(name == "process_resident_memory_bytes" for name, _ in found)


@pytest.mark.parametrize("accept", [PROMETHEUS_2, PROMETHEUS_3])
def test_names_keep_their_colons_whatever_format_is_asked_for(accept: str) -> None:
    with running(telemetry.TelemetrySettings(metrics_listen="127.0.0.1:0")) as started:
        telemetry.counter("append_tokens").bind().add(3)
        found = scraped(started.metrics_address, accept)
    assert found["longreach:append_tokens_total", own()] == 3


def test_a_histogram_counts_as_that_of_prometheus_client() -> None:
    bounds = METRICS["attend_seconds"].bounds
    reference = prometheus_client.Histogram(
        "reference", "", buckets=bounds, registry=prometheus_client.CollectorRegistry()
    )
    values = [0.0, bounds[0], bounds[3], bounds[3] * 1.0001, bounds[-1], bounds[-1] * 2, 0.02]
    with running(telemetry.TelemetrySettings(metrics_listen="127.0.0.1:0")) as started:
        ours = telemetry.histogram("attend_seconds").bind()
        for value in values:
            ours.record(value)
            reference.observe(value)
        found = scraped(started.metrics_address)
    for sample in next(iter(reference.collect())).samples:
        if sample.name.endswith("_created"):
            continue
        name = "longreach:attend_seconds" + sample.name.removeprefix("reference")
        assert found[name, own(**sample.labels)] == pytest.approx(sample.value)


def test_labels_of_the_process_are_given_to_the_metrics_that_have_them() -> None:
    switch_on("worker", {"engine": "w", "model_name": "m"})
    try:
        telemetry.counter("step_rows").bind()
        telemetry.gauge("sessions_open").observe(lambda: 1)
        labels = {each.metric.name: each.series[0][0] for each in collect()}
    finally:
        switch_off()
    assert labels["step_rows"] == {"engine": "w", "model_name": "m"}
    assert labels["sessions_open"] == {"engine": "w"}


def test_a_collector_is_sent_the_same_as_sums_and_histograms(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("OTEL_RESOURCE_ATTRIBUTES", "deployment.environment.name=test")
    with collecting() as collector:
        with running(telemetry.TelemetrySettings(otlp_endpoint=collector.endpoint)):
            telemetry.counter("append_tokens").bind().add(7)
            telemetry.histogram("attend_seconds").bind().record(0.02)
            telemetry.gauge("index_fraction").observe(lambda: 0.5)
        # The last export happens on the way out.
        found = collector.metrics()
        sender = collector.metric_requests[-1].resource_metrics[0].resource
    total = found["longreach.append_tokens"].sum
    assert total.is_monotonic
    assert total.data_points[0].as_double == 7 or total.data_points[0].as_int == 7
    histogram = found["longreach.attend_seconds"].histogram.data_points[0]
    assert list(histogram.explicit_bounds) == list(METRICS["attend_seconds"].bounds)
    assert histogram.count == 1
    assert histogram.sum == 0.02
    assert not histogram.HasField("max")
    fraction = found["longreach.index_fraction"]
    assert fraction.gauge.data_points[0].as_double == 0.5
    assert fraction.unit == "1"
    attributes = {each.key: each.value.string_value for each in sender.attributes}
    assert attributes["service.name"] == "longreach-node"
    assert attributes["service.instance.id"] == "the-engine"
    assert attributes["deployment.environment.name"] == "test"


def test_a_collector_that_is_away_does_not_keep_a_service_from_stopping() -> None:
    with running(telemetry.TelemetrySettings(otlp_endpoint="http://127.0.0.1:1")):
        telemetry.counter("append_tokens").bind().add(1)


def test_counts_of_many_threads_are_all_there() -> None:
    switch_on("node", {"engine": "e"})
    try:
        series = telemetry.counter("attend_rows").bind()
        threads = [
            threading.Thread(target=lambda: [series.add() for _ in range(5000)]) for _ in range(4)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert series.read() == 20000
    finally:
        switch_off()


def test_off_nothing_is_counted_and_no_exporter_is_loaded() -> None:
    series = telemetry.counter("step_rows").bind()
    series.clear()
    series.add(5)
    telemetry.counter("request_failure").add(code="NEVER_SEEN")
    assert series.read() == 0
    assert ({"code": "NEVER_SEEN"}) not in [
        labels for labels, _ in telemetry.counter("request_failure").series()
    ]
    code = (
        "import sys; from longreach.telemetry.service import Telemetry; "
        "from longreach.telemetry import TelemetrySettings; "
        "t = Telemetry(TelemetrySettings()); t.begin('node', 'n'); t.stop(); "
        "print([m for m in sys.modules if m.startswith(('opentelemetry', 'prometheus'))])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_a_port_that_is_taken_is_told_at_the_start() -> None:
    with (
        running(telemetry.TelemetrySettings(metrics_listen="127.0.0.1:0")) as first,
        pytest.raises(Unavailable, match="--metrics-listen"),
    ):
        Telemetry(telemetry.TelemetrySettings(metrics_listen=first.metrics_address))


def test_a_gauge_that_fails_costs_the_others_nothing(caplog: pytest.LogCaptureFixture) -> None:
    switch_on("node", {"engine": "e"})
    try:
        telemetry.gauge("index_fraction").observe(lambda: 1 / 0)
        telemetry.gauge("sessions_open").observe(lambda: 2)
        found = [each.metric.name for each in collect()]
    finally:
        switch_off()
    assert "sessions_open" in found
    assert "index_fraction" not in found
    assert "index_fraction" in caplog.text


def test_names_and_labels_outside_the_table_are_refused() -> None:
    with pytest.raises(LookupError, match="copy_bytes"):
        telemetry.counter("copied_bytes")
    with pytest.raises(LookupError):
        telemetry.gauge("copy_bytes")
    with pytest.raises(ValueError, match="direction"):
        telemetry.counter("copy_bytes").bind(where="in")


def test_the_table_keeps_to_the_rules_of_prometheus() -> None:
    for metric in METRICS.values():
        assert metric.services, metric.name
        assert metric.help.endswith("."), metric.name
        assert not metric.name.endswith(("_total", "_count", "_sum", "_bucket")), metric.name
        assert (metric.kind is Kind.HISTOGRAM) == bool(metric.bounds), metric.name
        assert list(metric.bounds) == sorted(set(metric.bounds)), metric.name
        assert "engine" not in metric.labels


def test_the_docs_have_the_table_as_it_is() -> None:
    page = (Path(__file__).parents[3] / "docs" / "metrics.md").read_text()
    assert page.endswith(tables())
