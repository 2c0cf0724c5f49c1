"""Sizes the StatefulSet of the retrieval nodes: reads it, decides, acts; as the leader only."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Iterable

from coordinator.cluster import Member, MemberState
from coordinator.kubernetes.api import KubernetesApi, SetScale
from coordinator.kubernetes.scaling import (
    Decision,
    Evacuate,
    Grow,
    Keep,
    Memory,
    Rules,
    Seat,
    Shrink,
    View,
    Wait,
    decide,
)
from longreach.errors import Aborted, LongreachError

INTERVAL_S = 10.0
_log = logging.getLogger(__name__)


class NodeScaler:
    """Applies `decide` to what the members report. `evacuate(node)` has a node emptied while it
    goes on answering; that ends with its process only, so that one which is to stay after all is
    restarted. `members` are all of the cluster, `leads` says whether this coordinator is the
    leader, `refused_bytes` what contexts lacked since it was last asked."""

    def __init__(
        self,
        api: KubernetesApi,
        node_set: str,
        rules: Rules,
        evacuate: Callable[[str], None],
        *,
        members: Callable[[], Iterable[Member]],
        leads: Callable[[], bool],
        refused_bytes: Callable[[], int],
        interval_s: float = INTERVAL_S,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._api = api
        self._node_set = node_set
        self._rules = rules
        self._evacuate = evacuate
        self._members = members
        self._leads = leads
        self._refused_bytes = refused_bytes
        self._interval_s = interval_s
        self._clock = clock
        self._memory = Memory()
        self._said = ""

    async def run(self) -> None:
        """Decides every few seconds until cancelled."""
        while True:
            await self.decide_once()
            await asyncio.sleep(self._interval_s)

    async def decide_once(self) -> Decision:
        """One decision, carried out; what could not be carried out is decided again later."""
        refused_bytes = self._refused_bytes()
        if not self._leads():
            self._memory = Memory()
            return Wait("another coordinator leads")
        try:
            scale = await self._api.read_scale(self._node_set)
            view = View(scale.replicas, self._seats(scale.replicas), refused_bytes)
            decision, self._memory = decide(self._rules, view, self._memory, self._clock())
            self._tell(decision)
            await self._act(decision, scale)
        except Aborted:
            return Wait("somebody else sized the set")
        except LongreachError as error:
            self._tell(Wait(str(error)))
            return Wait(str(error))
        return decision

    async def _act(self, decision: Decision, scale: SetScale) -> None:
        match decision:
            case Grow(replicas=replicas) | Shrink(replicas=replicas):
                await self._api.write_scale(self._node_set, SetScale(replicas, scale.version))
            case Evacuate(ordinal=ordinal):
                self._evacuate(self._pod(ordinal))
            case Keep(ordinal=ordinal):
                await self._api.restart_pod(self._pod(ordinal))
            case Wait():
                pass

    def _pod(self, ordinal: int) -> str:
        """The name of a pod, which is its node's id."""
        return f"{self._node_set}-{ordinal}"

    def _seats(self, replicas: int) -> tuple[Seat, ...]:
        members = {member.member_id: member for member in self._members()}
        return tuple(_seat(n, members.get(self._pod(n))) for n in range(replicas))

    def _tell(self, decision: Decision) -> None:
        said = f"{type(decision).__name__.lower()}: {decision.why}"
        if said != self._said:
            level = logging.DEBUG if isinstance(decision, Wait) else logging.INFO
            _log.log(level, "nodes of %s: %s", self._node_set, said)
        self._said = said


def _seat(ordinal: int, member: Member | None) -> Seat:
    stats = member.report.node if member is not None else None
    if member is None or stats is None or member.state is not MemberState.ALIVE:
        return Seat(ordinal, alive=False)
    used_bytes = stats.context_bytes + stats.index_bytes + stats.tail_bytes
    return Seat(ordinal, True, used_bytes, stats.memory_limit_bytes, stats.sessions)
