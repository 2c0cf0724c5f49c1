"""Metrics, traces and logs of a cluster of real processes, as collectors get them.

Every metric of the table is scraped from the processes that say they export it.
"""

from __future__ import annotations

import datetime
import json
import re
import ssl
import time
import urllib.request
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.sampling import ALWAYS_ON
from prometheus_client.parser import text_string_to_metric_families

from coordinator.request_trace import STEPS_FIRST
from longreach.errors import NotFound
from longreach.local_cluster import LocalCluster
from longreach.telemetry.names import COORDINATOR, METRICS, NODE, WORKER
from longreach.telemetry.spelling import prometheus_name
from tests.e2e.conftest import WORKER_FLAGS
from tests.e2e.test_e2e_repair import eventually, ids
from tests.unit.telemetry.collector import Collector, Span, collecting

pytestmark = pytest.mark.cluster

NODES = 3
TOKENS = 12
Labels = dict[str, str]


class Scrape:
    """What a process exported: samples by name."""

    def __init__(self, url: str) -> None:
        with urllib.request.urlopen(url, timeout=30) as reply:
            text = reply.read().decode()
        self.samples: dict[str, list[tuple[Labels, float]]] = {}
        for family in text_string_to_metric_families(text):
            for sample in family.samples:
                self.samples.setdefault(sample.name, []).append((sample.labels, sample.value))

    def sum(self, name: str, **labels: str) -> float:
        """Over all series with these labels."""
        found = self.samples[f"longreach:{name}"]
        return sum(value for at, value in found if labels.items() <= at.items())


@pytest.fixture(scope="module")
def collector() -> Iterator[Collector]:
    with collecting() as collector:
        yield collector


@pytest.fixture(scope="module")
def cluster(
    tiny_model: Callable[[str], Path],
    tmp_path_factory: pytest.TempPathFactory,
    collector: Collector,
) -> Iterator[LocalCluster]:
    on = {"metrics_listen": "127.0.0.1:0", "otlp_endpoint": collector.endpoint}
    on["log_format"] = "json"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OTEL_BSP_SCHEDULE_DELAY", "100")
        cluster = LocalCluster(
            tiny_model("llama"),
            nodes=NODES,
            data_dir=tmp_path_factory.mktemp("telemetry"),
            worker_flags={**WORKER_FLAGS, **on},
            node_flags={"index_kind": "sketch", "quality_sample_share": 1, **on},
            coordinator_flags={
                "inline_prompt_tokens": 128,
                "repair_grace_s": 0,
                "rebalance_pause_s": -1,
                "trace_sample_share": 0,
                "http_listen": "127.0.0.1:0",
                **on,
            },
            tls=True,
        )
    with cluster:
        yield cluster


@pytest.fixture(scope="module")
def scraped(cluster: LocalCluster) -> dict[str, dict[str, Scrape]]:
    """By service and process, after a few requests, a loss and its repair."""
    with cluster.client(timeout_s=120) as client:
        context = client.contexts.create(tokens=ids(400, 1))
        eventually(lambda: client.contexts.get(context.id).index_fraction == 1.0)
        for _ in range(2):
            client.generate([9, 8, 7], context=context.id, max_tokens=TOKENS, ignore_eos=True)
            client.generate(ids(300, 2), max_tokens=TOKENS, ignore_eos=True)
        with pytest.raises(NotFound):
            client.generate([1], context="no-such-context", max_tokens=1)
        # What it holds is copied before it goes.
        assert cluster.process("node-0").stop(grace_s=60) == 0
        eventually(lambda: client.status().segments_under_replicated == 0)
    names = {
        COORDINATOR: ["coordinator"],
        WORKER: ["worker-0"],
        NODE: [f"node-{n}" for n in range(1, NODES)],
    }
    return {
        service: {name: Scrape(cluster.process(name).metrics_url) for name in members}
        for service, members in names.items()
    }


@pytest.mark.parametrize("name", METRICS)
def test_every_metric_is_exported_by_its_services_with_its_labels(
    scraped: dict[str, dict[str, Scrape]], name: str
) -> None:
    metric = METRICS[name]
    spelled = prometheus_name(metric) + ("_count" if metric.bounds else "")
    wanted = {"engine", *metric.labels}
    for service in metric.services:
        for member, scrape in scraped[service].items():
            series = scrape.samples.get(spelled, [])
            assert series, f"{member} does not export {spelled}"
            assert all(labels.keys() == wanted for labels, _ in series), series
    for service in scraped.keys() - set(metric.services):
        assert not any(spelled in scrape.samples for scrape in scraped[service].values())


def test_nothing_outside_the_table_is_exported(scraped: dict[str, dict[str, Scrape]]) -> None:
    known = {prometheus_name(metric) for metric in METRICS.values()}
    for scrapes in scraped.values():
        for scrape in scrapes.values():
            ours = {name for name in scrape.samples if name.startswith("longreach:")}
            for each in ours:
                bare = {each.removesuffix(end) for end in ("", "_bucket", "_sum", "_count")}
                assert bare & known, each


def test_the_coordinator_counts_what_clients_did(scraped: dict[str, dict[str, Scrape]]) -> None:
    [seen] = scraped[COORDINATOR].values()
    assert seen.sum("request_success_total", finished_reason="length") == 4
    assert seen.sum("request_failure_total", code="NOT_FOUND") == 1
    assert seen.sum("generation_tokens_total") == 4 * TOKENS
    assert seen.sum("time_to_first_token_seconds_count") == 4
    assert seen.sum("e2e_request_latency_seconds_count") == 4
    assert seen.sum("inter_token_latency_seconds_count") == 4 * (TOKENS - 1)
    # A prompt of 300: its first 256 tokens are stored, and found by the second request.
    assert seen.sum("prefix_cache_queries_total") == 600
    assert seen.sum("prefix_cache_hits_total") == 256
    # Beyond the contexts: two questions of three tokens, two rests of 44.
    assert seen.sum("prompt_tokens_total") == 2 * 3 + 2 * 44
    whole = seen.sum("e2e_request_latency_seconds_sum")
    parts = (
        seen.sum("time_to_first_token_seconds_sum"),
        seen.sum("request_decode_time_seconds_sum"),
    )
    assert whole == pytest.approx(sum(parts))
    assert parts[0] == pytest.approx(
        seen.sum("request_queue_time_seconds_sum") + seen.sum("request_prefill_time_seconds_sum")
    )
    assert seen.sum("inter_token_latency_seconds_sum") == pytest.approx(parts[1])
    assert seen.sum("kv_coverage_ratio_sum") == 4
    assert 0 < seen.sum("retrieval_attended_fraction_sum") <= 4
    assert seen.sum("num_requests_running") == 0


def test_the_coordinator_sees_its_cluster(scraped: dict[str, dict[str, Scrape]]) -> None:
    [seen] = scraped[COORDINATOR].values()
    assert seen.sum("members", role="node", state="alive") == NODES - 1
    assert seen.sum("members", role="node") == NODES
    assert seen.sum("contexts", state="ready") == 2
    assert seen.sum("contexts") == 2
    assert seen.sum("is_leader") == 1
    assert seen.sum("repairs_total", result="done") > 0
    assert seen.sum("repairs_total", result="failed") == 0
    assert seen.sum("segments_under_replicated") == 0
    used, limit = seen.sum("node_memory_used_bytes"), seen.sum("node_memory_limit_bytes")
    assert seen.sum("kv_cache_usage_perc") == pytest.approx(used / limit)


def test_the_worker_counts_its_work(scraped: dict[str, dict[str, Scrape]]) -> None:
    [worker] = scraped[WORKER].values()
    [coordinator] = scraped[COORDINATOR].values()
    fed = coordinator.sum("generation_tokens_total") + coordinator.sum("prompt_tokens_total")
    assert worker.sum("step_rows_total") == fed - 4, "a last token is not fed"
    assert worker.sum("prefill_tokens_total") == 400 + 256
    assert worker.sum("step_seconds_count") > 0
    assert worker.sum("retrieval_rpc_seconds_count") > 0
    assert worker.sum("sessions_open") == 0
    assert worker.sum("resident_kv_bytes") == 0
    assert worker.sum("prefills_running") == 0


def test_the_nodes_count_theirs(
    cluster: LocalCluster, scraped: dict[str, dict[str, Scrape]]
) -> None:
    nodes = scraped[NODE].values()
    copied_in = sum(node.sum("copy_bytes_total", direction="in") for node in nodes)
    assert copied_in > 0
    assert copied_in == sum(node.sum("copy_bytes_total", direction="out") for node in nodes)
    for node in nodes:
        assert node.sum("attend_seconds_count") > 0
        assert node.sum("attend_rows_total") >= node.sum("attend_seconds_count")
        assert node.sum("append_tokens_total") > 0
        assert node.sum("shards", state="sealed") > 0
        assert node.sum("memory_used_bytes", kind="kv") > 0
        assert node.sum("memory_used_bytes") < node.sum("memory_limit_bytes")
        assert node.sum("index_build_seconds_count") > 0
        assert node.sum("checksum_failures_total") == node.sum("snapshot_failures_total") == 0
    for scrapes in scraped.values():
        for scrape in scrapes.values():
            assert scrape.sum("certificate_not_after_seconds") > time.time()


def test_a_trace_leads_from_the_client_through_every_service(
    cluster: LocalCluster, scraped: dict[str, dict[str, Scrape]], collector: Collector
) -> None:
    """The client decides: the share of the coordinator is 0 here, and nothing was traced before."""
    assert collector.spans == []
    application = TracerProvider(sampler=ALWAYS_ON, shutdown_on_exit=False).get_tracer("test")
    with cluster.client(timeout_s=120) as client:
        with application.start_as_current_span("application") as outermost:
            context = client.contexts.create(tokens=ids(200, 3))
            answer = client.generate(
                [9, 8, 7], context=context.id, max_tokens=TOKENS, ignore_eos=True
            )
        client.generate([9, 8, 7], context=context.id, max_tokens=1)  # not part of it
    collector.wait(lambda: {"text_completion", "attend"} <= {s.name[:15] for s in collector.spans})
    ours = outermost.get_span_context()

    def finished() -> bool:
        """Every span has come once all parents have, and each step's children on the nodes, which
        send theirs by themselves."""
        known = {span.span_id for span in collector.spans} | {f"{ours.span_id:016x}"}
        names = Counter(span.name for span in collector.spans)
        return names["attend"] >= 3 * names["step"] > 0 and all(
            span.parent_id in known for span in collector.spans
        )

    collector.wait(finished)
    spans = collector.spans
    assert {span.trace_id for span in spans} == {f"{ours.trace_id:032x}"}
    by_id = {span.span_id: span for span in spans}
    [request] = [span for span in spans if span.name.startswith("text_completion")]
    assert request.parent_id == f"{ours.span_id:016x}"
    assert request.service == "longreach-coordinator"
    assert request.attributes["gen_ai.usage.output_tokens"] == TOKENS == len(answer.tokens)
    assert request.attributes["gen_ai.usage.input_tokens"] == 203
    assert request.attributes["gen_ai.usage.cache_read.input_tokens"] == 200
    assert request.attributes["gen_ai.response.finish_reasons"] == ["length"]
    assert request.attributes["longreach.context.id"] == context.id
    [creation] = [span for span in spans if span.name == "create context"]
    assert creation.parent_id == request.parent_id
    [prefill] = [span for span in spans if span.name == "prefill"]
    assert (prefill.service, prefill.parent_id) == ("longreach-worker", creation.span_id)
    [opening] = [span for span in spans if span.name == "open session on nodes"]
    assert by_id[opening.parent_id].name == "open session"

    attends = [span for span in spans if span.name == "attend"]
    for span in attends:
        way = [*_upwards(span, by_id)]
        assert [each.name.split()[0] for each in way] == [
            *("attend", "layers", "device", "step", "text_completion")
        ]
        assert [each.service.removeprefix("longreach-") for each in way] == [
            *(NODE, WORKER, WORKER, COORDINATOR, COORDINATOR)
        ]
    steps = [span for span in spans if span.name == "step"]
    assert 0 < len(steps) <= STEPS_FIRST < TOKENS, "later steps of a long answer are not traced"
    assert len({span.attributes["longreach.layer"] for span in attends}) == 3
    assert len(attends) >= 3 * len(steps)
    assert {span.engine for span in attends} <= {"node-1", "node-2"}
    assert not any(span.failed for span in spans)


def _upwards(span: Span, by_id: dict[str, Span]) -> Iterator[Span]:
    at: Span | None = span
    while at is not None:
        yield at
        at = by_id.get(at.parent_id)


def test_a_trace_context_over_http_is_followed(
    cluster: LocalCluster, scraped: dict[str, dict[str, Scrape]], collector: Collector
) -> None:
    trace_id = "5" * 32
    log = cluster.process("coordinator").log_path.read_text()
    address = re.findall(r"OpenAI-compatible API on (\S+?)\"", log)[-1]
    files = cluster.environment
    tls = ssl.create_default_context(cafile=files["LONGREACH_TLS_CA"])
    tls.load_cert_chain(files["LONGREACH_TLS_CERT"], files["LONGREACH_TLS_KEY"])
    tls.check_hostname = False
    request = urllib.request.Request(
        f"https://{address}/v1/completions",
        json.dumps({"model": "", "prompt": "a", "max_tokens": 2}).encode(),
        {"traceparent": f"00-{trace_id}-00f067aa0ba902b7-01"},
    )
    with urllib.request.urlopen(request, timeout=60, context=tls) as reply:
        answered = json.load(reply)
    names = lambda: {s.name.split()[0] for s in collector.spans if s.trace_id == trace_id}
    collector.wait(lambda: {"text_completion", "step", "device"} <= names())
    [ours] = [
        s for s in collector.spans if s.trace_id == trace_id and s.name.startswith("text_comp")
    ]
    assert ours.parent_id == "00f067aa0ba902b7"
    assert answered["id"].endswith(ours.attributes["gen_ai.response.id"])


def test_logs_are_json_that_says_what_they_belong_to(
    cluster: LocalCluster, scraped: dict[str, dict[str, Scrape]]
) -> None:
    trace_id = "7" * 32
    with cluster.client(timeout_s=120) as client:
        client._metadata = (("traceparent", f"00-{trace_id}-00f067aa0ba902b7-01"),)
        answer = client.generate(ids(20, 5), max_tokens=3, ignore_eos=True)
    records = {name: _records(cluster, name) for name in ("coordinator", "worker-0", "node-1")}
    services = {"coordinator": COORDINATOR, "worker-0": WORKER, "node-1": NODE}
    for name, lines in records.items():
        assert lines, name
        for line in lines:
            assert {"time", "level", "service", "logger", "message"} <= line.keys()
            assert line["service"] == services[name]
            datetime.datetime.fromisoformat(line["time"])
        engine = "coordinator-0" if name == "coordinator" else name
        assert lines[-1]["engine"] == engine
    [ended] = [line for line in records["coordinator"] if line.get("trace_id") == trace_id]
    assert ended["request_id"] == answer.request_id
    assert ended["session_id"]
    assert "3 tokens" in ended["message"]


def _records(cluster: LocalCluster, name: str) -> list[dict[str, str]]:
    return [json.loads(line) for line in cluster.process(name).log_path.read_text().splitlines()]
