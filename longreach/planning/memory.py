"""Bytes of a deployment, tier by tier: the device, the nodes' memory, their disks, the network.

The device holds weights, the resident KV of its session slots and, while it prefills, the hidden
states of the prompt and the KV of one layer. Nodes hold K and V of every position, indexes and the
tails of sessions. Disks hold a snapshot of what nodes hold sealed.
"""

from __future__ import annotations

from dataclasses import dataclass

from longreach.planning.shapes import ModelShape
from longreach.types import BOUNDARY_TOKENS, LayerGeometry

INDEX_RESERVE = 0.25
"""Room for indexes beside K and V that the coordinator asks of nodes (its `index_reserve`)."""

NODE_MEMORY_SHARE = 0.8
"""Share of a node's memory that it gives to KV, tails and indexes (its `memory_limit_bytes`)."""

CODE_BYTES = 32
"""Longest code of a key in the `sketch` index; 16 and 24 are the others."""

SUMMARY_TOKENS = 64
"""Keys that share a value summary of the `sketch` index, two bytes an element."""

_RING_GRAIN = 64
_PREFILL_CHUNK_TOKENS = 2048


@dataclass(frozen=True, slots=True)
class Resident:
    """What a worker keeps of each session: tokens of its sink and window, the longest run of
    tokens it takes in a step, and its session slots (the worker's settings of these names)."""

    sink_tokens: int = 128
    window_tokens: int = 512
    max_row_tokens: int = 512
    max_sessions: int = 16


@dataclass(frozen=True, slots=True)
class DeviceBytes:
    """Bytes on one worker's device. `full_kv` is what a full KV cache of the same sessions would
    take instead of `resident_kv`."""

    weights: int
    resident_kv: int
    prefill: int
    full_kv: int

    @property
    def total(self) -> int:
        """Bytes while a prefill runs and every slot is taken."""
        return self.weights + self.resident_kv + self.prefill


@dataclass(frozen=True, slots=True)
class NodeBytes:
    """Bytes over all nodes: K and V of contexts, `sketch` indexes over them, tails of sessions.

    `room` is what must be free for the coordinator to admit all of it: K and V with the index
    reserve, and tails.
    """

    contexts: int
    indexes: int
    tails: int
    room: int


@dataclass(frozen=True, slots=True)
class StepBytes:
    """Bytes of one token of one session on the network: queries to the nodes, answers back (fp32
    output and log-sum-exp of each query head), and its K and V to be appended."""

    queries: int
    answers: int
    append: int


def device_bytes(shape: ModelShape, context: int, sessions: int, resident: Resident) -> DeviceBytes:
    """Bytes on a worker that serves `sessions` over contexts of `context` tokens."""
    slots = resident.max_sessions
    return DeviceBytes(
        weights=shape.weight_bytes,
        resident_kv=slots * sum(_slot_bytes(shape, layer, resident) for layer in shape.layers),
        prefill=_prefill_bytes(shape, context),
        full_kv=sessions * context * shape.token_bytes,
    )


def node_bytes(
    shape: ModelShape,
    context: int,
    contexts: int,
    sessions: int,
    tail_tokens: int,
    copies: int = 1,
) -> NodeBytes:
    """Bytes on all nodes for `copies` of `contexts` contexts and `sessions` tails of
    `tail_tokens`: whoever holds a context holds its sessions' tails."""
    stored = copies * contexts * context * shape.token_bytes
    tails = copies * sessions * tail_tokens * shape.token_bytes
    indexes = (
        copies * contexts * context * sum(index_token_bytes(layer) for layer in shape.searched)
    )
    return NodeBytes(stored, indexes, tails, int(stored * (1 + INDEX_RESERVE)) + tails)


def index_token_bytes(layer: LayerGeometry) -> int:
    """Bytes that a `sketch` index takes per token of one layer, with its longest codes."""
    return layer.kv_heads * (CODE_BYTES + -(-2 * layer.value_dim // SUMMARY_TOKENS))


def step_bytes(shape: ModelShape) -> StepBytes:
    """Bytes of one decoded token on the network."""
    queries = sum(layer.q_heads * layer.head_dim for layer in shape.searched) * shape.itemsize
    answers = sum(layer.q_heads * (layer.value_dim + 1) for layer in shape.searched) * 4
    return StepBytes(queries, answers, shape.token_bytes)


def _slot_bytes(shape: ModelShape, layer: LayerGeometry, resident: Resident) -> int:
    """Resident KV of one session slot in one layer: sink and a ring, as the worker allocates it."""
    needed = max(layer.sliding_window, resident.window_tokens + BOUNDARY_TOKENS - 1)
    ring = -(-(needed + resident.max_row_tokens) // _RING_GRAIN) * _RING_GRAIN
    sink = 0 if layer.sliding_window else resident.sink_tokens
    return (sink + ring) * shape.layer_token_bytes(layer)


def _prefill_bytes(shape: ModelShape, context: int) -> int:
    """Hidden states of the prompt, one buffer of K and V for each kind of layer, and what a chunk
    needs at its widest: the two halves and the product of a gated feed-forward network."""
    kinds = {(each.kv_heads, each.head_dim, each.value_dim): each for each in shape.layers}
    buffers = sum(shape.layer_token_bytes(layer) for layer in kinds.values())
    chunk = min(context, _PREFILL_CHUNK_TOKENS) * 3 * shape.intermediate * shape.itemsize
    return context * (shape.hidden * shape.itemsize + buffers) + chunk
