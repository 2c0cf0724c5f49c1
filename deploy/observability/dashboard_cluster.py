"""The dashboard `cluster`: members, memory, copies and repairs, RPC to nodes, indexes."""

from __future__ import annotations

from dashboard_panels import (
    RATE,
    RELEASE,
    Dashboard,
    Panel,
    Query,
    Row,
    largest,
    percentiles,
    quantile,
    rate,
    stat,
    total,
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
                    largest("members", where=f'{RELEASE}, role="worker", state="alive"'),
                    alarm=1,
                    alarm_below=True,
                ),
                stat(
                    "Nodes alive",
                    "As the coordinators see it.",
                    "short",
                    largest("members", where=f'{RELEASE}, role="node", state="alive"'),
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
                            f"(longreach:certificate_not_after_seconds{{{RELEASE}}}) - time()",
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
                            f"(rate(process_cpu_seconds_total{{{RELEASE}}}{RATE}))",
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
                            f"sum by (job, instance) (process_resident_memory_bytes{{{RELEASE}}})",
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
                            f'min by (job, instance) (up{{{RELEASE}, job=~"longreach-.*"}})',
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
