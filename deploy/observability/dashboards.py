"""Writes the Grafana dashboards: `python deploy/observability/dashboards.py [--check]`.

Three views, described here as rows of panels and written as Grafana's JSON into the chart, which
Compose mounts too. A test holds every query to the metrics that services export. `--check` writes
nothing and fails where a file differs.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
FOLDER = ROOT / "deploy" / "helm" / "longreach" / "observability" / "dashboards"
SCHEMA_VERSION = 39
"""Of Grafana 11; later ones read it."""

WIDTH = 24
"""Columns of Grafana's grid."""

_SOURCE = {"type": "prometheus", "uid": "${datasource}"}
_RELEASE = 'release=~"$release"'
_MODEL = 'release=~"$release", model_name=~"$model"'
_RATE = "[$__rate_interval]"


@dataclass(frozen=True)
class Query:
    """One PromQL expression and how its series are named."""

    expr: str
    legend: str = ""


@dataclass(frozen=True)
class Panel:
    """A chart: what it shows, in which unit (Grafana's name), and how a reader takes it.

    `kind` is Grafana's panel type; `width` in columns, `height` in grid rows. `maximum` bounds the
    axis; `alarm` colours a stat red from there on, or below it where `alarm_below`.
    """

    title: str
    description: str
    unit: str
    queries: Sequence[Query]
    kind: str = "timeseries"
    width: int = 8
    height: int = 8
    maximum: float | None = None
    stacked: bool = False
    alarm: float | None = None
    alarm_below: bool = False


@dataclass(frozen=True)
class Row:
    """Panels under a heading."""

    title: str
    panels: Sequence[Panel]


@dataclass(frozen=True)
class Dashboard:
    """A page: `uid` is part of its address."""

    uid: str
    title: str
    description: str
    rows: Sequence[Row]
    by_model: bool = False


# Expressions.


def total(metric: str, by: str = "", where: str = _RELEASE) -> str:
    """The sum of a gauge."""
    return f"{_over('sum', by)} (longreach:{metric}{{{where}}})"


def largest(metric: str, by: str = "", where: str = _RELEASE) -> str:
    """The largest of a gauge: what every coordinator reports alike."""
    return f"{_over('max', by)} (longreach:{metric}{{{where}}})"


def rate(counter: str, by: str = "", where: str = _RELEASE) -> str:
    """Growth of a counter per second; `counter` without its _total."""
    return f"{_over('sum', by)} (rate(longreach:{counter}_total{{{where}}}{_RATE}))"


def mean(histogram: str, by: str = "", where: str = _RELEASE) -> str:
    """The mean of what a histogram saw."""
    return f"{_sum(histogram, 'sum', by, where)} / {_sum(histogram, 'count', by, where)}"


def quantile(share: float, histogram: str, by: str = "", where: str = _RELEASE) -> str:
    """A quantile of what a histogram saw."""
    labels = f"{by}, le" if by else "le"
    return f"histogram_quantile({share}, {_sum(histogram, 'bucket', labels, where)})"


def percentiles(histogram: str, by: str, legend: str, where: str = _RELEASE) -> list[Query]:
    """Median, 95th and 99th percentile."""
    return [
        Query(quantile(share, histogram, by, where), f"{legend} p{share * 100:.0f}".strip())
        for share in (0.5, 0.95, 0.99)
    ]


def _sum(histogram: str, part: str, by: str, where: str) -> str:
    return f"{_over('sum', by)} (rate(longreach:{histogram}_{part}{{{where}}}{_RATE}))"


def _over(aggregation: str, by: str) -> str:
    return f"{aggregation} by ({by})" if by else aggregation


def stat(title: str, description: str, unit: str, expr: str, **more: Any) -> Panel:
    """One number."""
    return Panel(title, description, unit, [Query(expr)], "stat", 4, 4, **more)


# The three views.

USERS = Dashboard(
    uid="longreach-users",
    title="longreach / users",
    description="What users feel: latency of tokens, goodput, errors, queue.",
    by_model=True,
    rows=[
        Row(
            "Now",
            [
                stat(
                    "Running",
                    "Requests that workers decode or prefill for.",
                    "short",
                    total("num_requests_running", where=_MODEL),
                ),
                stat(
                    "Waiting",
                    "Requests that wait for a worker, of all models; at most `--max-waiting`.",
                    "short",
                    total("num_requests_waiting"),
                ),
                stat(
                    "Goodput",
                    "Share of the finished requests within the objectives of time to first token "
                    "and of mean time between tokens.",
                    "percentunit",
                    f"{rate('requests_within_objectives', where=_MODEL)} / "
                    f"{rate('request_success', where=_MODEL)}",
                    alarm=0.9,
                    alarm_below=True,
                ),
                stat(
                    "Failures",
                    "Failed requests a second, wrong ones among them.",
                    "reqps",
                    f"{rate('request_failure')} or vector(0)",
                ),
                stat(
                    "First token, p95",
                    "95th percentile of the time to first token.",
                    "s",
                    quantile(0.95, "time_to_first_token_seconds", where=_MODEL),
                ),
                stat(
                    "Between tokens, p95",
                    "95th percentile of the time between two tokens.",
                    "s",
                    quantile(0.95, "inter_token_latency_seconds", where=_MODEL),
                ),
            ],
        ),
        Row(
            "Latency",
            [
                Panel(
                    "Time to first token",
                    "From the request's arrival to its first token: queue, prefill of what is not "
                    "stored, the question, one step.",
                    "s",
                    percentiles(
                        "time_to_first_token_seconds", "model_name", "{{model_name}}", _MODEL
                    ),
                ),
                Panel(
                    "Time between tokens",
                    "Of one request. It grows with the batch, with the bytes that nodes read for a "
                    "layer, and with prefills that share the worker.",
                    "s",
                    percentiles(
                        "inter_token_latency_seconds", "model_name", "{{model_name}}", _MODEL
                    ),
                ),
                Panel(
                    "Whole request",
                    "From arrival to the last token; compare it with the tokens asked for.",
                    "s",
                    percentiles(
                        "e2e_request_latency_seconds", "model_name", "{{model_name}}", _MODEL
                    ),
                ),
                Panel(
                    "Where the time goes",
                    "Mean seconds of a request in the queue, in prefill and in decoding.",
                    "s",
                    [
                        Query(mean("request_queue_time_seconds", where=_MODEL), "queue"),
                        Query(mean("request_prefill_time_seconds", where=_MODEL), "prefill"),
                        Query(mean("request_decode_time_seconds", where=_MODEL), "decode"),
                    ],
                    stacked=True,
                ),
                Panel(
                    "Time in the queue",
                    "Seconds that requests waited for a worker's session.",
                    "s",
                    percentiles("request_queue_time_seconds", "", "", _MODEL),
                ),
                Panel(
                    "Time to first token, distribution",
                    "How many requests fell into each range: two bands tell hits from misses of "
                    "stored contexts.",
                    "s",
                    [
                        Query(
                            "sum by (le) (increase(longreach:time_to_first_token_seconds_bucket"
                            f"{{{_MODEL}}}{_RATE}))",
                            "{{le}}",
                        )
                    ],
                    kind="heatmap",
                ),
            ],
        ),
        Row(
            "Load and errors",
            [
                Panel(
                    "Finished requests",
                    "By the reason they ended: stop, length.",
                    "reqps",
                    [
                        Query(
                            rate("request_success", "finished_reason", _MODEL),
                            "{{finished_reason}}",
                        )
                    ],
                    stacked=True,
                ),
                Panel(
                    "Failed requests",
                    "By gRPC status. RESOURCE_EXHAUSTED is a full queue or full nodes, UNAVAILABLE "
                    "a lost member, INVALID_ARGUMENT the client's own.",
                    "reqps",
                    [Query(rate("request_failure", "code"), "{{code}}")],
                    stacked=True,
                ),
                Panel(
                    "Goodput",
                    "Share of finished requests within the objectives, and how many those are.",
                    "percentunit",
                    [
                        Query(
                            f"{rate('requests_within_objectives', 'model_name', _MODEL)} / "
                            f"{rate('request_success', 'model_name', _MODEL)}",
                            "{{model_name}}",
                        )
                    ],
                    maximum=1,
                ),
                Panel(
                    "Running and waiting",
                    "Requests in decoding or prefill, and in the queue.",
                    "short",
                    [
                        Query(total("num_requests_running", where=_MODEL), "running"),
                        Query(total("num_requests_waiting"), "waiting"),
                    ],
                ),
                Panel(
                    "Tokens",
                    "Prompt tokens taken and tokens generated, a second.",
                    "short",
                    [
                        Query(rate("prompt_tokens", where=_MODEL), "prompt"),
                        Query(rate("generation_tokens", where=_MODEL), "generated"),
                    ],
                ),
                Panel(
                    "Prompt tokens found stored",
                    "Share of prompt tokens that a stored context served, named by the request or "
                    "found by its prefix.",
                    "percentunit",
                    [
                        Query(
                            f"{rate('prefix_cache_hits', where=_MODEL)} / "
                            f"{rate('prefix_cache_queries', where=_MODEL)}",
                            "hits",
                        )
                    ],
                    maximum=1,
                ),
            ],
        ),
    ],
)

CLUSTER = Dashboard(
    uid="longreach-cluster",
    title="longreach / cluster",
    description="What operators watch: members, memory, copies and repairs, RPC to nodes, indexes.",
    rows=[
        Row(
            "Now",
            [
                stat(
                    "Workers alive",
                    "As the coordinators see it.",
                    "short",
                    largest("members", where=f'{_RELEASE}, role="worker", state="alive"'),
                    alarm=1,
                    alarm_below=True,
                ),
                stat(
                    "Nodes alive",
                    "As the coordinators see it.",
                    "short",
                    largest("members", where=f'{_RELEASE}, role="node", state="alive"'),
                    alarm=1,
                    alarm_below=True,
                ),
                stat(
                    "Leaders",
                    "Coordinators that lead: one. Without one nothing is repaired.",
                    "short",
                    total("is_leader"),
                    alarm=1,
                    alarm_below=True,
                ),
                stat(
                    "Shards that lack a copy",
                    "Zero but for the time a repair takes.",
                    "short",
                    largest("segments_under_replicated"),
                    alarm=1,
                ),
                stat(
                    "Memory of the nodes",
                    "Used share of all nodes' memory.",
                    "percentunit",
                    largest("kv_cache_usage_perc"),
                    alarm=0.85,
                ),
                stat(
                    "Repairs running",
                    "Shards that are being copied or moved.",
                    "short",
                    largest("repairs_running"),
                ),
            ],
        ),
        Row(
            "Members",
            [
                Panel(
                    "Members",
                    "Alive, suspect (silent for 3 s), dead (10 s; remembered for 1 h) or leaving.",
                    "short",
                    [Query(largest("members", "role, state"), "{{role}} {{state}}")],
                ),
                Panel(
                    "Contexts",
                    "Stored contexts by state.",
                    "short",
                    [Query(largest("contexts", "state"), "{{state}}")],
                    stacked=True,
                ),
                Panel(
                    "Certificates",
                    "Time left of each service's certificate; none without TLS.",
                    "s",
                    [
                        Query(
                            "min by (job, engine) "
                            f"(longreach:certificate_not_after_seconds{{{_RELEASE}}}) - time()",
                            "{{job}} {{engine}}",
                        )
                    ],
                ),
            ],
        ),
        Row(
            "Memory",
            [
                Panel(
                    "Used memory by node",
                    "Share of each node's limit, by its reports. A context is placed only where it "
                    "fits with room for indexes.",
                    "percentunit",
                    [
                        Query(
                            f"{largest('node_memory_used_bytes', 'node')} / "
                            f"{largest('node_memory_limit_bytes', 'node')}",
                            "{{node}}",
                        )
                    ],
                    maximum=1,
                ),
                Panel(
                    "What fills the nodes",
                    "Bytes of all nodes in sealed K and V, in tails of sessions, in indexes.",
                    "bytes",
                    [
                        Query(total("memory_used_bytes", "kind"), "{{kind}}"),
                        Query(total("memory_limit_bytes"), "limit"),
                    ],
                ),
                Panel(
                    "Resident KV of workers",
                    "Bytes of sink and window on the workers' devices.",
                    "bytes",
                    [Query(total("resident_kv_bytes", "engine"), "{{engine}}")],
                ),
            ],
        ),
        Row(
            "Copies",
            [
                Panel(
                    "Shards that lack a copy, repairs",
                    "The first falls as the second work.",
                    "short",
                    [
                        Query(largest("segments_under_replicated"), "lack a copy"),
                        Query(largest("repairs_running"), "repairs running"),
                    ],
                ),
                Panel(
                    "Finished repairs",
                    "Copies of shards that ended, by result, a second.",
                    "ops",
                    [Query(rate("repairs", "result"), "{{result}}")],
                    stacked=True,
                ),
                Panel(
                    "Copied bytes",
                    "Between nodes, bounded by `--copy-bytes-per-s` each way.",
                    "Bps",
                    [Query(rate("copy_bytes", "engine, direction"), "{{engine}} {{direction}}")],
                ),
                Panel(
                    "Failovers and hedges",
                    "Requests that a second holder was asked too, and sessions that went on "
                    "elsewhere.",
                    "ops",
                    [
                        Query(rate("hedged_requests"), "hedged requests"),
                        Query(rate("failovers"), "failovers"),
                    ],
                ),
                Panel(
                    "Tokens computed again",
                    "After a failover (a few each), and because every copy was lost (a repair).",
                    "short",
                    [
                        Query(rate("recomputed_tokens"), "after a failover"),
                        Query(rate("reprefill_tokens"), "every copy lost"),
                    ],
                ),
                Panel(
                    "Damaged or unwritten",
                    "Checksums that did not fit, snapshots that could not be written or read.",
                    "ops",
                    [
                        Query(rate("checksum_failures", "engine"), "{{engine}} checksum"),
                        Query(rate("snapshot_failures", "engine"), "{{engine}} snapshot"),
                    ],
                ),
            ],
        ),
        Row(
            "Workers and nodes",
            [
                Panel(
                    "Retrieval RPC by node",
                    "One message of a layer, there and back, until it is read: no shorter than the "
                    "device's own part. Nodes of one kind should lie together.",
                    "s",
                    [
                        Query(quantile(0.5, "retrieval_rpc_seconds", "node"), "{{node}} p50"),
                        Query(quantile(0.99, "retrieval_rpc_seconds", "node"), "{{node}} p99"),
                    ],
                ),
                Panel(
                    "Attention inside the node",
                    "Search and attention of one message; the rest of the RPC is wire and queue.",
                    "s",
                    [
                        Query(quantile(0.5, "attend_seconds", "engine"), "{{engine}} p50"),
                        Query(quantile(0.99, "attend_seconds", "engine"), "{{engine}} p99"),
                    ],
                ),
                Panel(
                    "RPC failures",
                    "By node, a second; and nodes that a worker leaves alone after failures.",
                    "short",
                    [
                        Query(rate("retrieval_rpc_failures", "node"), "{{node}} failures"),
                        Query(total("nodes_refused", "engine"), "{{engine}} refuses"),
                    ],
                ),
                Panel(
                    "Decode step",
                    "One step of all sessions of a worker, all layers.",
                    "s",
                    percentiles("step_seconds", "engine", "{{engine}}"),
                ),
                Panel(
                    "Rows",
                    "Query tokens that workers stepped, and rows that nodes attended (one for each "
                    "layer and message), a second.",
                    "short",
                    [
                        Query(rate("step_rows", "engine"), "{{engine}} steps"),
                        Query(rate("attend_rows", "engine"), "{{engine}} attends"),
                    ],
                ),
                Panel(
                    "Sessions",
                    "Open on workers (bounded by `--max-sessions`) and on nodes.",
                    "short",
                    [Query(total("sessions_open", "job, engine"), "{{job}} {{engine}}")],
                ),
                Panel(
                    "Prefill",
                    "Tokens a second that workers prefill, and prefills that run.",
                    "short",
                    [
                        Query(rate("prefill_tokens", "engine"), "{{engine}} tokens"),
                        Query(total("prefills_running", "engine"), "{{engine}} running"),
                    ],
                ),
                Panel(
                    "Appended tokens",
                    "New K and V that reach the nodes, tokens a second.",
                    "short",
                    [Query(rate("append_tokens", "engine"), "{{engine}}")],
                ),
                Panel(
                    "Shards",
                    "On each node, by state.",
                    "short",
                    [Query(total("shards", "engine, state"), "{{engine}} {{state}}")],
                ),
            ],
        ),
        Row(
            "Processes",
            [
                Panel(
                    "CPU",
                    "Cores in use, by process. A node searches with as many as it has.",
                    "short",
                    [
                        Query(
                            "sum by (job, instance) "
                            f"(rate(process_cpu_seconds_total{{{_RELEASE}}}{_RATE}))",
                            "{{job}} {{instance}}",
                        )
                    ],
                ),
                Panel(
                    "Resident memory",
                    "Of each process, its code and buffers included: compare a node's with what it "
                    "says that it stores.",
                    "bytes",
                    [
                        Query(
                            f"sum by (job, instance) (process_resident_memory_bytes{{{_RELEASE}}})",
                            "{{job}} {{instance}}",
                        )
                    ],
                ),
                Panel(
                    "Answering Prometheus",
                    "1 where a process's metrics are read, 0 where it does not answer.",
                    "short",
                    [
                        Query(
                            f'min by (job, instance) (up{{{_RELEASE}, job=~"longreach-.*"}})',
                            "{{job}} {{instance}}",
                        )
                    ],
                    maximum=1,
                ),
            ],
        ),
        Row(
            "Indexes",
            [
                Panel(
                    "Indexed share",
                    "Share of the KV heads in a node's sealed shards that are searched by their "
                    "index; the rest are scanned exactly.",
                    "percentunit",
                    [Query(total("index_fraction", "engine"), "{{engine}}")],
                    maximum=1,
                ),
                Panel(
                    "Builds running",
                    "Index builds in the background, by node.",
                    "short",
                    [Query(total("index_builds_running", "engine"), "{{engine}}")],
                ),
                Panel(
                    "Time of a build",
                    "Of one shard's indexes.",
                    "s",
                    percentiles("index_build_seconds", "engine", "{{engine}}"),
                ),
            ],
        ),
    ],
)


def _work(title: str, histogram: str, description: str) -> Panel:
    return Panel(
        title,
        description,
        "percentunit",
        [
            Query(mean(histogram, where=_RELEASE), "mean"),
            Query(quantile(0.95, histogram), "p95"),
        ],
    )


def _sampled(title: str, histogram: str, description: str, tail: float) -> Panel:
    worst = f"{{{{index_kind}}}} p{tail * 100:.0f}"
    return Panel(
        title,
        description,
        "percentunit",
        [
            Query(mean(histogram, "index_kind"), "{{index_kind}} mean"),
            Query(quantile(tail, histogram, "index_kind"), worst),
        ],
    )


QUALITY = Dashboard(
    uid="longreach-quality",
    title="longreach / retrieval quality",
    description="Whether retrieval finds what full attention would use, and what it reads for it.",
    rows=[
        Row(
            "Sampled against exact attention",
            [
                _sampled(
                    "Recall",
                    "retrieval_recall_sampled",
                    "Of the keys that an exact search takes, the share that retrieval took too. "
                    "p5: the worst twentieth.",
                    0.05,
                ),
                _sampled(
                    "Attention mass",
                    "retrieval_mass_sampled",
                    "Share of the full softmax's weight that lies on the keys that were used.",
                    0.05,
                ),
                _sampled(
                    "Output error",
                    "retrieval_output_error_sampled",
                    "Distance of the output from that of exact attention, relative to its length.",
                    0.95,
                ),
                Panel(
                    "Recall, distribution",
                    "How many samples fell into each range.",
                    "percentunit",
                    [
                        Query(
                            "sum by (le) (increase(longreach:retrieval_recall_sampled_bucket"
                            f"{{{_RELEASE}}}{_RATE}))",
                            "{{le}}",
                        )
                    ],
                    kind="heatmap",
                ),
                Panel(
                    "Samples",
                    "Done, or dropped: sampling takes at most 2% of a core. Few samples make "
                    "the figures above uncertain.",
                    "ops",
                    [Query(rate("retrieval_quality_samples", "result"), "{{result}}")],
                    stacked=True,
                ),
                Panel(
                    "Coverage",
                    "Share of positions whose shard answered, in the worst step of a request: 1, "
                    "unless the caller allowed less.",
                    "percentunit",
                    [
                        Query(mean("kv_coverage_ratio"), "mean"),
                        Query(quantile(0.01, "kv_coverage_ratio"), "p1"),
                    ],
                ),
            ],
        ),
        Row(
            "Work of retrieval",
            [
                _work(
                    "Scan fraction",
                    "retrieval_scan_fraction",
                    "Keys whose full-precision row was read, of the keys in scope.",
                ),
                _work(
                    "Attended fraction",
                    "retrieval_attended_fraction",
                    "Keys in the softmax, of the keys in scope.",
                ),
                _work(
                    "Bytes fraction",
                    "retrieval_bytes_fraction",
                    "Bytes read, of the bytes of K and V in scope.",
                ),
                Panel(
                    "Indexed share",
                    "Where it is below 1 shards are scanned exactly: recall rises, and so does the "
                    "scan fraction.",
                    "percentunit",
                    [Query(total("index_fraction", "engine"), "{{engine}}")],
                    maximum=1,
                ),
            ],
        ),
    ],
)

DASHBOARDS = {"users": USERS, "cluster": CLUSTER, "quality": QUALITY}


# Grafana's JSON.


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


def stale_files() -> dict[Path, str]:
    """Files that differ from this description, with the text that they should have."""
    wanted = {
        FOLDER / f"{name}.json": json.dumps(grafana(dashboard), indent=1) + "\n"
        for name, dashboard in DASHBOARDS.items()
    }
    return {
        path: text for path, text in wanted.items() if not path.exists() or path.read_text() != text
    }


def main() -> int:
    """Writes or checks; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--check", action="store_true", help="fail where files differ")
    check = parser.parse_args().check
    for path, text in (stale := stale_files()).items():
        print(f"{path.relative_to(ROOT)} {'differs from its description' if check else 'written'}")
        if not check:
            path.write_text(text)
    return 1 if check and stale else 0


if __name__ == "__main__":
    sys.exit(main())
