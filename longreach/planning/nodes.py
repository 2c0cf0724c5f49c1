"""How many retrieval nodes, with how much memory each, and how contexts are spread over them.

The choice between placing whole layers and groups of heads is the coordinator's own rule
(coordinator/placement/planner.py): waves of heads that a node's cores cannot search at once, plus
a quarter of a wave for each further message of a layer. Further copies go where the coordinator
puts them (coordinator/placement/replication.py). Tests hold the two to each other.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from longreach.errors import InvalidRequest
from longreach.planning.memory import NODE_MEMORY_SHARE, NodeBytes
from longreach.planning.shapes import ModelShape

MESSAGE_WAVES = 0.25


@dataclass(frozen=True, slots=True)
class NodePlan:
    """`count` nodes of `memory_bytes` each (all of the node's memory, of which it uses 80%).

    `copies` of everything are kept, at most one on a node. `policy` is the placement policy,
    `waves` and `messages` its cost per searched layer, `fullest_share` the part of all bytes, of
    all copies, on the fullest node, `why` both policies compared.
    """

    count: int
    copies: int
    memory_bytes: int
    cores: int
    policy: str
    waves: float
    messages: float
    fullest_share: float
    why: str


_Unit = tuple[int, int]
"""A shard: the node of its first copy, and its bytes per token."""


@dataclass(frozen=True, slots=True)
class _Spread:
    policy: str
    waves: float
    messages: float
    imbalance: float
    units: tuple[_Unit, ...]

    @property
    def cost(self) -> float:
        return self.waves + MESSAGE_WAVES * (self.messages - 1)


def plan_nodes(
    shape: ModelShape,
    needed: NodeBytes,
    cores: int,
    count: int = 0,
    memory_bytes: int = 0,
    replicas: int = 1,
) -> NodePlan:
    """Nodes for `replicas` copies of `needed`, fewer where there are fewer nodes: with `count` of
    them, the memory that each must have; with `memory_bytes` each, the fewest that hold it.

    Raises InvalidRequest when neither is given, or no number of nodes suffices.
    """
    if cores < 1 or count < 0 or memory_bytes < 0:
        raise InvalidRequest(
            f"{count} nodes of {cores} cores and {memory_bytes} bytes; write positive numbers"
        )
    if count:
        return _node_plan(shape, needed, cores, count, replicas)
    if not memory_bytes:
        raise InvalidRequest("neither the number of nodes nor the memory of one was given")
    # A share is at least one layer, or one head of every layer: further nodes stay empty.
    most_useful = max(len(shape.layers), max(layer.kv_heads for layer in shape.layers))
    # As many nodes as copies at least: one that holds everything would not outlive a fault.
    for number in range(replicas, replicas * most_useful + 1):
        plan = _node_plan(shape, needed, cores, number, replicas)
        if plan.memory_bytes <= memory_bytes:
            return plan
    raise InvalidRequest(
        f"nodes of {memory_bytes} bytes cannot hold their share however many there are: a layer "
        f"of a context stays on one node, and the smallest share needs {plan.memory_bytes}; give "
        "nodes more memory or store less"
    )


def _node_plan(
    shape: ModelShape, needed: NodeBytes, cores: int, count: int, replicas: int
) -> NodePlan:
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
    copies = min(replicas, count)
    fullest_share = _fullest_share(chosen.units, count, copies)
    return NodePlan(
        count=count,
        copies=copies,
        memory_bytes=math.ceil(copies * needed.room * fullest_share / NODE_MEMORY_SHARE),
        cores=cores,
        policy=chosen.policy,
        waves=chosen.waves,
        messages=chosen.messages,
        fullest_share=fullest_share,
        why=why,
    )


def _by_layer(shape: ModelShape, cores: int, count: int) -> _Spread:
    """All heads of a layer on one node; searched and sliding layers are dealt out apart."""
    units: Counter[tuple[int, int, int, int]] = Counter()
    for group in (shape.searched, tuple(each for each in shape.layers if each.sliding_window)):
        dealt = [0] * count
        for layer in group:
            node = min(range(count), key=dealt.__getitem__)
            dealt[node] += shape.layer_token_bytes(layer)
            # Layers of one shape on a node are one shard.
            units[node, layer.kv_heads, layer.head_dim, layer.value_dim] += shape.layer_token_bytes(
                layer
            )
    waves = [math.ceil(layer.kv_heads / cores) for layer in shape.searched]
    return _spread("layer", _mean(waves), 1.0, count, units)


def _by_head_group(shape: ModelShape, cores: int, count: int) -> _Spread:
    """Heads of every layer in contiguous groups over min(nodes, heads) nodes."""
    used = min(count, max(layer.kv_heads for layer in shape.layers))
    units: Counter[tuple[int, int, int, int]] = Counter()
    waves, messages = [], []
    for layer in shape.layers:
        groups = min(used, layer.kv_heads)
        held = [0] * groups
        for head in range(layer.kv_heads):
            held[head * groups // layer.kv_heads] += 1
        for node, heads in enumerate(held):
            units[node, heads, layer.head_dim, layer.value_dim] += (
                shape.layer_token_bytes(layer) * heads // layer.kv_heads
            )
        if not layer.sliding_window:
            waves.append(math.ceil(max(held) / cores))
            messages.append(groups)
    return _spread("head_group", _mean(waves), _mean(messages), count, units)


def _spread(
    policy: str,
    waves: float,
    messages: float,
    count: int,
    sizes: Mapping[tuple[int, int, int, int], int],
) -> _Spread:
    """A spread from the bytes of its shards, by node and shape."""
    units = tuple((key[0], sizes[key]) for key in sorted(sizes))
    imbalance = _fullest_share(units, count, 1) * count
    return _Spread(policy, waves, messages, imbalance, units)


def _fullest_share(units: Sequence[_Unit], count: int, copies: int) -> float:
    """The part of all bytes that the fullest of `count` nodes holds, on whichever node a context
    begins: that is another one for each."""
    if copies == 1:
        return _fullest_load(units, count, 1) / sum(size for _, size in units)
    worst = max(
        _fullest_load(sorted(((node + start) % count, size) for node, size in units), count, copies)
        for start in range(count)
    )
    return worst / (copies * sum(size for _, size in units))


def _fullest_load(units: Sequence[_Unit], count: int, copies: int) -> int:
    """Bytes on the fullest node. Further copies are put the largest first, each on the node with
    the least so far, then on the next after the first holder."""
    loads = [0] * count
    for node, size in units:
        loads[node] += size
    holders = {at: [node] for at, (node, _) in enumerate(units)}
    largest_first = sorted(holders, key=lambda at: -units[at][1])
    for _ in range(1, copies):
        for at in largest_first:
            first, size = units[at]
            in_turn = [(first + step) % count for step in range(count)]
            node = min((n for n in in_turn if n not in holders[at]), key=loads.__getitem__)
            holders[at].append(node)
            loads[node] += size
    return max(loads)


def _mean(numbers: Sequence[float]) -> float:
    return sum(numbers) / max(1, len(numbers))
