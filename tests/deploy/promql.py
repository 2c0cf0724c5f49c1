"""What PromQL expressions name, and the expressions of the dashboards and of the rules."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from longreach.telemetry.names import METRICS, Kind

ROOT = Path(__file__).resolve().parents[2]
FOLDER = ROOT / "deploy" / "helm" / "longreach" / "observability"
RULES_FILE = FOLDER / "rules.yaml"

sys.path.insert(0, str(ROOT / "deploy" / "observability"))
import dashboards as dashboards  # noqa: E402

RULES: list[dict[str, Any]] = [
    rule for group in yaml.safe_load(RULES_FILE.read_text())["groups"] for rule in group["rules"]
]
ALERTS: dict[str, dict[str, Any]] = {rule["alert"]: rule for rule in RULES if "alert" in rule}
TARGET_LABELS = {"release", "job", "instance"}
"""Labels that the scrape configuration gives every series."""
PROCESS_METRICS = {
    "process_cpu_seconds_total",
    "process_resident_memory_bytes",
    "process_open_fds",
    "process_max_fds",
    "process_start_time_seconds",
}
"""Exported by the client library for the process itself."""

_SUFFIXES = {
    Kind.GAUGE: {"": set[str]()},
    Kind.COUNTER: {"_total": set[str]()},
    Kind.HISTOGRAM: {"_bucket": {"le"}, "_sum": set[str](), "_count": set[str]()},
}
_WORDS = {"and", "or", "unless", "bool", "offset", "inf", "nan"}
_CLAUSE = re.compile(r"\b(by|without|on|ignoring|group_left|group_right)\s*\(([^)]*)\)")
_NAME = re.compile(r"([A-Za-z_:][\w:]*)\s*(\{[^}]*\}|\()?")


@dataclass(frozen=True)
class Names:
    """Each metric of an expression with the labels its selectors name; the labels of its
    aggregations and matchings."""

    selected: tuple[tuple[str, frozenset[str]], ...]
    grouped: frozenset[str]


def names_in(expression: str) -> Names:
    """What an expression names; whether it is PromQL at all is for Prometheus to say."""
    text = re.sub(r'"(\\.|[^"\\])*"', '""', expression)
    text = re.sub(r"#.*", "", text)
    text = re.sub(r"\[[^\]]*\]", "", text)
    text = re.sub(r"\boffset\s+-?\w+", "", text)
    grouped = {label for each in _CLAUSE.finditer(text) for label in split(each[2])}
    selected = []
    for found in _NAME.finditer(_CLAUSE.sub(" ", text)):
        name, after = found[1], found[2] or ""
        if after == "(" or name.lower() in _WORDS:
            continue
        labels = re.findall(r"(\w+)\s*(?:=~|!~|!=|=)", after)
        selected.append((name, frozenset(labels)))
    return Names(tuple(selected), frozenset(grouped))


def split(labels: str) -> list[str]:
    return [each.strip() for each in labels.split(",") if each.strip()]


def exported() -> dict[str, set[str]]:
    """Every series name that the services export or the rules record, with its labels."""
    known = {"up": set(TARGET_LABELS)} | {each: set(TARGET_LABELS) for each in PROCESS_METRICS}
    for metric in METRICS.values():
        for suffix, more in _SUFFIXES[metric.kind].items():
            name = f"longreach:{metric.name}{suffix}"
            known[name] = TARGET_LABELS | {"engine", *metric.labels} | more
    for rule in RULES:
        if "record" in rule:
            found = names_in(rule["expr"])
            inherited = set().union(*(known[name] for name, _ in found.selected))
            known[rule["record"]] = (set(found.grouped) or inherited) - {"le"}
    return known


def rule_expressions() -> Iterator[tuple[str, str]]:
    """(where, expression) of every rule."""
    for rule in RULES:
        yield rule.get("alert") or rule["record"], rule["expr"]


def panels() -> Iterator[tuple[str, dict[str, Any]]]:
    """(where, panel) of every panel of the written dashboards."""
    for path in sorted((FOLDER / "dashboards").glob("*.json")):
        for panel in json.loads(path.read_text())["panels"]:
            yield f"{path.stem}: {panel['title']}", panel


def panel_expressions() -> Iterator[tuple[str, str]]:
    """(where, expression) of every query, with Grafana's variables filled in."""
    for where, panel in panels():
        for target in panel.get("targets", ()):
            yield where, filled(target["expr"])


def filled(expression: str) -> str:
    """With "All" of every choice and an interval."""
    filled = expression.replace("$__rate_interval", "1m")
    return re.sub(r"\$\w+", ".*", filled)
