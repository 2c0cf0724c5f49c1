"""Every metric that a service exports: the one table that code, docs and dashboards are held to.

On /metrics a metric reads `longreach:NAME` (a counter `longreach:NAME_total`), on OTLP
`longreach.NAME`. Every series also carries `engine`, the service's own id. A metric has the same
meaning in each of its services.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass, replace


class Kind(enum.Enum):
    """How the values of a metric are made."""

    GAUGE = "gauge"
    COUNTER = "counter"
    HISTOGRAM = "histogram"


COORDINATOR, WORKER, NODE = "coordinator", "worker", "node"

_STEP_SECONDS = (
    *(0.0001, 0.00025, 0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05),
    *(0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0),
)
_TOKEN_SECONDS = (
    *(0.0025, 0.005, 0.01, 0.015, 0.02, 0.03, 0.04, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4),
    *(0.5, 0.75, 1.0, 2.5, 5.0),
)
_REQUEST_SECONDS = (
    *(0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 20.0, 40.0, 80.0, 160.0),
    *(320.0, 640.0, 1280.0, 2560.0),
)
_BUILD_SECONDS = (0.01, 0.05, 0.1, 0.5, 1.0, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0, 600.0, 1800.0)
_SHARES = (0.001, 0.0025, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 0.75, 1.0, 2.0)
_NEAR_ONE = (0.5, 0.6, 0.7, 0.8, 0.85, 0.9, 0.925, 0.95, 0.97, 0.98, 0.99, 0.995, 0.999, 1.0)
_ERRORS = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0)


@dataclass(frozen=True, slots=True)
class Metric:
    """One metric. `unit` is UCUM's, as OTLP wants it; `labels` those beside `engine`; `bounds` the
    upper, inclusive bounds of a histogram's buckets, without the last, infinite one."""

    name: str
    kind: Kind
    unit: str
    help: str
    services: tuple[str, ...] = ()
    labels: tuple[str, ...] = ()
    bounds: tuple[float, ...] = ()


def _gauge(name: str, unit: str, help: str, *labels: str) -> Metric:
    return Metric(name, Kind.GAUGE, unit, help, labels=labels)


def _counter(name: str, unit: str, help: str, *labels: str) -> Metric:
    return Metric(name, Kind.COUNTER, unit, help, labels=labels)


def _histogram(name: str, unit: str, bounds: tuple[float, ...], help: str, *labels: str) -> Metric:
    return Metric(name, Kind.HISTOGRAM, unit, help, labels=labels, bounds=bounds)


_COORDINATOR = (
    # --- coordinator: what users see
    _gauge(
        "num_requests_running",
        "{request}",
        "Generations that hold a worker's slot.",
        "model_name",
    ),
    _gauge(
        "num_requests_waiting",
        "{request}",
        "Generations that wait for a slot, or for their prompt to be stored.",
    ),
    _histogram(
        "time_to_first_token_seconds",
        "s",
        _REQUEST_SECONDS,
        "From the arrival of a request to its first token.",
        "model_name",
    ),
    _histogram(
        "inter_token_latency_seconds",
        "s",
        _TOKEN_SECONDS,
        "Between two tokens of a request, every pair counted.",
        "model_name",
    ),
    _histogram(
        "e2e_request_latency_seconds",
        "s",
        _REQUEST_SECONDS,
        "From the arrival of a request to its last token; finished requests only.",
        "model_name",
    ),
    _histogram(
        "request_queue_time_seconds",
        "s",
        _REQUEST_SECONDS,
        "Time a finished request waited for a worker's slot, all attempts together.",
        "model_name",
    ),
    _histogram(
        "request_prefill_time_seconds",
        "s",
        _REQUEST_SECONDS,
        "From the arrival to the first token without the wait for a slot: storing a long prompt, "
        "opening the session, feeding the question.",
        "model_name",
    ),
    _histogram(
        "request_decode_time_seconds",
        "s",
        _REQUEST_SECONDS,
        "From the first token to the last; finished requests only.",
        "model_name",
    ),
    _counter(
        "prompt_tokens",
        "{token}",
        "Tokens of questions and prompts that finished requests came with, without those of "
        "contexts that they named.",
        "model_name",
    ),
    _counter(
        "generation_tokens",
        "{token}",
        "Tokens generated, those of unfinished requests included.",
        "model_name",
    ),
    _counter(
        "request_success",
        "{request}",
        "Requests that ended with a summary, by why they ended: stop or length.",
        "model_name",
        "finished_reason",
    ),
    _counter(
        "request_failure",
        "{request}",
        "Requests that ended with an error, by gRPC status; CANCELLED where the client left.",
        "code",
    ),
    _counter(
        "requests_within_objectives",
        "{request}",
        "Finished requests whose time to first token and mean time between tokens kept to the "
        "coordinator's objectives: goodput.",
        "model_name",
    ),
    _counter(
        "prefix_cache_queries",
        "{token}",
        "Prompt tokens that a stored prefix was looked for.",
        "model_name",
    ),
    _counter(
        "prefix_cache_hits",
        "{token}",
        "Prompt tokens that a stored prefix was found for.",
        "model_name",
    ),
    # --- coordinator: retrieval as requests see it
    _histogram(
        "retrieval_scan_fraction",
        "1",
        _SHARES,
        "Keys whose full-precision row was read, of the keys in scope; one observation per "
        "finished request, over its decode steps.",
        "model_name",
    ),
    _histogram(
        "retrieval_attended_fraction",
        "1",
        _SHARES,
        "Keys in the softmax, of the keys in scope; as above.",
        "model_name",
    ),
    _histogram(
        "retrieval_bytes_fraction",
        "1",
        _SHARES,
        "Bytes read, of the K and V bytes in scope; as above.",
        "model_name",
    ),
    _histogram(
        "kv_coverage_ratio",
        "1",
        _NEAR_ONE,
        "Least coverage of a finished request's steps: positions whose shard answered.",
        "model_name",
    ),
    _counter(
        "hedged_requests",
        "{request}",
        "Attend requests that a second node was asked because the first was late.",
        "model_name",
    ),
    _counter(
        "failovers",
        "{failover}",
        "Times that a generation went on elsewhere, or anew where it was, by loss or by plan.",
        "model_name",
    ),
    _counter(
        "recomputed_tokens",
        "{token}",
        "Tokens fed a second time after a failover.",
        "model_name",
    ),
    # --- coordinator: the cluster
    _gauge(
        "kv_cache_usage_perc",
        "1",
        "Memory that all nodes use, of their limits together; 0 to 1.",
    ),
    _gauge("contexts", "{context}", "Contexts by state.", "state"),
    _gauge(
        "segments_under_replicated",
        "{shard}",
        "Shards of which fewer copies can be reached than are wanted.",
    ),
    _gauge(
        "members",
        "{member}",
        "Members by role, worker or node, and state, as this coordinator sees them.",
        "role",
        "state",
    ),
    _gauge("is_leader", "1", "1 where this coordinator leads, else 0."),
    _gauge("repairs_running", "{shard}", "Shards that are being copied or moved."),
    _counter(
        "repairs",
        "{shard}",
        "Copies of shards that ended, by result: done or failed.",
        "result",
    ),
    _counter(
        "reprefill_tokens",
        "{token}",
        "Positions computed again because no copy was left.",
    ),
    _gauge(
        "node_memory_used_bytes",
        "By",
        "Memory a node uses for KV, tails and indexes, by its last heartbeat.",
        "node",
    ),
    _gauge(
        "node_memory_limit_bytes",
        "By",
        "Memory a node may use for KV, tails and indexes, by its last heartbeat.",
        "node",
    ),
)
_WORKER = (
    _histogram(
        "step_seconds",
        "s",
        _STEP_SECONDS,
        "One step on the device: a forward pass over the rows of all sessions.",
        "model_name",
    ),
    _counter("step_rows", "{row}", "Query tokens fed in steps.", "model_name"),
    _counter("prefill_tokens", "{token}", "Prompt tokens prefilled.", "model_name"),
    _histogram(
        "retrieval_rpc_seconds",
        "s",
        _STEP_SECONDS,
        "From sending a layer's queries to a node until its reply is read, which waits for the "
        "device's own part of the layer.",
        "model_name",
        "node",
    ),
    _counter(
        "retrieval_rpc_failures",
        "{request}",
        "Attend requests that a node answered with an error, wrongly or not in time.",
        "model_name",
        "node",
    ),
    _gauge(
        "resident_kv_bytes",
        "By",
        "Resident KV of open sessions on the device.",
        "model_name",
    ),
    _gauge(
        "prefills_running",
        "{prefill}",
        "Prefills that run or wait for the device.",
        "model_name",
    ),
    _gauge(
        "nodes_refused",
        "{node}",
        "Nodes that are not asked at present: their circuit breaker is open.",
        "model_name",
    ),
)
_NODE = (
    _gauge(
        "memory_used_bytes",
        "By",
        "Memory in use, by kind: kv, tail or index.",
        "kind",
    ),
    _gauge("memory_limit_bytes", "By", "Memory for KV, tails and indexes."),
    _gauge("shards", "{shard}", "Shards held, by state.", "state"),
    _histogram(
        "attend_seconds",
        "s",
        _STEP_SECONDS,
        "One Attend request: every row of a layer, from decoding to the reply.",
    ),
    _counter("attend_rows", "{row}", "Query tokens answered by Attend, in each layer anew."),
    _counter("append_tokens", "{token}", "Positions appended to tails."),
    _gauge("index_builds_running", "{build}", "Indexes being built."),
    _gauge(
        "index_fraction",
        "1",
        "Share of the KV heads in sealed shards whose wanted index is built; 0 to 1, 1 without "
        "shards.",
    ),
    _histogram(
        "index_build_seconds",
        "s",
        _BUILD_SECONDS,
        "One build of the index of one layer, of a shard or of a full tail chunk.",
    ),
    _counter(
        "copy_bytes",
        "By",
        "Bytes copied from and to other nodes, by direction: in or out.",
        "direction",
    ),
    _counter(
        "snapshot_failures",
        "{snapshot}",
        "Shards and indexes that were not written to disk, and snapshots that were not loaded.",
    ),
    _counter(
        "checksum_failures",
        "{shard}",
        "Shards whose checksum was wrong after a copy, or in a snapshot that was read.",
    ),
    _histogram(
        "retrieval_recall_sampled",
        "1",
        _NEAR_ONE,
        "Sampled decode steps: keys the index found, of the best by exact search.",
        "index_kind",
    ),
    _histogram(
        "retrieval_mass_sampled",
        "1",
        _NEAR_ONE,
        "Sampled decode steps: exact attention mass of the keys that the index attended.",
        "index_kind",
    ),
    _histogram(
        "retrieval_output_error_sampled",
        "1",
        _ERRORS,
        "Sampled decode steps: relative error of the output against exact attention.",
        "index_kind",
    ),
    _counter(
        "retrieval_quality_samples",
        "{sample}",
        "Sampled decode steps, by result: done or dropped.",
        "result",
    ),
)
_SHARED = (
    Metric("sessions_open", Kind.GAUGE, "{session}", "Sessions open here.", (WORKER, NODE)),
    Metric(
        "certificate_not_after_seconds",
        Kind.GAUGE,
        "s",
        "When this member's certificate ends, Unix time; with TLS only.",
        (COORDINATOR, WORKER, NODE),
    ),
)


def _table() -> dict[str, Metric]:
    by_service = {COORDINATOR: _COORDINATOR, WORKER: _WORKER, NODE: _NODE}
    own = [
        replace(metric, services=(service,))
        for service, metrics in by_service.items()
        for metric in metrics
    ]
    return {metric.name: metric for metric in (*own, *_SHARED)}


METRICS = _table()
"""By name, in the order of the docs."""


def find(name: str, kind: Kind) -> Metric:
    """The metric of a name; raises LookupError where there is none of that kind."""
    metric = METRICS.get(name)
    if metric is None or metric.kind is not kind:
        known = ", ".join(each.name for each in METRICS.values() if each.kind is kind)
        raise LookupError(f"no {kind.value} is called {name!r}; there are: {known or 'none'}")
    return metric
