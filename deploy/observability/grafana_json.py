"""Dashboards as Grafana imports them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from dashboard_panels import Dashboard, Panel, Query, Row

SCHEMA_VERSION = 39
"""Of Grafana 11; later ones read it."""

WIDTH = 24
"""Columns of Grafana's grid."""

_SOURCE = {"type": "prometheus", "uid": "${datasource}"}


def _fields(panel: Panel) -> dict[str, Any]:
    defaults: dict[str, Any] = {"unit": panel.unit}
    if panel.unit != "s" or panel.kind != "timeseries":
        defaults["min"] = 0
    if panel.maximum is not None:
        defaults["max"] = panel.maximum
    if panel.alarm is not None:
        colours = ("red", "green") if panel.alarm_below else ("green", "red")
        steps = [{"color": colours[0], "value": None}, {"color": colours[1], "value": panel.alarm}]
        defaults["thresholds"] = {"mode": "absolute", "steps": steps}
    if panel.kind == "timeseries":
        defaults["custom"] = {
            "drawStyle": "line",
            "fillOpacity": 20 if panel.stacked else 0,
            "showPoints": "never",
            "spanNulls": False,
            "stacking": {"mode": "normal" if panel.stacked else "none", "group": "A"},
        }
    return {"defaults": defaults, "overrides": []}


def _options(panel: Panel) -> dict[str, Any]:
    if panel.kind == "stat":
        return {
            "reduceOptions": {"calcs": ["lastNotNull"], "fields": "", "values": False},
            "colorMode": "value",
            "graphMode": "area",
        }
    if panel.kind == "heatmap":
        return {
            "calculate": False,
            "yAxis": {"unit": panel.unit},
            "color": {"mode": "scheme", "scheme": "Blues", "steps": 64},
            "cellGap": 1,
        }
    return {
        "legend": {"displayMode": "list", "placement": "bottom", "showLegend": True},
        "tooltip": {"mode": "multi", "sort": "desc"},
    }


def _target(number: int, query: Query, kind: str) -> dict[str, Any]:
    target: dict[str, Any] = {
        "refId": chr(ord("A") + number),
        "datasource": _SOURCE,
        "expr": query.expr,
        "legendFormat": query.legend or "__auto",
    }
    if kind == "heatmap":
        target["format"] = "heatmap"
    return target


def _panels(rows: Sequence[Row]) -> Iterator[dict[str, Any]]:
    number, top = 1, 0
    for row in rows:
        place = {"x": 0, "y": top, "w": WIDTH, "h": 1}
        yield {"id": number, "type": "row", "title": row.title, "collapsed": False,
               "gridPos": place, "panels": []}  # fmt: skip
        number, top = number + 1, top + 1
        left, tallest = 0, 0
        for panel in row.panels:
            if left + panel.width > WIDTH:
                left, top, tallest = 0, top + tallest, 0
            yield {
                "id": number,
                "type": panel.kind,
                "title": panel.title,
                "description": panel.description,
                "datasource": _SOURCE,
                "gridPos": {"x": left, "y": top, "w": panel.width, "h": panel.height},
                "fieldConfig": _fields(panel),
                "options": _options(panel),
                "targets": [_target(n, query, panel.kind) for n, query in enumerate(panel.queries)],
            }
            number, left, tallest = number + 1, left + panel.width, max(tallest, panel.height)
        top += tallest


def _variable(name: str, label: str, metric: str, of: str) -> dict[str, Any]:
    """A choice of a label's values. "All" also takes series that lack the label."""
    return {
        "name": name,
        "label": label,
        "type": "query",
        "datasource": _SOURCE,
        "query": {"query": f"label_values(longreach:{metric}, {of})", "refId": name},
        "refresh": 2,
        "includeAll": True,
        "allValue": ".*",
        "multi": True,
        "current": {"selected": True, "text": ["All"], "value": ["$__all"]},
        "sort": 1,
    }


def grafana(dashboard: Dashboard) -> dict[str, Any]:
    """The dashboard as Grafana imports it."""
    source = {"name": "datasource", "label": "Prometheus", "type": "datasource",
              "query": "prometheus", "refresh": 1, "current": {}}  # fmt: skip
    variables = [source, _variable("release", "Release", "is_leader", "release")]
    if dashboard.by_model:
        variables.append(_variable("model", "Model", "num_requests_running", "model_name"))
    links = [{"title": "longreach", "type": "dashboards", "tags": ["longreach"],
              "asDropdown": False, "includeVars": True, "keepTime": True}]  # fmt: skip
    return {
        "uid": dashboard.uid,
        "title": dashboard.title,
        "description": dashboard.description,
        "tags": ["longreach"],
        "schemaVersion": SCHEMA_VERSION,
        "version": 1,
        "editable": True,
        "graphTooltip": 1,
        "refresh": "30s",
        "time": {"from": "now-1h", "to": "now"},
        "timezone": "",
        "annotations": {"list": []},
        "links": links,
        "templating": {"list": variables},
        "panels": list(_panels(dashboard.rows)),
    }
