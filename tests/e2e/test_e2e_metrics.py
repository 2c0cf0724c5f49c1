"""Every metric of the table, scraped from the processes that say they export it."""

from __future__ import annotations

import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from prometheus_client.parser import text_string_to_metric_families

from longreach.errors import NotFound
from longreach.local_cluster import LocalCluster
from longreach.telemetry.names import COORDINATOR, METRICS, NODE, WORKER
from longreach.telemetry.spelling import prometheus_name
from tests.e2e.conftest import WORKER_FLAGS
from tests.e2e.test_e2e_repair import eventually, ids

pytestmark = pytest.mark.cluster

ON = {"metrics_listen": "127.0.0.1:0"}
NODES = 3
TOKENS = 12
ELSEWHERE = {
    name: "fed by the sampling of answers, which has its own test"
    for name in METRICS
    if name.startswith("retrieval_") and "sample" in name
}
"""Metrics that this test does not look for, and why."""

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
def cluster(
    tiny_model: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[LocalCluster]:
    with LocalCluster(
        tiny_model("llama"),
        nodes=NODES,
        data_dir=tmp_path_factory.mktemp("metrics"),
        worker_flags={**WORKER_FLAGS, **ON},
        node_flags={"index_kind": "sketch", **ON},
        coordinator_flags={
            "inline_prompt_tokens": 128,
            "repair_grace_s": 0,
            "rebalance_pause_s": -1,
            **ON,
        },
        tls=True,
    ) as cluster:
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
        cluster.process("node-0").kill()
        eventually(lambda: client.status().segments_under_replicated > 0)
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


@pytest.mark.parametrize("name", [each for each in METRICS if each not in ELSEWHERE])
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
