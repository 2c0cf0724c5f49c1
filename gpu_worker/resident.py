"""The resident KV of every session on the device: sink and window, in batched slabs.

One slab per layer, [slots, kv_heads, columns, d]. A session owns a slot. Columns [0, sink) hold
the sink; a position p >= sink lives at column sink + (p - sink) % ring. What is in a column is
told by its stored position, so masks come from positions and nothing is ever moved to trim.

The ring is long enough that a run of `max_row_tokens` overwrites only positions that no row of a
session standing at its start can need: a failed row therefore leaves the session where it was, and
what it wrote is masked (its positions lie ahead) until the retry writes the same positions again.
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from gpu_worker.arrays import to_tensor
from longreach.errors import ResourceExhausted
from longreach.types import (
    BOUNDARY_TOKENS,
    LayerGeometry,
    Span,
    StorageArray,
    retrieval_boundary,
)

_GRAIN = 64
EMPTY = -1
"""Stored position of a column that holds nothing."""


@dataclass(frozen=True, slots=True)
class Kind:
    """Layers that keep the same positions: full attention (sliding_window 0) or one window."""

    sliding_window: int
    sink: int
    ring: int

    @property
    def columns(self) -> int:
        """Columns of a slot."""
        return self.sink + self.ring

    def column_of(self, positions: torch.Tensor) -> torch.Tensor:
        """Column of each position."""
        return torch.where(
            positions < self.sink, positions, self.sink + (positions - self.sink) % self.ring
        )

    def resident(self, tokens: int, window: int) -> tuple[Span, ...]:
        """Positions to hold when `tokens` have been seen."""
        if self.sliding_window:
            return (Span(max(0, tokens - self.sliding_window), tokens),)
        sink = Span(0, min(self.sink, tokens))
        start = max(sink.stop, retrieval_boundary(tokens, window))
        return (sink, Span(start, max(start, tokens)))


def kinds_of(
    layers: Sequence[LayerGeometry], sink: int, window: int, max_row_tokens: int
) -> tuple[Kind, ...]:
    """The kinds of a model's layers, each once, with their capacities."""
    kinds = []
    for sliding in sorted({layer.sliding_window for layer in layers}):
        # Sliding layers too keep what the nodes may not have yet: it is sent again from here.
        needed = max(sliding, window + BOUNDARY_TOKENS - 1)
        ring = -(-(needed + max_row_tokens) // _GRAIN) * _GRAIN
        kinds.append(Kind(sliding, 0 if sliding else sink, ring))
    return tuple(kinds)


class LocalSlab:
    """Resident KV of up to `slots` sessions. Used by the thread that owns the device only."""

    def __init__(
        self,
        layers: Sequence[LayerGeometry],
        *,
        slots: int,
        sink: int,
        window: int,
        max_row_tokens: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        self.layers = tuple(layers)
        self.sink = sink
        self.window = window
        self.max_row_tokens = max_row_tokens
        self.device = device
        self.kinds = kinds_of(layers, sink, window, max_row_tokens)
        by_window = {kind.sliding_window: i for i, kind in enumerate(self.kinds)}
        self.kind_of = tuple(by_window[layer.sliding_window] for layer in layers)
        self.keys: list[torch.Tensor] = []
        self.values: list[torch.Tensor] = []
        for layer, kind in zip(layers, self.kind_of, strict=True):
            shape = (slots, layer.kv_heads, self.kinds[kind].columns)
            self.keys.append(torch.zeros(*shape, layer.head_dim, dtype=dtype, device=device))
            self.values.append(torch.zeros(*shape, layer.value_dim, dtype=dtype, device=device))
        self.positions = [
            torch.full((slots, kind.columns), EMPTY, dtype=torch.int64, device=device)
            for kind in self.kinds
        ]
        self.slots = slots
        self._free = list(range(slots))

    @property
    def bytes_per_slot(self) -> int:
        """Bytes of K and V of one session, all layers."""
        return sum(x[0].numel() * x.element_size() for x in (*self.keys, *self.values))

    @property
    def slots_used(self) -> int:
        """Slots in use."""
        return self.slots - len(self._free)

    def acquire(self) -> int:
        """Takes the lowest free slot, so that slots in use lie together.

        Raises ResourceExhausted when every slot is taken.
        """
        if not self._free:
            raise ResourceExhausted(
                f"all {self.slots} session slots of this worker are in use; close a session, "
                "try another worker, or start this one with a larger --max-sessions",
                reason="NO_SESSION_SLOT",
                retry_after_s=1.0,
            )
        return heapq.heappop(self._free)

    def release(self, slot: int) -> None:
        """Gives a slot back and forgets what it held."""
        for stored in self.positions:
            stored[slot] = EMPTY
        heapq.heappush(self._free, slot)

    def place(
        self, layer: int, slot: int, start: int, head: int, keys: StorageArray, values: StorageArray
    ) -> None:
        """Stores keys [heads, n, d] and values of KV heads from `head` at positions from `start`.

        `occupy` makes them visible once every layer is placed.
        """
        kind = self.kinds[self.kind_of[layer]]
        at = torch.arange(start, start + keys.shape[1], device=self.device)
        columns = kind.column_of(at)
        heads = slice(head, head + keys.shape[0])
        self.keys[layer][slot][heads, columns] = to_tensor(keys, self.device)
        self.values[layer][slot][heads, columns] = to_tensor(values, self.device)

    def occupy(self, slot: int, tokens: int) -> None:
        """Marks the resident positions of a session that has seen `tokens` as held."""
        for kind, stored in zip(self.kinds, self.positions, strict=True):
            stored[slot] = EMPTY
            for span in kind.resident(tokens, self.window):
                at = torch.arange(span.start, span.stop, device=self.device)
                stored[slot, kind.column_of(at)] = at

    def take(self, layer: int, slot: int, span: Span) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values [kv_heads, n, d] of positions that the slot still holds."""
        at = torch.arange(span.start, span.stop, device=self.device)
        columns = self.kinds[self.kind_of[layer]].column_of(at)
        return self.keys[layer][slot][:, columns], self.values[layer][slot][:, columns]
