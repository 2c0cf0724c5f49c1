"""Queries, keys and values of a whole prompt, one layer after another, from a dense prefill."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from gpu_worker.chunking import FixedChunks
from gpu_worker.model import Model
from gpu_worker.prefill import PrefillJob
from longreach.types import IntArray, LayerGeometry, StorageArray

CHUNK_TOKENS = 2048


@dataclass(frozen=True, slots=True)
class LayerTensors:
    """One layer over a prompt of n tokens, after the rotation, on the model's device: q [q_heads,
    n, d], k [kv_heads, n, d], v [kv_heads, n, value_dim]. Valid while the layer is visited."""

    layer: int
    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    scale: float

    @property
    def tokens(self) -> int:
        """Length of the prompt."""
        return int(self.q.shape[1])


Visit = Callable[[LayerTensors], None]


class _NoSink:
    """Nothing is stored."""

    def put(self, layer: int, start: int, keys: StorageArray, values: StorageArray) -> None:
        """Dropped."""

    def put_queries(self, layer: int, positions: IntArray, queries: StorageArray) -> None:
        """Dropped."""


class _CaptureJob(PrefillJob):
    """A dense prefill that shows each layer of full attention when its last chunk has come."""

    def __init__(
        self, token_ids: Sequence[int], layers: Sequence[LayerGeometry], visit: Visit
    ) -> None:
        super().__init__(token_ids, layers, _NoSink(), FixedChunks(CHUNK_TOKENS))
        self._visit = visit
        self._queries: list[torch.Tensor] = []
        self._held: tuple[torch.Tensor, torch.Tensor] | None = None

    def buffer(self, keys: torch.Tensor, values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Room for the layer that begins, remembered until its last chunk."""
        self._held = super().buffer(keys, values)
        return self._held

    def sample(self, layer: int, start: int, queries: torch.Tensor) -> None:
        """Keeps all queries; a layer that no sparse pattern serves is passed over."""
        call = self.calls[layer]
        if self.layers[layer].sliding_window or call.softcap > 0:
            return
        self._queries.append(queries)
        if start + queries.shape[1] == self.tokens:
            assert self._held is not None, "a layer attends after its keys were stored"
            q = torch.cat(self._queries, 1)
            self._queries.clear()
            self._visit(LayerTensors(layer, q, *self._held, call.scale))


def visit_layers(model: Model, token_ids: Sequence[int], visit: Visit) -> None:
    """Prefills the prompt and calls `visit` once for each layer of full attention, in order."""
    _CaptureJob(token_ids, model.layers, visit).run(model.module, model.device)
