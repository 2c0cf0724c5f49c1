"""The metrics of a node (docs/metrics.md): what it counts, and what is read from its store."""

from __future__ import annotations

from collections.abc import Iterable

from longreach import telemetry
from longreach.telemetry.instruments import Labels
from retrieval_node.store import Store

_Samples = Iterable[tuple[Labels, float]]


def observe(store: Store) -> None:
    """Has the gauges read from a store."""

    def memory() -> _Samples:
        stats = store.stats()
        used = {"kv": stats.context_bytes, "tail": stats.tail_bytes, "index": stats.index_bytes}
        return [({"kind": kind}, nbytes) for kind, nbytes in used.items()]

    def shards() -> _Samples:
        held = store.inventory()[0]
        sealed = sum(item.sealed for item in held)
        return [({"state": "sealed"}, sealed), ({"state": "filling"}, len(held) - sealed)]

    def index_fraction() -> float:
        indexes = [item.index for item in store.inventory()[0] if item.sealed]
        total = sum(index.total for index in indexes)
        return sum(index.built for index in indexes) / total if total else 1.0

    telemetry.gauge("memory_used_bytes").observe(memory)
    telemetry.gauge("memory_limit_bytes").observe(lambda: store.stats().memory_limit_bytes)
    telemetry.gauge("shards").observe(shards)
    telemetry.gauge("sessions_open").observe(lambda: store.stats().sessions)
    telemetry.gauge("index_builds_running").observe(lambda: store.builds_running)
    telemetry.gauge("index_fraction").observe(index_fraction)
