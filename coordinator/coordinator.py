"""The coordinator put together: membership in, contexts and sessions out. No gRPC in here."""

from __future__ import annotations

import asyncio
import dataclasses
import functools
import logging
import time
from collections.abc import AsyncGenerator, Callable, Coroutine
from dataclasses import dataclass
from typing import Any

import longreach
from coordinator import tenancy
from coordinator.catalog.base import Catalog
from coordinator.catalog.redis import RedisCatalog
from coordinator.catalog.sqlite import SqliteCatalog
from coordinator.cluster import (
    Action,
    Change,
    Cluster,
    Drain,
    Event,
    Heartbeat,
    Leave,
    Member,
    MemberState,
    Paused,
    Tick,
    Unreachable,
)
from coordinator.config import CoordinatorConfig
from coordinator.contexts import Contexts
from coordinator.driver import Driver, NodePeer, WorkerPeer
from coordinator.kubernetes.integration import KubernetesIntegration
from coordinator.models import Models
from coordinator.repairing import Evacuation
from coordinator.sessions import Sessions
from longreach.errors import LongreachError, NotFound, Unavailable
from longreach.rpc.retrieval import AsyncNodeClient
from longreach.rpc.tls import ChannelTls
from longreach.rpc.worker import WorkerClient
from longreach.security.peers import PeerIdentity, Role
from longreach.security.tls import TlsFiles
from longreach.types import SessionInventory

TICK_S = 0.5
RECHECK_TICKS = 10
PAUSED_S = 1.0
STATUS_TIMEOUT_S = 1.0
DRAIN_POLL_S = 0.5
CANCEL_AGAIN_S = 1.0
_log = logging.getLogger(__name__)

_UP = (Change.JOINED, Change.RESTARTED, Change.RECOVERED, Change.MOVED)
_DOWN = (Change.DIED, Change.LEFT, Change.FORGOTTEN)


@dataclass(frozen=True, slots=True)
class ClusterStatus:
    """Members and load at `now` (monotonic seconds, the clock of Member.seen_at).

    `segments_under_replicated` counts shards, of all contexts, of which fewer copies can be
    reached than are wanted; `reprefill_tokens` positions that were computed again because no copy
    was left.
    """

    members: tuple[Member, ...]
    now: float
    epoch: int
    contexts: int
    running: int
    waiting: int
    models: tuple[str, ...]
    version: str
    segments_under_replicated: int
    reprefill_tokens: int


@dataclass(frozen=True, slots=True)
class HeartbeatReply:
    """What a member is told: the membership epoch, whether it is to be emptied, and whether it may
    go, because nothing is left on it or nothing more can be done."""

    epoch: int
    drain: bool = False
    may_leave: bool = False


class Coordinator:
    """Wires the parts and carries out what membership decides."""

    def __init__(
        self,
        config: CoordinatorConfig,
        *,
        catalog: Catalog | None = None,
        files: TlsFiles | None = None,
        worker_client: Callable[[str], WorkerPeer] | None = None,
        node_client: Callable[[str], NodePeer] | None = None,
        clock: Callable[[], float] = time.monotonic,
        on_ready: Callable[[bool], Coroutine[Any, Any, None]] | None = None,
    ) -> None:
        self._config = config
        self._clock = clock
        self._on_ready = on_ready
        self._ready = False
        self._draining = False
        self._cluster = Cluster()
        self._kubernetes = KubernetesIntegration(config) if config.uses_kubernetes else None
        self._catalog = catalog or _open_catalog(config)
        if self._kubernetes is not None:
            self._catalog = self._kubernetes.elects(self._catalog)
        self._driver = Driver(
            self._address_of,
            config.cluster_secret.encode(),
            worker_client=worker_client
            or functools.partial(WorkerClient, tls=self._tls(files, Role.WORKER)),
            node_client=node_client
            or functools.partial(AsyncNodeClient, tls=self._tls(files, Role.NODE)),
        )
        self.models = Models(self._cluster)
        self.contexts = Contexts(
            self._catalog,
            self._cluster,
            self._driver,
            self.models,
            config,
            on_delete=self._end_sessions,
            on_sessions=self._sessions_found,
            on_route_changed=lambda context_id: self.sessions.route_changed(context_id),
        )
        self.sessions = Sessions(
            self._cluster,
            self._driver,
            self.contexts,
            self.models,
            config,
            self._worker_lost,
            self._close_orphans,
        )
        self._tasks: set[asyncio.Task[None]] = set()
        if self._kubernetes is not None:
            self._kubernetes.hints(self._pod_gone)
            self._kubernetes.scales(
                self._cluster.members,
                self.contexts.leads,
                self.contexts.refused_bytes,
                evacuate=lambda node_id: self._apply(Drain(node_id)),
            )

    async def start(self) -> None:
        """Loads the catalog and begins to watch the clock."""
        await self.contexts.start()
        self._spawn(self._watch_clock())
        self._spawn(self.contexts.following.run())
        self._spawn(self.contexts.repairing.run())
        if self._kubernetes is not None:
            self._kubernetes.start()

    def heartbeat(self, report: Heartbeat) -> HeartbeatReply:
        """Takes a member's report."""
        if not report.zone and self._kubernetes is not None:
            report = dataclasses.replace(report, zone=self._kubernetes.zone(report.member_id))
        self._apply(report)
        member = self._cluster.member(report.member_id)
        draining = member is not None and member.draining
        if report.node is None or not draining:
            return HeartbeatReply(self._cluster.epoch, drain=draining)
        left = self.contexts.repairing.evacuation(report.member_id)
        may_leave = self.contexts.leads() and (left.stuck or not left.shards)
        return HeartbeatReply(self._cluster.epoch, drain=True, may_leave=may_leave)

    async def drain_node(self, node_id: str, timeout_s: float) -> AsyncGenerator[Evacuation, None]:
        """Empties a node; yields what is left, several times a second, until that is nothing, or
        nothing more can be done, or the time is over. Raises NotFound for a node that is not here.
        """
        member = self._cluster.member(node_id)
        if member is None or member.report.node is None or not member.reachable:
            names = ", ".join(m.member_id for m in self._cluster.nodes()) or "none"
            raise NotFound(
                f"no node {node_id!r} is alive; those that are: {names}", reason="NO_MEMBER"
            )
        self._apply(Drain(node_id))
        deadline = self._clock() + timeout_s
        while True:
            left = self.contexts.repairing.evacuation(node_id)
            yield left
            if not left.shards or left.stuck or self._clock() >= deadline:
                return
            await asyncio.sleep(DRAIN_POLL_S)

    def leave(self, event: Leave) -> int:
        """A member takes leave; returns the membership epoch."""
        self._apply(event)
        return self._cluster.epoch

    def members(self) -> list[Member]:
        """Every member as last reported."""
        return self._cluster.members()

    async def status(self) -> ClusterStatus:
        """Members, memory and load; members that can be reached are asked how they stand now."""
        members = {member.member_id: member for member in self._cluster.members()}
        reachable = [member.report for member in members.values() if member.reachable]
        for report in await self._driver.refreshed(reachable, STATUS_TIMEOUT_S):
            name = report.member_id
            members[name] = dataclasses.replace(members[name], report=report)
        return ClusterStatus(
            members=tuple(members.values()),
            now=self._clock(),
            epoch=self._cluster.epoch,
            contexts=self.contexts.count(),
            running=self.sessions.running,
            waiting=self.sessions.waiting,
            models=tuple(sorted(self.models.served())),
            version=longreach.__version__,
            segments_under_replicated=self.contexts.segments_under_replicated,
            reprefill_tokens=self.contexts.reprefill_tokens,
        )

    async def drain(self) -> None:
        """Stops admitting; generations and prefills may finish within the grace period."""
        self._draining = True
        await self._announce_readiness()
        grace_s = self._config.drain_grace_s
        await asyncio.gather(self.sessions.drain(grace_s), self.contexts.drain(grace_s))

    async def close(self) -> None:
        """Ends everything; call it after `drain`."""
        # More than once: a library that a task waits in may swallow its cancellation.
        while running := [task for task in self._tasks if not task.done()]:
            for task in running:
                task.cancel()
            await asyncio.wait(running, timeout=CANCEL_AGAIN_S)
        if self._kubernetes is not None:
            await self._kubernetes.close()
        await self.contexts.close()
        await self._driver.close()
        await self._catalog.close()

    # Membership.

    def _apply(self, event: Event) -> None:
        actions = self._cluster.apply(event, self._clock())
        for action in actions:
            _log.info("membership %d: %s", self._cluster.epoch, action)
            self._act(action)
        if actions:
            self._spawn(self._announce_readiness())
        self.sessions.members_changed()

    def _act(self, action: Action) -> None:
        member = self._cluster.member(action.member_id)
        is_node = member is not None and member.report.node is not None
        if action.change in (*_DOWN, Change.RESTARTED):
            error = Unavailable(f"{action}; ask again", reason="WORKER_LOST", retry_after_s=1.0)
            if action.change is not Change.LEFT:  # a worker that leaves finishes what it has
                self.sessions.worker_down(action.member_id, error)
            self._spawn(self.contexts.settling.node_down(action.member_id))
        if action.change is Change.RESTARTED or (is_node and action.change is Change.RECOVERED):
            self._driver.renew(action.member_id)
        if action.change in _UP:
            settling = self.contexts.settling
            self._spawn(settling.node_up(action.member_id) if is_node else settling.settle())
            self._close_orphans()

    def _pod_gone(self, member_id: str) -> None:
        """A hint: suspect until its heartbeat says otherwise."""
        self._apply(Unreachable(member_id))

    def _worker_lost(self, worker_id: str, error: LongreachError) -> None:
        if isinstance(error, Unavailable):
            self._driver.renew(worker_id)
            self._apply(Unreachable(worker_id))

    async def _watch_clock(self) -> None:
        ticks = 0
        while True:
            slept_at = self._clock()
            await asyncio.sleep(TICK_S)
            late_s = self._clock() - slept_at - TICK_S
            if late_s > PAUSED_S:
                _log.warning("this coordinator stood still for %.1f s", late_s)
                self._apply(Paused(late_s))
            ticks += 1
            self._apply(Tick())
            self._close_orphans()
            self.sessions.heal()
            if ticks % RECHECK_TICKS == 0:
                self._spawn(self.contexts.settling.recheck())

    @property
    def ready(self) -> bool:
        """Whether generations are taken: a worker and a node are alive, and no draining began."""
        able = bool(self._cluster.workers()) and bool(self._cluster.nodes())
        return able and not self._draining

    async def _announce_readiness(self) -> None:
        ready = self.ready
        if ready != self._ready and self._on_ready is not None:
            self._ready = ready
            await self._on_ready(ready)

    def _sessions_found(self, sessions: list[SessionInventory]) -> None:
        self.sessions.orphans.report(sessions)
        self._close_orphans()

    def _close_orphans(self) -> None:
        there = (MemberState.ALIVE, MemberState.LEAVING)
        members = [member for member in self._cluster.members() if member.state in there]
        workers = [member.member_id for member in members if member.report.worker]
        nodes = [member.member_id for member in members if member.report.node]
        self._spawn(self.sessions.orphans.close(workers, nodes))

    async def _end_sessions(self, context_id: str, error: LongreachError) -> None:
        await self.sessions.abort_context(context_id, error)

    def _address_of(self, member_id: str) -> str:
        member = self._cluster.member(member_id)
        if member is None:
            raise Unavailable(f"{member_id} is not a member of the cluster", reason="NO_MEMBER")
        return member.report.address

    def _tls(self, files: TlsFiles | None, role: Role) -> ChannelTls | None:
        return ChannelTls(files, lambda at: self._server_name(role, at)) if files else None

    def _server_name(self, role: Role, address: str) -> str:
        """The name that the certificate at an address must carry: that of the member which
        reported it last."""
        here = [m for m in self._cluster.members() if m.report.address == address]
        if not here:
            return role.server_name
        member_id = max(here, key=lambda member: member.seen_at).member_id
        return PeerIdentity(role, member_id).server_name

    def _spawn(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._done)

    def _done(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and task.exception() is not None:
            _log.error("a background task failed", exc_info=task.exception())


def _open_catalog(config: CoordinatorConfig) -> Catalog:
    if not config.catalog:
        return SqliteCatalog(config.data_dir)
    # Clusters of different secrets may share a Redis.
    namespace = tenancy.tenant_digest(config.cluster_secret.encode(), "catalog")[:12]
    return RedisCatalog(config.catalog, namespace)
