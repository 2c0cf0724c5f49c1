"""The gauges of a coordinator (docs/metrics.md): read on its loop, for threads that export."""

from __future__ import annotations

import asyncio
import functools
import threading
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence

from coordinator.catalog.base import ContextState
from coordinator.cluster import Member, MemberState
from coordinator.coordinator import Coordinator
from longreach import telemetry
from longreach.telemetry.instruments import Labels

FRESH_S = 0.2
"""All gauges of one scrape are read at once."""
READ_TIMEOUT_S = 2.0
"""A loop that stands still for longer has no gauges."""

_Samples = Sequence[tuple[Labels, float]]
_Taken = Mapping[str, _Samples]


class _Snapshot:
    """The gauges as they stood a moment ago."""

    def __init__(self, take: Callable[[], _Taken], loop: asyncio.AbstractEventLoop) -> None:
        self._take = take
        self._loop = loop
        self._lock = threading.Lock()
        self._taken: _Taken = {}
        self._until = 0.0

    def read(self, name: str) -> _Samples:
        """One gauge; called by other threads than the loop's. Nothing where the loop stands."""
        with self._lock:
            if time.monotonic() >= self._until:
                self._taken = {}
                try:
                    taking = asyncio.run_coroutine_threadsafe(self._on_loop(), self._loop)
                    self._taken = taking.result(READ_TIMEOUT_S)
                finally:
                    self._until = time.monotonic() + FRESH_S
            return self._taken.get(name, ())

    async def _on_loop(self) -> _Taken:
        return self._take()


def observe(coordinator: Coordinator, loop: asyncio.AbstractEventLoop) -> None:
    """Has the gauges read from a coordinator that runs on `loop`."""
    snapshot = _Snapshot(lambda: taken(coordinator), loop)
    for name in taken(coordinator):
        telemetry.gauge(name).observe(functools.partial(snapshot.read, name))


def taken(coordinator: Coordinator) -> _Taken:
    """Every gauge, by name."""
    members = coordinator.members()
    sessions, contexts = coordinator.sessions, coordinator.contexts
    return {
        "num_requests_running": _running(coordinator),
        "num_requests_waiting": _one(sessions.waiting),
        "kv_cache_usage_perc": _usage(members),
        "contexts": _contexts(contexts.states()),
        "segments_under_replicated": _one(contexts.segments_under_replicated),
        "members": _members(members),
        "is_leader": _one(contexts.leads()),
        "repairs_running": _one(contexts.repairing.copies_running),
        "node_memory_used_bytes": [
            ({"node": m.member_id}, float(node.used_bytes))
            for m in members
            if (node := m.report.node) and m.reachable
        ],
        "node_memory_limit_bytes": [
            ({"node": m.member_id}, float(node.memory_limit_bytes))
            for m in members
            if (node := m.report.node) and m.reachable
        ],
    }


def _one(value: float) -> _Samples:
    return [({}, float(value))]


def _running(coordinator: Coordinator) -> _Samples:
    found = Counter(dict.fromkeys(coordinator.models.served(), 0))
    found.update(coordinator.sessions.running_models())
    return [({"model_name": name}, float(count)) for name, count in found.items()]


def _usage(members: Sequence[Member]) -> _Samples:
    """Nothing while no node is there: a share of nothing is no number."""
    nodes = [m.report.node for m in members if m.report.node and m.reachable]
    limit = sum(node.memory_limit_bytes for node in nodes)
    return _one(sum(node.used_bytes for node in nodes) / limit) if limit else []


def _contexts(states: Mapping[ContextState, int]) -> _Samples:
    return [({"state": state.name.lower()}, float(states.get(state, 0))) for state in ContextState]


def _members(members: Sequence[Member]) -> _Samples:
    found = Counter(("worker" if m.report.worker else "node", m.state) for m in members)
    return [
        ({"role": role, "state": state.value}, float(found[role, state]))
        for role in ("worker", "node")
        for state in MemberState
    ]
