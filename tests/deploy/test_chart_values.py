"""The chart's values: strict lint, a schema that refuses unknown keys, settings that services read,
and every rendered document held to Kubernetes' own schemas."""

from __future__ import annotations

import copy
import dataclasses
import json
import re
from pathlib import Path
from typing import Any

import kubernetes_validate  # type: ignore[import-untyped]
import pytest
import yaml
from helm_python import Chart, HelmValuesError
from helm_python import chart as helm

from longreach.config import read_config
from longreach.planning.accelerators import find_accelerator
from longreach.planning.plan import Workload, make_plan
from longreach.planning.shapes import load_shape
from longreach.planning.values import plan_values
from longreach.types import Budget
from tests.deploy.chart import (
    CHART,
    FOREIGN,
    MATRIX,
    Document,
    environment,
    settings,
    workloads,
)

LOG_LEVEL = "LONGREACH_LOG_LEVEL"
"""Read by longreach.logging, before a service has its configuration."""

KUBERNETES = ["1.29", "1.30", "1.31", "1.32", "1.33", "1.37"]


@pytest.mark.parametrize("version", KUBERNETES)
def test_strict_lint_finds_nothing(version: str) -> None:
    found = helm.lint(str(CHART), strict=True, kube_version=f"{version}.0")
    said = [each["error"] for each in found["messages"]]
    assert found["errors"] == []
    assert said == ["icon is recommended"], "a note, not a warning"


@pytest.mark.parametrize("version", KUBERNETES)
def test_every_document_is_valid_kubernetes(
    rendered: dict[str, list[Document]], version: str
) -> None:
    """Documents that several entries of the matrix have in common are checked once."""
    different = {json.dumps(doc, sort_keys=True): doc for docs in rendered.values() for doc in docs}
    assert len(different) > 2 * len(rendered["defaults"])
    for document in different.values():
        if document["apiVersion"] in FOREIGN:
            continue  # test_chart_observability.py looks at these
        kubernetes_validate.validate(document, version, strict=True)


def test_validation_would_notice_an_unknown_field(rendered: dict[str, list[Document]]) -> None:
    broken = copy.deepcopy(rendered["defaults"][0])
    broken["spec"]["colour"] = "red"
    with pytest.raises(kubernetes_validate.ValidationError):
        kubernetes_validate.validate(broken, KUBERNETES[-1], strict=True)


@pytest.mark.parametrize(
    ("path", "value"),
    [
        (["colour"], "red"),
        (["worker", "replica"], 3),
        (["worker", "config", "windw_tokens"], 3),
        (["coordinator", "config", "listen"], "0.0.0.0:1"),
        (["retrievalNode", "config", "cluster_secret"], "in the clear"),
        (["image", "Tag"], "x"),
        (["tls", "cert"], "x"),
        (["retrievalNode", "replicas"], 0),
        (["retrievalNode", "replicas"], "3"),
        (["worker", "variant"], "rocm"),
        (["worker", "config", "max_sessions"], "many"),
        (["retrievalNode", "config", "memory_limit_bytes"], "lots"),
        (["coordinator", "service", "port"], 70000),
        (["telemetry", "serviceMonitor", "interval"], "often"),
        (["telemetry", "dashboards", "label"], {"a": "b"}),
        (["networkPolicy", "scrapers"], "prometheus"),
        (["coordinator", "autoscaling", "kind"], "VerticalPodAutoscaler"),
        (["coordinator", "autoscaling", "requestsPerReplica"], 0),
        (["tls", "enabled"], True),
    ],
    ids=lambda each: "/".join(each) if isinstance(each, list) else str(each),
)
def test_wrong_values_are_refused(path: list[str], value: object) -> None:
    """The last one: TLS without an issuer."""
    values: dict[str, Any] = {}
    at = values
    for key in path[:-1]:
        at = at.setdefault(key, {})
    at[path[-1]] = value
    with pytest.raises(HelmValuesError):
        Chart.load(str(CHART)).validate_schema(values)


@pytest.mark.parametrize("name", MATRIX)
def test_right_values_are_accepted(name: str) -> None:
    Chart.load(str(CHART)).validate_schema(MATRIX[name])


def test_values_and_schema_name_the_same_keys() -> None:
    chart = Chart.load(str(CHART))
    schema = copy.deepcopy(chart.schema)
    assert schema is not None
    shared = schema["$defs"]

    def check(values: Any, schema: Any, where: str) -> None:
        if "$ref" in schema:
            schema = shared[schema["$ref"].rpartition("/")[2]]
        if not isinstance(values, dict) or "properties" not in schema:
            return
        assert schema["additionalProperties"] is False, where
        known = set(schema["properties"]) - {"global", "claims"}
        assert set(values) == known, where
        for key, value in values.items():
            check(value, schema["properties"][key], f"{where}.{key}")

    values = copy.deepcopy(chart.values)
    values.pop("global", None)
    for service in ("coordinator", "worker", "retrievalNode"):
        values[service].pop("resources")
    for service in ("coordinator", "worker", "retrievalNode"):
        schema["properties"][service]["properties"].pop("resources")
    check(values, schema, "values")


def test_every_value_has_a_comment_near_it() -> None:
    lines = (CHART / "values.yaml").read_text().splitlines()
    sections = [i for i, line in enumerate(lines) if re.match(r"[a-z]\w*:$", line)]
    for start, stop in zip(sections, [*sections[1:], len(lines)], strict=True):
        comments = [line for line in lines[start:stop] if line.strip().startswith("#")]
        assert comments, lines[start]


def test_the_settings_are_those_the_services_read() -> None:
    stale = settings.stale_files()
    assert [path.name for path in stale] == [], "run python deploy/helm/settings.py"
    for service, config in settings.SERVICES.items():
        names = {field.name for field in dataclasses.fields(config)}
        assert names >= settings.CHART_SETS[service]


@pytest.mark.parametrize("name", MATRIX)
def test_services_start_with_the_environment_they_are_given(
    rendered: dict[str, list[Document]], name: str
) -> None:
    """Each service's own parser reads it, and every LONGREACH variable is one of its settings."""
    for service, spec in workloads(rendered[name]).items():
        variables = environment(spec["containers"][0])
        config = settings.SERVICES[service]
        known = {f"LONGREACH_{field.name.upper()}" for field in dataclasses.fields(config)}
        ours = {each for each in variables if each.startswith("LONGREACH_")} - {LOG_LEVEL}
        assert ours <= known, service
        missing = known - ours - {"LONGREACH_EXIT_WITH_PARENT"}
        assert {each.removeprefix("LONGREACH_").lower() for each in missing} <= settings.CHART_SETS[
            service
        ]
        read_config(config, service, [], variables)


def test_defaults_of_the_chart_are_defaults_of_the_services(
    rendered: dict[str, list[Document]],
) -> None:
    for service, spec in workloads(rendered["defaults"]).items():
        config = settings.SERVICES[service]
        read: Any = read_config(config, service, [], environment(spec["containers"][0]))
        for field in settings.settings_of(service):
            if (service, field.name) == ("retrievalNode", "zone"):
                continue  # empty takes that of the pod's machine
            assert getattr(read, field.name) == field.default, f"{service}.{field.name}"


def test_large_whole_numbers_are_written_in_full(rendered: dict[str, list[Document]]) -> None:
    variables = environment(workloads(rendered["everything"])["coordinator"]["containers"][0])
    assert variables["LONGREACH_MAX_WAITING"] == "2000000"
    assert variables["LONGREACH_DRAIN_GRACE_S"] == "90.5"


@pytest.mark.parametrize(
    ("example", "context", "nodes", "node_memory"),
    [("one-gpu-three-nodes", 2**18, 3, 0), ("million-tokens-8b", 10**6, 0, 128 * 2**30)],
)
def test_examples_have_the_sizes_that_the_planner_computes(
    example: str, context: int, nodes: int, node_memory: int
) -> None:
    work = Workload(
        load_shape("llama-3-8b"), context, 2, 2, find_accelerator("a100-80g"),
        Budget.parse("top_k=100"), nodes=nodes, node_memory_bytes=node_memory,
    )  # fmt: skip
    planned = yaml.safe_load(plan_values(make_plan(work)))

    def check(part: Any, whole: Any) -> None:
        for key, value in part.items():
            if isinstance(value, dict):
                check(value, whole[key])
            else:
                assert whole[key] == value, key

    check(planned, MATRIX[example])


def test_an_archive_carries_the_chart_without_its_examples(tmp_path: Path) -> None:
    archive = Path(Chart.load(str(CHART)).save(str(tmp_path)))
    packed = Chart.load(str(archive))
    assert packed.schema == Chart.load(str(CHART)).schema
    assert not [each["name"] for each in packed.files if "examples" in each["name"]]
