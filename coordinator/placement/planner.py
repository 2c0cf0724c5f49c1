"""Chooses a placement and says why.

The cost of a decode step is the sum over layers of the slowest node's time, because layers follow
each other. On one node, heads beyond its cores wait for the next wave: waves = ceil(heads / cores).
Every further node of a layer costs one more message to encode, send and merge.
"""

from __future__ import annotations

import dataclasses
import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass

from coordinator.placement import head_group, layer, round_robin, span
from coordinator.placement.base import (
    POLICIES,
    ClusterView,
    ContextToPlace,
    bytes_by_node,
    check_room,
)
from coordinator.placement.replication import replicate
from longreach.errors import ResourceExhausted
from longreach.types import ShardMap

AUTO = "auto"
CANDIDATES = ("layer", "head_group")
# A message to one more node against one wave of searching a head: both are a fraction of a
# millisecond on a fast network and a 100k-token context; the message is the cheaper one.
MESSAGE_WAVES = 0.25

_REGISTERED = (head_group, layer, round_robin, span)  # importing a policy registers it


@dataclass(frozen=True, slots=True)
class Estimate:
    """What a map would cost: `waves` and `messages` per layer (mean over searched layers), and
    `imbalance`, the fullest node's bytes over the mean."""

    waves: float
    messages: float
    imbalance: float

    @property
    def cost(self) -> float:
        """Waves with the further messages counted in; lower is better."""
        return self.waves + MESSAGE_WAVES * (self.messages - 1)


def estimate(context: ContextToPlace, view: ClusterView, shard_map: ShardMap) -> Estimate:
    """Estimates the decode cost of a map."""
    searched = {each.layer for each in context.layers if each.sliding_window == 0}
    heads: dict[int, Counter[str]] = {number: Counter() for number in searched}
    for shard in shard_map.shards:
        for number in searched.intersection(shard.layers):
            heads[number][shard.node_ids[0]] += shard.kv_heads
    waves = [_waves(held, view) for held in heads.values()]
    sizes = bytes_by_node(dataclasses.replace(context, room_tokens=1), shard_map.shards)
    mean = sum(sizes.values()) / len(view.nodes)
    return Estimate(
        waves=sum(waves) / max(1, len(waves)),
        messages=sum(len(held) for held in heads.values()) / max(1, len(heads)),
        imbalance=max(sizes.values()) / mean,
    )


def _waves(held: Mapping[str, int], view: ClusterView) -> int:
    """Waves of a layer whose heads nodes hold so. Nodes on one host share its cores: splitting
    heads between them gains nothing."""
    heads: Counter[str] = Counter()
    cores: dict[str, int] = {}
    for node in view.nodes:
        machine = node.host or node.node_id
        heads[machine] += held.get(node.node_id, 0)
        cores[machine] = max(1, node.cores, cores.get(machine, 1))
    return max(math.ceil(count / cores[machine]) for machine, count in heads.items())


def place(
    context: ContextToPlace,
    view: ClusterView,
    policy: str = AUTO,
    index_reserve: float = 0.0,
    replicas: int = 1,
) -> ShardMap:
    """Places a context with a named policy, or with the cheapest one that fits, and copies of it
    as far as nodes and their memory allow.

    Raises InvalidRequest for an unknown policy, Unavailable without nodes and ResourceExhausted,
    naming bytes needed and free, when it does not fit.
    """
    return replicate(
        context, _one_copy(context, view, policy, index_reserve), view, replicas, index_reserve
    )


def _one_copy(
    context: ContextToPlace, view: ClusterView, policy: str, index_reserve: float
) -> ShardMap:
    if policy != AUTO:
        chosen = POLICIES[policy](context, view)
        check_room(context, chosen, view, index_reserve)
        return chosen
    plans: list[tuple[Estimate, ShardMap]] = []
    too_big: ResourceExhausted | None = None
    for name in CANDIDATES:
        candidate = POLICIES[name](context, view)
        try:
            check_room(context, candidate, view, index_reserve)
        except ResourceExhausted as error:
            too_big = too_big or error
            continue
        plans.append((estimate(context, view, candidate), candidate))
    if not plans:
        assert too_big is not None
        in_runs = _in_runs(context, view, index_reserve)
        if in_runs is None:
            raise too_big
        return in_runs
    plans.sort(key=lambda plan: (plan[0].cost, plan[0].imbalance))
    return dataclasses.replace(plans[0][1], reason=_reason(plans))


def _in_runs(context: ContextToPlace, view: ClusterView, index_reserve: float) -> ShardMap | None:
    """The context in as few runs of positions as fit; None where none do."""
    runs = 2
    while len(context.span) and runs <= span.MOST_RUNS:
        candidate = span.plan_runs(context, view, runs)
        try:
            check_room(context, candidate, view, index_reserve)
        except ResourceExhausted:
            runs *= 2
            continue
        reason = f"span: {candidate.reason}; no other placement fits"
        return dataclasses.replace(candidate, reason=reason)
    return None


def _reason(plans: list[tuple[Estimate, ShardMap]]) -> str:
    costs = "; ".join(
        f"{shard_map.policy}: {each.waves:.2f} waves of heads and {each.messages:.2f} messages per "
        f"layer, fullest node {each.imbalance:.2f}x the mean"
        for each, shard_map in plans
    )
    return f"{plans[0][1].policy}: {plans[0][1].reason} ({costs})"


def policy_names() -> tuple[str, ...]:
    """What a request may name."""
    return (AUTO, *POLICIES)
