"""How many retrieval nodes, with how much memory each, and how contexts are spread over them.

The choice between placing whole layers and groups of heads is the coordinator's own rule
(coordinator/placement/planner.py): waves of heads that a node's cores cannot search at once, plus
a quarter of a wave for each further message of a layer. Tests hold the two to each other.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from longreach.errors import InvalidRequest
from longreach.planning.memory import NODE_MEMORY_SHARE, NodeBytes
from longreach.planning.shapes import ModelShape

MESSAGE_WAVES = 0.25


@dataclass(frozen=True, slots=True)
class NodePlan:
    """`count` nodes of `memory_bytes` each (all of the node's memory, of which it uses 80%).

    `policy` is the placement policy, `waves` and `messages` its cost per searched layer,
    `fullest_share` the part of all bytes on the fullest node, `why` both policies compared.
    """

    count: int
    memory_bytes: int
    cores: int
    policy: str
    waves: float
    messages: float
    fullest_share: float
    why: str


@dataclass(frozen=True, slots=True)
class _Spread:
    policy: str
    waves: float
    messages: float
    fullest_share: float
    imbalance: float

    @property
    def cost(self) -> float:
        return self.waves + MESSAGE_WAVES * (self.messages - 1)


def plan_nodes(
    shape: ModelShape, needed: NodeBytes, cores: int, count: int = 0, memory_bytes: int = 0
) -> NodePlan:
    """Nodes for `needed`: with `count` of them, the memory that each must have; with
    `memory_bytes` each, the fewest that hold it.

    Raises InvalidRequest when neither is given, or no number of nodes suffices.
    """
    if cores < 1 or count < 0 or memory_bytes < 0:
        raise InvalidRequest(
            f"{count} nodes of {cores} cores and {memory_bytes} bytes; write positive numbers"
        )
    if count:
        return _node_plan(shape, needed, cores, count)
    if not memory_bytes:
        raise InvalidRequest("neither the number of nodes nor the memory of one was given")
    # A share is at least one layer, or one head of every layer: further nodes stay empty.
    most_useful = max(len(shape.layers), max(layer.kv_heads for layer in shape.layers))
    for number in range(1, most_useful + 1):
        plan = _node_plan(shape, needed, cores, number)
        if plan.memory_bytes <= memory_bytes:
            return plan
    raise InvalidRequest(
        f"nodes of {memory_bytes} bytes cannot hold their share however many there are: a layer "
        f"of a context stays on one node, and the smallest share needs {plan.memory_bytes}; give "
        "nodes more memory or store less"
    )


def _node_plan(shape: ModelShape, needed: NodeBytes, cores: int, count: int) -> NodePlan:
    spreads = sorted(
        (_by_layer(shape, cores, count), _by_head_group(shape, cores, count)),
        key=lambda spread: (spread.cost, spread.imbalance),
    )
    chosen = spreads[0]
    why = "; ".join(
        f"{each.policy}: {each.waves:.2f} waves of heads and {each.messages:.2f} messages per "
        f"layer, fullest node {each.imbalance:.2f}x the mean"
        for each in spreads
    )
    return NodePlan(
        count=count,
        memory_bytes=math.ceil(needed.room * chosen.fullest_share / NODE_MEMORY_SHARE),
        cores=cores,
        policy=chosen.policy,
        waves=chosen.waves,
        messages=chosen.messages,
        fullest_share=chosen.fullest_share,
        why=why,
    )


def _by_layer(shape: ModelShape, cores: int, count: int) -> _Spread:
    """All heads of a layer on one node; searched and sliding layers are dealt out apart."""
    loads = [0] * count
    for group in (shape.searched, tuple(each for each in shape.layers if each.sliding_window)):
        dealt = [0] * count
        for layer in group:
            node = min(range(count), key=dealt.__getitem__)
            dealt[node] += shape.layer_token_bytes(layer)
        loads = [load + more for load, more in zip(loads, dealt, strict=True)]
    waves = [math.ceil(layer.kv_heads / cores) for layer in shape.searched]
    return _spread("layer", _mean(waves), 1.0, loads)


def _by_head_group(shape: ModelShape, cores: int, count: int) -> _Spread:
    """Heads of every layer in contiguous groups over min(nodes, heads) nodes."""
    used = min(count, max(layer.kv_heads for layer in shape.layers))
    loads = [0] * count
    waves, messages = [], []
    for layer in shape.layers:
        groups = min(used, layer.kv_heads)
        held = [0] * groups
        for head in range(layer.kv_heads):
            held[head * groups // layer.kv_heads] += 1
        for node, heads in enumerate(held):
            loads[node] += shape.layer_token_bytes(layer) * heads // layer.kv_heads
        if not layer.sliding_window:
            waves.append(math.ceil(max(held) / cores))
            messages.append(groups)
    return _spread("head_group", _mean(waves), _mean(messages), loads)


def _spread(policy: str, waves: float, messages: float, loads: Sequence[int]) -> _Spread:
    fullest = max(loads) / sum(loads)
    return _Spread(policy, waves, messages, fullest, fullest * len(loads))


def _mean(numbers: Sequence[float]) -> float:
    return sum(numbers) / max(1, len(numbers))
