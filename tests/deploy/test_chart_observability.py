"""What the chart gives Prometheus, Grafana and autoscalers: it is off unless asked, and then names
ports, labels and metrics that exist."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from helm_python import Chart, HelmRenderError

from coordinator.config import CoordinatorConfig
from longreach.config import read_config
from tests.deploy.chart import CHART, FOREIGN, MATRIX, Document, documents, environment, only
from tests.deploy.chart import workloads as pods
from tests.deploy.promql import ALERTS, FOLDER, RULES_FILE, TARGET_LABELS, exported, names_in
from tests.deploy.promtool import promtool

PORTS = {"coordinator": 9300, "worker": 9301, "retrievalNode": 9302}
CATALOG = {"catalog": {"url": "redis://valkey:6379/0"}}


def of_kind(docs: list[Document], kind: str) -> list[Document]:
    return [doc for doc in docs if doc["kind"] == kind]


@pytest.mark.parametrize("name", sorted(MATRIX.keys() - {"observed"}))
def test_nothing_of_an_operator_is_made_unasked(
    rendered: dict[str, list[Document]], name: str
) -> None:
    """A cluster without its definitions would refuse the release."""
    foreign = {doc["kind"] for doc in rendered[name] if doc["apiVersion"] in FOREIGN}
    assert foreign == ({"ScaledObject"} if name == "coordinators by KEDA" else set())
    assert not of_kind(rendered[name], "ConfigMap")


def test_one_service_leads_to_the_metrics_of_every_pod(
    rendered: dict[str, list[Document]],
) -> None:
    docs = rendered["defaults"]
    service = only(docs, "Service", "demo-longreach-metrics")["spec"]
    assert service["clusterIP"] == "None"
    assert service["publishNotReadyAddresses"] is True, "also pods that are not well"
    (port,) = service["ports"]
    for kind, name in (
        ("StatefulSet", "demo-longreach-coordinator"),
        ("Deployment", "demo-longreach-worker"),
        ("StatefulSet", "demo-longreach-node"),
    ):
        labels = only(docs, kind, name)["spec"]["template"]["metadata"]["labels"]
        assert service["selector"].items() <= labels.items()
    for which, spec in pods(docs).items():
        named = {each["name"]: each["containerPort"] for each in spec["containers"][0]["ports"]}
        assert named[port["targetPort"]] == PORTS[which]
    assert not [d for d in rendered["bare"] if d["metadata"]["name"] == "demo-longreach-metrics"]


def relabelled(rules: list[Document], labels: dict[str, str]) -> dict[str, str]:
    """What Prometheus makes of a target's labels (action `replace`)."""
    target: dict[str, str] = {}
    for rule in rules:
        value = rule.get("separator", ";").join(labels[each] for each in rule["sourceLabels"])
        match = re.fullmatch(rule.get("regex", "(.*)"), value)
        assert match
        replacement = re.sub(r"\$(\d)", r"\\\1", rule.get("replacement", "$1"))
        target[rule["targetLabel"]] = match.expand(replacement)
    return target


def test_the_monitor_gives_targets_the_labels_that_rules_know(
    rendered: dict[str, list[Document]],
) -> None:
    docs = rendered["observed"]
    monitor = only(docs, "ServiceMonitor", "demo-longreach")
    assert monitor["metadata"]["labels"]["release"] == "monitoring"
    service = only(docs, "Service", "demo-longreach-metrics")
    chosen = monitor["spec"]["selector"]["matchLabels"]
    matching = [
        doc for doc in of_kind(docs, "Service")
        if chosen.items() <= doc["metadata"]["labels"].items()
    ]  # fmt: skip
    assert matching == [service], "nothing is scraped twice"
    (endpoint,) = monitor["spec"]["endpoints"]
    assert endpoint["port"] == service["spec"]["ports"][0]["name"]
    assert endpoint["path"] == "/metrics"
    jobs = set()
    for kind, name in (
        ("StatefulSet", "demo-longreach-coordinator"),
        ("Deployment", "demo-longreach-worker"),
        ("StatefulSet", "demo-longreach-node"),
    ):
        labels = only(docs, kind, name)["spec"]["template"]["metadata"]["labels"]
        meta = {
            f"__meta_kubernetes_pod_label_{re.sub(r'[^a-zA-Z0-9_]', '_', key)}": value
            for key, value in labels.items()
        }
        made = relabelled(endpoint["relabelings"], meta | {"__meta_kubernetes_namespace": "ai"})
        assert made["release"] == "ai/demo"
        assert set(made) <= TARGET_LABELS
        jobs.add(made["job"])
    assert jobs == {"longreach-coordinator", "longreach-worker", "longreach-node"}
    composed = yaml.safe_load((CHART.parents[1] / "observability" / "prometheus.yml").read_text())[
        "scrape_configs"
    ]
    assert jobs == {job["job_name"] for job in composed}, "Compose calls them the same"


def test_the_rules_are_those_of_the_file(
    rendered: dict[str, list[Document]], tmp_path: Path
) -> None:
    docs = rendered["observed"]
    written = yaml.safe_load(RULES_FILE.read_text())
    spec = only(docs, "PrometheusRule", "demo-longreach")["spec"]
    path = tmp_path / "rules.yaml"
    path.write_text(yaml.safe_dump(spec))
    promtool("check", "rules", str(path))
    urls = {
        rule["alert"]: rule["annotations"].pop("runbook_url")
        for group in spec["groups"] for rule in group["rules"] if "alert" in rule
    }  # fmt: skip
    base = "https://wiki.example.com/lr/docs/operations.md#"
    assert urls == {name: base + name.lower() for name in ALERTS}
    plain = documents({"telemetry": {"prometheusRule": {"enabled": True}}})
    assert only(plain, "PrometheusRule", "demo-longreach")["spec"] == written


def test_dashboards_are_those_of_the_files_and_found_by_the_sidecar(
    rendered: dict[str, list[Document]],
) -> None:
    files = {path.stem: path.read_text() for path in (FOLDER / "dashboards").glob("*.json")}
    maps = of_kind(rendered["observed"], "ConfigMap")
    assert len(maps) == len(files) == 3
    names = set()
    for each in maps:
        assert each["metadata"]["labels"]["grafana_dashboard"] == "1"
        assert each["metadata"]["annotations"] == {"grafana_folder": "longreach"}
        ((name, text),) = each["data"].items()
        names.add(name)
        stem = name.removeprefix("longreach-").removesuffix(".json")
        assert json.loads(text) == json.loads(files[stem])
        assert len(text) < 2**19, "a ConfigMap holds 1 MiB"
    assert len(names) == 3, "the sidecar writes all into one folder"


def test_the_archive_brings_rules_and_dashboards(tmp_path: Path) -> None:
    packed = Chart.load(str(Chart.load(str(CHART)).save(str(tmp_path))))
    names = {each["name"] for each in packed.files}
    assert {"observability/rules.yaml", "observability/dashboards/users.json"} <= names


@pytest.mark.parametrize("name", MATRIX)
def test_network_policies_let_prometheus_read_metrics_and_nothing_else(
    rendered: dict[str, list[Document]], name: str
) -> None:
    everyone = [{"namespaceSelector": {}, "podSelector": {"matchLabels": {
        "app.kubernetes.io/name": "prometheus"}}}]  # fmt: skip
    values = MATRIX[name].get("networkPolicy", {})
    wanted = values.get("scrapers", everyone)
    policies = of_kind(rendered[name], "NetworkPolicy")
    assert len(policies) == (3 if values.get("enabled", True) else 0)
    for policy in policies:
        service = policy["metadata"]["name"].rpartition("-")[2]
        port = PORTS["retrievalNode" if service == "node" else service]
        rules = [rule for rule in policy["spec"]["ingress"] if rule["from"] == wanted]
        assert [rule["ports"] for rule in rules] == [[{"port": port}]]
        others = [rule for rule in policy["spec"]["ingress"] if rule["from"] != wanted]
        assert port not in {each["port"] for rule in others for each in rule["ports"]}


@pytest.mark.parametrize(
    ("name", "most"), [("coordinators by load", 5), ("coordinators by KEDA", 4)]
)
def test_members_know_as_many_coordinators_as_there_may_be(
    rendered: dict[str, list[Document]], name: str, most: int
) -> None:
    docs = rendered[name]
    for service in ("worker", "retrievalNode"):
        told = environment(pods(docs)[service]["containers"][0])["LONGREACH_COORDINATORS"]
        assert len(told.split(",")) == most
    coordinators = only(docs, "StatefulSet", "demo-longreach-coordinator")["spec"]
    assert coordinators["replicas"] == 2, "a new release begins with the least"
    variables = environment(coordinators["template"]["spec"]["containers"][0])
    config = read_config(CoordinatorConfig, "coordinator", [], variables)
    assert config.kubernetes_lease == "demo-longreach-leader"
    assert only(docs, "PodDisruptionBudget", "demo-longreach-coordinator")


def scaled(docs: list[Document], target: Any) -> Document:
    assert target["apiVersion"] == "apps/v1"
    return only(docs, target["kind"], target["name"])


def test_a_horizontal_autoscaler_follows_the_running_requests(
    rendered: dict[str, list[Document]],
) -> None:
    docs = rendered["coordinators by load"]
    spec = only(docs, "HorizontalPodAutoscaler", "demo-longreach-coordinator")["spec"]
    assert scaled(docs, spec["scaleTargetRef"])
    assert (spec["minReplicas"], spec["maxReplicas"]) == (2, 5)
    (metric,) = spec["metrics"]
    assert metric["pods"]["target"] == {"type": "AverageValue", "averageValue": "64"}
    adapted = metric["pods"]["metric"]["name"].replace("longreach_", "longreach:")
    assert adapted in exported()
    page = (CHART.parents[2] / "docs" / "deploy.md").read_text()
    assert metric["pods"]["metric"]["name"] in page, "how the adapter is told"
    down = spec["behavior"]["scaleDown"]
    assert [each["value"] for each in down["policies"]] == [1]


def test_keda_asks_for_the_running_requests_of_this_release(
    rendered: dict[str, list[Document]],
) -> None:
    docs = rendered["coordinators by KEDA"]
    spec = only(docs, "ScaledObject", "demo-longreach-coordinator")["spec"]
    assert scaled(docs, spec["scaleTargetRef"])
    assert (spec["minReplicaCount"], spec["maxReplicaCount"]) == (2, 4)
    (trigger,) = spec["triggers"]
    asked = trigger["metadata"]
    assert asked["serverAddress"] == "http://prometheus.monitoring:9090"
    assert asked["threshold"] == "64"
    ((name, labels),) = names_in(asked["query"]).selected
    assert labels <= exported()[name]
    assert 'release="ai/demo"' in asked["query"], "as the ServiceMonitor labels it"
    assert not of_kind(docs, "HorizontalPodAutoscaler"), "KEDA makes its own"


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"coordinator": {"autoscaling": {"enabled": True}}}, r"autoscaling\.maxReplicas is 4"),
        (
            CATALOG | {"coordinator": {"autoscaling": {"enabled": True, "minReplicas": 9}}},
            "minReplicas is 9 and maxReplicas 4",
        ),
        (
            CATALOG | {"coordinator": {"autoscaling": {"enabled": True, "kind": "ScaledObject"}}},
            r"set coordinator\.autoscaling\.prometheus",
        ),
        (
            CATALOG
            | {"telemetry": {"metrics": False}, "coordinator": {"autoscaling": {"enabled": True}}},
            "nothing would tell",
        ),
        (
            {"telemetry": {"metrics": False, "serviceMonitor": {"enabled": True}}},
            "nothing to scrape",
        ),
    ],
)
def test_values_that_contradict_each_other_are_refused(values: dict[str, Any], said: str) -> None:
    with pytest.raises(HelmRenderError, match=said):
        documents(values)
