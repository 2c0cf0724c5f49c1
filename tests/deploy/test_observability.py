"""Dashboards and alerts: what they name exists, each says what it means, each alert is in the
runbook and in promtool's tests."""

from __future__ import annotations

import dataclasses
import json
import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from coordinator.config import CoordinatorConfig
from gpu_worker.config import WorkerConfig
from retrieval_node.config import NodeConfig
from tests.deploy.promql import (
    ALERTS,
    FOLDER,
    ROOT,
    RULES,
    RULES_FILE,
    dashboards,
    exported,
    names_in,
    panel_expressions,
    panels,
    rule_expressions,
)
from tests.deploy.promtool import promtool

RUNBOOK = (ROOT / "docs" / "operations.md").read_text()
UNIT_TESTS = Path(__file__).parent / "rules_test.yaml"
WRITTEN = {path.stem: json.loads(path.read_text()) for path in (FOLDER / "dashboards").glob("*")}
SERVICES = (CoordinatorConfig, WorkerConfig, NodeConfig)
UNITS = {"s", "bytes", "Bps", "percentunit", "short", "reqps", "ops"}


def test_the_reader_of_expressions_reads() -> None:
    found = names_in(
        'sum by (release, le) (rate(a:b_bucket{x="by (z)", y=~"1"}[5m] offset 1h)) / on (q) '
        "group_left () up and histogram_quantile(0.9, c) unless max(d)"
    )
    assert dict(found.selected) == {
        "a:b_bucket": {"x", "y"}, "up": set(), "c": set(), "d": set(),
    }  # fmt: skip
    assert found.grouped == {"release", "le", "q"}


def test_every_query_names_what_services_export() -> None:
    known = exported()
    for where, expression in [*rule_expressions(), *panel_expressions()]:
        found = names_in(expression)
        assert found.selected, where
        for name, labels in found.selected:
            assert name in known, f"{where}: nobody exports {name}"
            assert labels <= known[name], f"{where}: {name} has no label {labels - known[name]}"
        carried = set().union(*(known[name] for name, _ in found.selected))
        assert found.grouped <= carried, f"{where}: no series carries {found.grouped - carried}"


def test_every_metric_is_shown() -> None:
    shown = {name for _, each in panel_expressions() for name, _ in names_in(each).selected}
    recorded = {rule["record"] for rule in RULES if "record" in rule}
    without_suffix = {re.sub(r"_(bucket|sum|count)$", "", each) for each in shown}
    wanted = {
        re.sub(r"_(bucket|sum|count)$", "", each)
        for each in exported()
        if each.startswith("longreach:")
    }
    assert wanted - recorded <= without_suffix, "a metric nobody looks at, or a panel is missing"


def test_dashboards_are_what_their_description_says() -> None:
    stale = dashboards.stale_files()
    assert [path.name for path in stale] == [], "run python deploy/observability/dashboards.py"
    assert set(WRITTEN) == set(dashboards.DASHBOARDS) == {"users", "cluster", "quality"}


@pytest.mark.parametrize("name", WRITTEN)
def test_a_dashboard_is_one_that_grafana_takes(name: str) -> None:
    board = WRITTEN[name]
    assert re.fullmatch(r"[a-z-]{1,40}", board["uid"])
    assert board["schemaVersion"] >= 36, "data sources are objects from there on"
    variables = {each["name"]: each for each in board["templating"]["list"]}
    assert variables["datasource"]["type"] == "datasource"
    assert variables["datasource"]["query"] == "prometheus"
    for each in variables.values():
        if each["type"] == "query":
            match = re.fullmatch(r"label_values\((\S+), (\w+)\)", each["query"]["query"])
            assert match
            assert match[2] in exported()[match[1]]
    ids = [panel["id"] for panel in board["panels"]]
    assert len(ids) == len(set(ids))
    used: set[str] = set()
    taken: set[tuple[int, int]] = set()
    for panel in board["panels"]:
        place = panel["gridPos"]
        cells = {
            (x, y)
            for x in range(place["x"], place["x"] + place["w"])
            for y in range(place["y"], place["y"] + place["h"])
        }
        assert not cells & taken, f"{panel['title']} overlaps"
        assert max(x for x, _ in cells) < 24
        taken |= cells
        used |= set(re.findall(r"\$(\w+)", json.dumps(panel.get("targets", []))))
    assert used - {"__rate_interval"} == set(variables) - {"datasource"}
    assert len({each["uid"] for each in WRITTEN.values()}) == len(WRITTEN)


def test_every_panel_says_what_it_shows() -> None:
    for where, panel in panels():
        assert panel["title"], where
        if panel["type"] == "row":
            continue
        assert len(panel["description"]) > 20, where
        assert panel["fieldConfig"]["defaults"]["unit"] in UNITS, where
        assert panel["datasource"] == {"type": "prometheus", "uid": "${datasource}"}, where
        references = [target["refId"] for target in panel["targets"]]
        assert len(references) == len(set(references)) >= 1, where
        for target in panel["targets"]:
            assert target["datasource"] == panel["datasource"], where
            labels = set(re.findall(r"\{\{(\w+)\}\}", target["legendFormat"]))
            assert labels <= names_in(target["expr"]).grouped, f"{where}: {labels}"


@pytest.mark.parametrize("name", ALERTS)
def test_an_alert_says_how_bad_it_is_and_where_to_read_on(name: str) -> None:
    alert = ALERTS[name]
    assert name.startswith("Longreach")
    assert alert["labels"]["severity"] in {"critical", "warning", "info"}
    annotations = alert["annotations"]
    assert set(annotations) == {"summary", "runbook_url"}
    assert annotations["runbook_url"] == f"docs/operations.md#{name.lower()}"
    known, found = exported(), names_in(alert["expr"])
    carried = set().union(*(known[each] for each, _ in found.selected))
    shown = set(re.findall(r"\$labels\.(\w+)", annotations["summary"]))
    assert "release" in shown
    assert shown <= carried


def runbook() -> dict[str, str]:
    """The entries under "Alerts", by alert."""
    section = RUNBOOK.partition("\n## Alerts\n")[2].partition("\n## ")[0]
    entries = re.split(r"(?m)^### ", section)[1:]
    return {head: text for head, _, text in (each.partition("\n") for each in entries)}


def test_latency_alarms_at_the_default_objectives() -> None:
    thresholds = {
        "LongreachTimeToFirstTokenHigh": CoordinatorConfig.objective_ttft_s,
        "LongreachInterTokenLatencyHigh": CoordinatorConfig.objective_itl_s,
    }
    for name, objective in thresholds.items():
        assert float(ALERTS[name]["expr"].rpartition(">")[2]) == objective


def test_every_alert_has_an_entry_and_every_entry_an_alert() -> None:
    assert set(runbook()) == set(ALERTS)


@pytest.mark.parametrize("name", ALERTS)
def test_an_entry_tells_meaning_checks_and_remedy(name: str) -> None:
    entry = runbook()[name]
    assert re.match(r"\*(critical|warning|info)\* — ", entry.strip())
    assert entry.strip().startswith(f"*{ALERTS[name]['labels']['severity']}*")
    for part in ("**Check:** ", "**Do:** "):
        assert part in entry
    for metric in re.findall(r"`(longreach:\w+[\w:]*)", entry):
        assert metric in exported() or f"{metric}_total" in exported(), metric


def test_entries_name_settings_that_services_have() -> None:
    fields = {field.name for config in SERVICES for field in dataclasses.fields(config)}
    section = RUNBOOK.partition("\n## Read the dashboards\n")[2].partition("\n## ")[0]
    for text in (section, *runbook().values()):
        for flag in re.findall(r"`--([a-z][a-z-]+)`", text):
            assert flag.replace("-", "_") in fields, flag


def test_every_alert_is_seen_to_fire() -> None:
    tests = yaml.safe_load(UNIT_TESTS.read_text())["tests"]
    fired: set[str] = set()
    for test in tests:
        for each in test["promql_expr_test"]:
            fired |= set(re.findall(r'alertname="(\w+)"', str(each["exp_samples"])))
    assert fired == set(ALERTS)


def test_prometheus_reads_the_rules() -> None:
    assert f"{len(RULES)} rules found" in promtool("check", "rules", str(RULES_FILE))


def test_the_alerts_fire_when_they_should() -> None:
    assert "SUCCESS" in promtool("test", "rules", str(UNIT_TESTS))


def test_promtool_would_notice(tmp_path: Path) -> None:
    broken: Any = yaml.safe_load(RULES_FILE.read_text())
    broken["groups"][0]["rules"][0]["expr"] = "sum by (release (up)"
    path = tmp_path / "rules.yaml"
    path.write_text(yaml.safe_dump(broken))
    with pytest.raises(AssertionError, match="could not parse"):
        promtool("check", "rules", str(path))
