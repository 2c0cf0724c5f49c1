"""Membership: who is alive, decided from heartbeats and the clock alone.

`Cluster.apply(event, now)` changes the state and returns what happened; whoever calls it does the
I/O. Times are seconds of one monotonic clock, passed in.

    joined ── ALIVE ──3 s silent──> SUSPECT ──10 s silent──> DEAD ──1 h silent──> forgotten
                ^ <───heartbeat──────┘                         │
                └────────────────heartbeat─────────────────────┘
    leave:  any state ──> LEAVING ──60 s silent──> forgotten      time to finish what it has
    drain:  any state keeps its state and gets nothing new until its process ends

A member is known by its name; an incarnation is one life of its process. A new incarnation has
lost its memory; one that was replaced is refused from then on.
"""

from __future__ import annotations

import dataclasses
import enum
from dataclasses import dataclass

from longreach.errors import StaleEpoch
from longreach.steps import WorkerStatus
from longreach.types import NodeStats, ShardMap

SUSPECT_AFTER_S = 3.0
DEAD_AFTER_S = 10.0
GONE_AFTER_S = 60.0
FORGET_AFTER_S = 3600.0


class MemberState(enum.Enum):
    """How a member stands. ALIVE gets new work; SUSPECT keeps what it has."""

    ALIVE = "alive"
    SUSPECT = "suspect"
    DEAD = "dead"
    LEAVING = "leaving"


@dataclass(frozen=True, slots=True)
class Heartbeat:
    """A member's report: a worker brings `worker`, a node brings `node`. `draining`: it is about to
    leave and wants to be emptied first."""

    member_id: str
    incarnation: int
    address: str
    host: str = ""
    zone: str = ""
    cores: int = 1
    worker: WorkerStatus | None = None
    node: NodeStats | None = None
    draining: bool = False


@dataclass(frozen=True, slots=True)
class Leave:
    """A member takes leave: no new work, its process ends soon."""

    member_id: str
    incarnation: int


@dataclass(frozen=True, slots=True)
class Unreachable:
    """A call to the member failed at the transport; it is suspect until it reports again."""

    member_id: str


@dataclass(frozen=True, slots=True)
class Tick:
    """Time passed."""


@dataclass(frozen=True, slots=True)
class Paused:
    """This coordinator itself stood still for so many seconds: its members' silence is its own."""

    seconds: float


@dataclass(frozen=True, slots=True)
class Drain:
    """An operator wants a member emptied: it gets nothing new and keeps what it has until that is
    elsewhere."""

    member_id: str


Event = Heartbeat | Leave | Drain | Unreachable | Tick | Paused


class Change(enum.Enum):
    """What happened to a member."""

    JOINED = "joined"
    RESTARTED = "restarted"
    RECOVERED = "recovered"
    MOVED = "moved"
    SUSPECTED = "suspected"
    DIED = "died"
    DRAINING = "draining"
    LEFT = "left"
    FORGOTTEN = "forgotten"


@dataclass(frozen=True, slots=True)
class Action:
    """A change for the driver to act on."""

    change: Change
    member_id: str

    def __str__(self) -> str:
        return f"{self.change.value} {self.member_id}"


@dataclass(frozen=True, slots=True)
class Member:
    """A member as last reported; `seen_at` is the time of its last report. One that is `draining`
    gets nothing new, whatever its state; that ends with its process."""

    report: Heartbeat
    state: MemberState
    seen_at: float
    draining: bool = False

    @property
    def member_id(self) -> str:
        """The stable name."""
        return self.report.member_id

    @property
    def takes_work(self) -> bool:
        """Whether it may get anything new."""
        return self.state is MemberState.ALIVE and not self.draining

    @property
    def reachable(self) -> bool:
        """Whether its memory is still counted on: alive, or silent for a short while only."""
        return self.state in (MemberState.ALIVE, MemberState.SUSPECT)


class Cluster:
    """The membership state machine. `epoch` grows with every change."""

    def __init__(self) -> None:
        self.epoch = 0
        self._members: dict[str, Member] = {}
        self._retired: dict[str, set[int]] = {}

    def apply(self, event: Event, now: float) -> list[Action]:
        """Applies an event; raises StaleEpoch for a report of a replaced incarnation."""
        match event:
            case Heartbeat():
                actions = self._heartbeat(event, now)
            case Leave():
                actions = self._leave(event)
            case Drain():
                actions = self._drain(event.member_id)
            case Unreachable():
                actions = self._suspect(event.member_id)
            case Tick():
                actions = self._tick(now)
            case Paused():
                self._members = {
                    name: dataclasses.replace(
                        member, seen_at=min(now, member.seen_at + event.seconds)
                    )
                    for name, member in self._members.items()
                }
                actions = []
        self.epoch += len(actions)
        return actions

    def member(self, member_id: str) -> Member | None:
        """A member by name."""
        return self._members.get(member_id)

    def members(self) -> list[Member]:
        """All members, by name."""
        return [self._members[name] for name in sorted(self._members)]

    def workers(self) -> list[Member]:
        """Workers that may get new work."""
        return [m for m in self.members() if m.takes_work and m.report.worker]

    def nodes(self) -> list[Member]:
        """Nodes that may get new work."""
        return [m for m in self.members() if m.takes_work and m.report.node]

    def readdress(self, shard_map: ShardMap) -> ShardMap:
        """The map with the addresses its nodes have now; those of unknown nodes stay."""
        addresses = {
            node_id: self._members[node_id].report.address
            for node_id in {n for shard in shard_map.shards for n in shard.node_ids}
            if node_id in self._members
        }
        return dataclasses.replace(shard_map, addresses=shard_map.addresses | addresses)

    def _heartbeat(self, report: Heartbeat, now: float) -> list[Action]:
        name = report.member_id
        if report.incarnation in self._retired.get(name, ()):
            raise StaleEpoch(
                f"another process reports as {name!r} since this one started; give every process "
                "its own id, or end this one"
            )
        old = self._members.get(name)
        change = _change(old, report)
        if old is not None and change is Change.RESTARTED:
            self._retired.setdefault(name, set()).add(old.report.incarnation)
        leaving = old is not None and old.state is MemberState.LEAVING
        state = MemberState.ALIVE
        if leaving and change is not Change.RESTARTED:
            state, change = MemberState.LEAVING, None
        asked = old is not None and old.draining and change is not Change.RESTARTED
        draining = report.draining or asked
        self._members[name] = Member(report, state, now, draining)
        actions = [Action(change, name)] if change else []
        if draining and not asked:
            actions.append(Action(Change.DRAINING, name))
        return actions

    def _drain(self, member_id: str) -> list[Action]:
        member = self._members.get(member_id)
        if member is None or member.draining:
            return []
        self._members[member_id] = dataclasses.replace(member, draining=True)
        return [Action(Change.DRAINING, member_id)]

    def _leave(self, event: Leave) -> list[Action]:
        member = self._members.get(event.member_id)
        if member is None or member.report.incarnation != event.incarnation:
            return []
        if member.state is MemberState.LEAVING:
            return []
        self._set_state(member, MemberState.LEAVING)
        return [Action(Change.LEFT, event.member_id)]

    def _suspect(self, member_id: str) -> list[Action]:
        member = self._members.get(member_id)
        if member is None or member.state is not MemberState.ALIVE:
            return []
        self._set_state(member, MemberState.SUSPECT)
        return [Action(Change.SUSPECTED, member_id)]

    def _tick(self, now: float) -> list[Action]:
        actions: list[Action] = []
        for member in self.members():
            change = self._age(member, now - member.seen_at)
            if change:
                actions.append(Action(change, member.member_id))
        return actions

    def _age(self, member: Member, silent_s: float) -> Change | None:
        if member.state is MemberState.LEAVING and silent_s >= GONE_AFTER_S:
            del self._members[member.member_id]
            return Change.FORGOTTEN
        if member.state is MemberState.DEAD and silent_s >= FORGET_AFTER_S:
            del self._members[member.member_id]
            return Change.FORGOTTEN
        if member.reachable and silent_s >= DEAD_AFTER_S:
            self._set_state(member, MemberState.DEAD)
            return Change.DIED
        if member.state is MemberState.ALIVE and silent_s >= SUSPECT_AFTER_S:
            self._set_state(member, MemberState.SUSPECT)
            return Change.SUSPECTED
        return None

    def _set_state(self, member: Member, state: MemberState) -> None:
        self._members[member.member_id] = dataclasses.replace(member, state=state)


def _change(old: Member | None, report: Heartbeat) -> Change | None:
    """What a report says that was not known before; the strongest news only."""
    if old is None:
        return Change.JOINED
    if old.report.incarnation != report.incarnation:
        return Change.RESTARTED
    if old.report.address != report.address:
        return Change.MOVED
    if old.state in (MemberState.SUSPECT, MemberState.DEAD):
        return Change.RECOVERED
    return None
