"""What the nodes hold, asked of the nodes themselves: copies, sessions, memory."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from longreach.errors import LongreachError
from longreach.rpc.retrieval import NodeClient
from longreach.rpc.tls import ChannelTls
from longreach.types import NodeStats, Shard, ShardInventory, Span

_TIMEOUT_S = 3.0


@dataclass(frozen=True)
class NodeHoldings:
    """A node's shards, open sessions and memory."""

    name: str
    shards: tuple[ShardInventory, ...]
    sessions: tuple[str, ...]
    stats: NodeStats

    def sealed(self, context_id: str) -> list[tuple[str, Shard]]:
        """The sealed shards of a context, with the node's name."""
        return [
            (self.name, each.shard)
            for each in self.shards
            if each.context_id == context_id and each.sealed
        ]


def inspect(addresses: dict[str, str], tls: ChannelTls) -> list[NodeHoldings]:
    """Asks every node at once. Raises LongreachError where one does not answer."""

    def ask(name: str) -> NodeHoldings:
        node = NodeClient(addresses[name], timeout_s=_TIMEOUT_S, tls=tls)
        try:
            shards, sessions = node.inventory()
            return NodeHoldings(name, tuple(shards), tuple(sessions), node.stats())
        finally:
            node.close()

    if not addresses:
        return []
    with ThreadPoolExecutor(len(addresses)) as pool:
        return list(pool.map(ask, addresses))


def fewest_copies(held: Sequence[tuple[str, Shard]], tokens: int, cells: int) -> int:
    """Over all positions, layers and KV heads of a context: on how few nodes one is.

    `held` are the nodes' names with the sealed shards of the context that they have, `tokens` its
    length, `cells` the model's number of (layer, KV head) pairs.
    """
    found = {cell for _, shard in held for cell in _cells(shard)}
    if len(found) < cells:
        return 0
    return min(
        _copies_of_cell([(n, s.span) for n, s in held if cell in _cells(s)], tokens)
        for cell in found
    )


def _cells(shard: Shard) -> set[tuple[int, int]]:
    heads = range(shard.kv_head_start, shard.kv_head_stop)
    return {(layer, head) for layer in shard.layers for head in heads}


def _copies_of_cell(held: Sequence[tuple[str, Span]], tokens: int) -> int:
    """On how few nodes some position of [0, tokens) is, given which node holds which span."""
    edges = sorted(
        {0, *(min(edge, tokens) for _, span in held for edge in (span.start, span.stop))}
    )
    if edges[-1] < tokens:
        return 0
    return min(
        len({name for name, span in held if span.start <= start and stop <= span.stop})
        for start, stop in itertools.pairwise(edges)
    )


def answers(addresses: dict[str, str], tls: ChannelTls) -> list[NodeHoldings] | None:
    """`inspect`, or None while a node does not answer."""
    try:
        return inspect(addresses, tls)
    except LongreachError:
        return None
