"""Dashboards and alerts on a running cluster: a real Prometheus, configured as Compose configures
it, scrapes real services, and every query of panels, rules and autoscalers is put to it."""

from __future__ import annotations

import contextlib
import json
import re
import socket
import subprocess
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from longreach.errors import NotFound
from longreach.local_cluster import LocalCluster
from tests.deploy.chart import MATRIX, documents
from tests.deploy.promql import (
    ALERTS,
    ROOT,
    RULES,
    RULES_FILE,
    filled,
    names_in,
    panel_expressions,
    rule_expressions,
)
from tests.deploy.promtool import need
from tests.e2e.conftest import WORKER_FLAGS
from tests.e2e.test_e2e_repair import eventually, ids

pytestmark = pytest.mark.cluster

ON = {"metrics_listen": "127.0.0.1:0"}
MEMBERS = {
    "longreach-coordinator": ["coordinator"],
    "longreach-worker": ["worker-0"],
    "longreach-node": ["node-0", "node-1"],
}
SLOW_MACHINE = {
    "LongreachTimeToFirstTokenHigh",
    "LongreachInterTokenLatencyHigh",
    "LongreachGoodputLow",
    "LongreachQualityUnsampled",
    "LongreachRetrievalRpcFails",
}
"""Alerts that a busy machine may rightly have."""


class Prometheus:
    """A Prometheus server over a cluster's services."""

    def __init__(self, cluster: LocalCluster, folder: Path) -> None:
        config = yaml.safe_load((ROOT / "deploy" / "observability" / "prometheus.yml").read_text())
        config["global"] |= {"scrape_interval": "2s", "evaluation_interval": "1s"}
        config["rule_files"] = [str(RULES_FILE)]
        for job in config["scrape_configs"]:
            job.pop("dns_sd_configs", None)
            urls = [cluster.process(name).metrics_url for name in MEMBERS[job["job_name"]]]
            targets = [urllib.parse.urlsplit(url).netloc for url in urls]
            job["static_configs"] = [{"targets": targets, "labels": {"release": "test"}}]
            job["relabel_configs"] = []
        path = folder / "prometheus.yml"
        path.write_text(yaml.safe_dump(config))
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            address = f"127.0.0.1:{free.getsockname()[1]}"
        self._url = f"http://{address}/api/v1/"
        self._log = (folder / "prometheus.log").open("wb")
        self._process = subprocess.Popen(
            [
                "prometheus",
                f"--config.file={path}",
                f"--storage.tsdb.path={folder / 'data'}",
                f"--web.listen-address={address}",
            ],
            stdout=self._log,
            stderr=subprocess.STDOUT,
        )

    def stop(self) -> None:
        self._process.terminate()
        self._process.wait(20)
        self._log.close()

    def ask(self, what: str, **parameters: str) -> Any:
        """The data of an answer; raises AssertionError with Prometheus' own words."""
        url = f"{self._url}{what}?{urllib.parse.urlencode(parameters)}"
        try:
            with urllib.request.urlopen(url, timeout=30) as reply:
                return json.load(reply)["data"]
        except urllib.error.HTTPError as refused:
            raise AssertionError(f"{parameters}: {refused.read().decode()}") from None

    def query(self, expression: str) -> list[Any]:
        found: list[Any] = self.ask("query", query=expression)["result"]
        return found

    def ready(self) -> bool:
        """Whether every service has been scraped twice at least."""
        assert self._process.poll() is None, "Prometheus has exited"
        try:
            up = self.query('up{job=~"longreach-.*"} == 1')
            counted = self.query('count_over_time(up{job=~"longreach-.*"}[1m]) >= 2')
        except OSError:
            return False
        return len(up) == len(counted) == sum(map(len, MEMBERS.values()))

    def alerts(self) -> set[str]:
        """Names of alerts that fire or are about to."""
        return {each["labels"]["alertname"] for each in self.ask("alerts")["alerts"]}


@pytest.fixture(scope="module")
def cluster(
    tiny_model: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[LocalCluster]:
    with LocalCluster(
        tiny_model("llama"),
        nodes=2,
        data_dir=tmp_path_factory.mktemp("observed"),
        worker_flags={**WORKER_FLAGS, **ON},
        node_flags={"index_kind": "sketch", "quality_sample_share": 1, **ON},
        coordinator_flags={"inline_prompt_tokens": 128, "rebalance_pause_s": -1, **ON},
        tls=True,
    ) as cluster:
        yield cluster


@pytest.fixture(scope="module")
def prometheus(
    cluster: LocalCluster, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Prometheus]:
    """After a few requests that Prometheus has seen happen."""
    need("prometheus")
    server = Prometheus(cluster, tmp_path_factory.mktemp("prometheus"))
    try:
        with cluster.client(timeout_s=120) as client:
            context = client.contexts.create(tokens=ids(400, 1))
            eventually(lambda: client.contexts.get(context.id).index_fraction == 1.0, 90)

            def use() -> None:
                client.generate([9, 8, 7], context=context.id, max_tokens=8, ignore_eos=True)
                client.generate(ids(300, 2), max_tokens=4, ignore_eos=True)
                with pytest.raises(NotFound):
                    client.generate([1], context="no-such-context", max_tokens=1)

            def rates() -> bool:
                use()
                return bool(
                    server.query("sum(rate(longreach:request_success_total[1m])) > 0")
                    and server.query("sum(rate(longreach:retrieval_recall_sampled_count[1m])) > 0")
                )

            use()
            eventually(server.ready, 90)
            eventually(rates, 90)
        yield server
    finally:
        server.stop()


def test_every_name_and_label_is_one_that_a_service_exports(prometheus: Prometheus) -> None:
    recorded = {rule["record"] for rule in RULES if "record" in rule}
    labels_of: dict[str, set[str]] = {}
    for where, expression in [*rule_expressions(), *panel_expressions()]:
        for name, labels in names_in(expression).selected:
            if name not in labels_of:
                series = prometheus.ask("series", **{"match[]": name})
                assert series or name in recorded, f"{where}: there is no {name}"
                labels_of[name] = set().union(*series)
            assert labels <= labels_of[name] or name in recorded, (
                f"{where}: {name} has not {labels}"
            )


def test_every_panel_has_something_to_show(prometheus: Prometheus) -> None:
    empty = set(panel_expressions())
    assert len(empty) > 80

    def all_have() -> bool:
        empty.difference_update([each for each in empty if prometheus.query(each[1])])
        return not empty

    # A scrape that came too late leaves a gap of a moment.
    with contextlib.suppress(AssertionError):
        eventually(all_have)
    assert empty == set()


def test_every_rule_is_evaluated_and_a_cluster_that_is_well_has_no_alert(
    prometheus: Prometheus,
) -> None:
    eventually(lambda: all(rule["health"] != "unknown" for rule in evaluated(prometheus)))
    failed = {rule["name"]: rule.get("lastError") for rule in evaluated(prometheus)
              if rule["health"] != "ok"}  # fmt: skip
    assert failed == {}
    assert len(evaluated(prometheus)) == len(RULES)
    eventually(lambda: prometheus.alerts() <= SLOW_MACHINE)
    for rule in RULES:
        if "record" in rule and "failures" not in rule["record"]:
            assert prometheus.query(rule["record"]), f"{rule['record']} has no series"


def evaluated(prometheus: Prometheus) -> list[Any]:
    return [rule for group in prometheus.ask("rules")["groups"] for rule in group["rules"]]


def test_the_autoscalers_query_finds_the_running_requests(prometheus: Prometheus) -> None:
    docs = documents(MATRIX["coordinators by KEDA"])
    (scaler,) = [doc for doc in docs if doc["kind"] == "ScaledObject"]
    asked = scaler["spec"]["triggers"][0]["metadata"]["query"]
    assert prometheus.query(asked.replace('"ai/demo"', '"test"'))
    assert not prometheus.query(asked), "another release's"


def test_the_choices_of_the_dashboards_have_values(prometheus: Prometheus) -> None:
    for path in sorted((RULES_FILE.parent / "dashboards").glob("*.json")):
        for each in json.loads(path.read_text())["templating"]["list"]:
            if each["type"] != "query":
                continue
            match = re.fullmatch(r"label_values\((\S+), (\w+)\)", each["query"]["query"])
            assert match
            values = prometheus.ask(f"label/{match[2]}/values", **{"match[]": match[1]})
            assert values, path
            chosen = prometheus.query(f'{match[1]}{{{match[2]}=~"{filled("$x")}"}}')
            assert chosen, "what All stands for"


def test_a_lost_node_is_told(cluster: LocalCluster, prometheus: Prometheus) -> None:
    """The last test: it takes a node away. One copy of everything is left."""
    wanted = {"LongreachNodeLost", "LongreachTargetDown", "LongreachShardsUnderReplicated"}
    assert wanted <= set(ALERTS)
    cluster.process("node-1").kill()
    eventually(lambda: wanted <= prometheus.alerts())
