"""What the chart lets the coordinator do with the Kubernetes API, and what its code asks for."""

from __future__ import annotations

from typing import Any

import pytest
from helm_python import HelmRenderError

from coordinator.config import CoordinatorConfig
from longreach.config import read_config
from tests.deploy.chart import MATRIX, Document, documents, environment, only, workloads

COORDINATOR = "demo-longreach-coordinator"
Rule = tuple[str, str, str, tuple[str, ...]]


def rules_of(docs: list[Document]) -> set[Rule]:
    """(group, resource, verb, names) that the coordinator's account may use."""
    role = only(docs, "Role", COORDINATOR)
    return {
        (group, resource, verb, tuple(rule.get("resourceNames", ())))
        for rule in role["rules"]
        for group in rule["apiGroups"]
        for resource in rule["resources"]
        for verb in rule["verbs"]
    }


def settings_of(docs: list[Document]) -> CoordinatorConfig:
    variables = environment(workloads(docs)["coordinator"]["containers"][0])
    return read_config(CoordinatorConfig, "coordinator", [], variables)


SLICES = {("discovery.k8s.io", "endpointslices", verb, ()) for verb in ("list", "watch")}
LEASES = {("coordination.k8s.io", "leases", "create", ())} | {
    ("coordination.k8s.io", "leases", verb, ("demo-longreach-leader",))
    for verb in ("get", "update")
}
SCALE = {
    ("apps", "statefulsets/scale", verb, ("demo-longreach-node",)) for verb in ("get", "update")
} | {("", "pods", "delete", tuple(f"demo-longreach-node-{n}" for n in range(8)))}


@pytest.mark.parametrize(
    ("name", "rights"),
    [
        ("defaults", SLICES),
        ("three coordinators", SLICES | LEASES),
        ("autoscaling", SLICES | LEASES | SCALE),
    ],
)
def test_the_role_grants_what_the_settings_use_and_no_more(
    rendered: dict[str, list[Document]], name: str, rights: set[Rule]
) -> None:
    docs = rendered[name]
    assert rules_of(docs) == rights
    config = settings_of(docs)
    slices = only(docs, "Service", config.kubernetes_node_service)
    assert slices["spec"]["selector"]["app.kubernetes.io/component"] == "retrieval-node"
    leases = {names for _, resource, _, names in rights if resource == "leases"} - {()}
    assert leases == ({(config.kubernetes_lease,)} if config.kubernetes_lease else set())
    if config.kubernetes_node_set:
        assert only(docs, "StatefulSet", config.kubernetes_node_set)
    assert bool(config.kubernetes_node_set) == (rights >= SCALE)
    binding = only(docs, "RoleBinding", COORDINATOR)
    account = workloads(docs)["coordinator"]["serviceAccountName"]
    assert binding["roleRef"]["name"] == COORDINATOR
    assert [each["name"] for each in binding["subjects"]] == [account]
    others = {workloads(docs)[each]["serviceAccountName"] for each in ("worker", "retrievalNode")}
    assert account not in others, "only the coordinator has rights"
    assert not [doc for doc in docs if doc["kind"].startswith("Cluster")]


def test_without_kubernetes_there_is_no_right_and_no_setting(
    rendered: dict[str, list[Document]],
) -> None:
    assert not [doc for doc in rendered["bare"] if doc["kind"] in ("Role", "RoleBinding")]
    assert not settings_of(rendered["bare"]).uses_kubernetes


def test_the_bounds_of_scaling_reach_the_coordinator(
    rendered: dict[str, list[Document]],
) -> None:
    docs = rendered["autoscaling"]
    config = settings_of(docs)
    assert (config.scale_nodes_min, config.scale_nodes_max) == (2, 8)
    assert (config.scale_out_above, config.scale_in_below) == (0.85, 0.5)
    assert config.scale_in_after_s == 1800
    nodes = only(docs, "StatefulSet", "demo-longreach-node")["spec"]
    assert nodes["replicas"] == 2, "a new release begins with the least"
    assert nodes["persistentVolumeClaimRetentionPolicy"]["whenScaled"] == "Delete"
    plain = only(rendered["defaults"], "StatefulSet", "demo-longreach-node")["spec"]
    assert "persistentVolumeClaimRetentionPolicy" not in plain, "a set sized by hand keeps its KV"


@pytest.mark.parametrize(
    ("values", "said"),
    [
        (
            {"kubernetes": {"enabled": False}, "retrievalNode": {"autoscaling": {"enabled": True}}},
            "kubernetes.enabled is not",
        ),
        (
            {"retrievalNode": {"autoscaling": {"enabled": True, "minReplicas": 7}}},
            "minReplicas is 7 and maxReplicas 6",
        ),
    ],
)
def test_values_that_contradict_each_other_are_refused(values: dict[str, Any], said: str) -> None:
    with pytest.raises(HelmRenderError, match=said):
        documents(values)


def test_a_node_learns_its_zone_from_its_pod_unless_it_is_told(
    rendered: dict[str, list[Document]],
) -> None:
    def zone(docs: list[Document]) -> Any:
        container = workloads(docs)["retrievalNode"]["containers"][0]
        (found,) = [each for each in container["env"] if each["name"] == "LONGREACH_ZONE"]
        return found.get("value") or found["valueFrom"]["fieldRef"]["fieldPath"]

    assert zone(rendered["defaults"]) == "metadata.labels['topology.kubernetes.io/zone']"
    assert zone(documents({"retrievalNode": {"config": {"zone": "here"}}})) == "here"


@pytest.mark.parametrize("name", MATRIX)
def test_no_variable_is_given_twice(rendered: dict[str, list[Document]], name: str) -> None:
    for spec in workloads(rendered[name]).values():
        names = [each["name"] for each in spec["containers"][0]["env"]]
        assert len(names) == len(set(names))
