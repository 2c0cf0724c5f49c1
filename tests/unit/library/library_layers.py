"""One layer's random keys, values and queries, and attention over named positions, literally."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch

from gpu_worker.attention import LayerCall
from library.decode import DecodeMethod, LayerContext
from library.layer import Attended, LayerDecoder
from library.queries import QueryRecorder
from longreach.types import LayerGeometry

KV_HEADS, GROUP, DIM = 2, 2, 16
Q_HEADS = KV_HEADS * GROUP
CONTEXT, TAIL = 203, 7
LAYER = 5


@dataclass(frozen=True)
class Scene:
    """A context, a tail of TAIL tokens whose last `rows` are being fed, and everyone's queries."""

    seed: int = 0
    rows: int = 1
    softcap: float = 0.0
    context: int = CONTEXT

    @cached_property
    def tensors(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Queries [q_heads, n, d], keys and values [kv_heads, n, d] of context and tail."""
        generator = torch.Generator().manual_seed(self.seed)
        total = self.context + TAIL
        queries, keys, values = (
            torch.randn(heads, total, DIM, generator=generator)
            for heads in (Q_HEADS, KV_HEADS, KV_HEADS)
        )
        return queries, keys, values

    @property
    def call(self) -> LayerCall:
        return LayerCall(DIM**-0.5, self.softcap)

    @property
    def seen(self) -> int:
        """Positions before the rows being fed."""
        return self.context + TAIL - self.rows

    def layer(self) -> LayerContext:
        queries, keys, values = self.tensors
        recorder = QueryRecorder(KV_HEADS)
        for part in queries[:, : self.context].split(64, 1):
            recorder.add(recorder.stop, part)
        return LayerContext(
            LayerGeometry(LAYER, Q_HEADS, KV_HEADS, DIM, DIM),
            keys[:, : self.context].contiguous(),
            values[:, : self.context].contiguous(),
            recorder.record(queries[:, :0]),
            self.call,
            keys[:, :0],
        )

    def attend(self, method: DecodeMethod, layer: LayerContext | None = None) -> Attended:
        queries, keys, values = self.tensors
        decoder = LayerDecoder(method, layer or self.layer())
        return decoder.attend(
            queries[:, self.seen :], keys[:, self.context :], values[:, self.context :]
        )

    @cached_property
    def products(self) -> np.ndarray:
        """q·k [q_heads, n, n] of every query with every key of its KV head, fp64."""
        queries, keys, _ = (each.double().numpy() for each in self.tensors)
        return np.stack([queries[h] @ keys[h // GROUP].T for h in range(Q_HEADS)])

    def logit(self, head: int, row: int, position: int) -> float:
        """Of the query of a position against the key of another."""
        logit = float(self.products[head, row, position]) * self.call.scale
        return float(self.softcap * np.tanh(logit / self.softcap)) if self.softcap else logit

    def literal(self, chosen: Callable[[int, int], set[int]]) -> torch.Tensor:
        """Output [q_heads, rows, d] over the positions chosen(head, row) < seen, and the new rows
        up to each one's own, one softmax at a time."""
        _, _, values = self.tensors
        output = torch.zeros(Q_HEADS, self.rows, DIM, dtype=torch.float64)
        for head in range(Q_HEADS):
            for row in range(self.rows):
                at = self.seen + row
                positions = sorted(chosen(head, at)) + list(range(self.seen, at + 1))
                logits = torch.tensor([self.logit(head, at, p) for p in positions])
                weights = logits.double().softmax(0)
                output[head, row] = weights @ values[head // GROUP, positions].double()
        return output.float()

    def pairs(self, chosen: Callable[[int, int], set[int]]) -> int:
        """Distinct (KV head, position) pairs chosen, summed over rows."""
        return sum(
            len(set().union(*(chosen(kv * GROUP + g, self.seen + row) for g in range(GROUP))))
            for row in range(self.rows)
            for kv in range(KV_HEADS)
        )
