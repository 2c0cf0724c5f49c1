"""Keeps, of a prompt's queries at one layer, what decode methods choose and learn by."""

from __future__ import annotations

import copy

import numpy as np
import torch

from gpu_worker.arrays import to_array
from gpu_worker.chunking import sample_positions
from library.decode.base import OBSERVED_QUERIES, QueryRecord
from longreach.types import IntArray


class QueryRecorder:
    """Takes the queries of a sequence as they come.

    `mean_heads`: KV heads to average groups for; 0 keeps no means. `positions`, ascending: whose
    queries are sampled; without them each chunk is sampled by itself. Means are kept only while no
    position was missed.
    """

    def __init__(self, mean_heads: int = 0, positions: IntArray | None = None) -> None:
        self._mean_heads = mean_heads
        self._wanted = positions
        self.stop = 0
        self._last: list[torch.Tensor] = []
        self._positions: list[IntArray] = []
        self._sampled: list[torch.Tensor] = []
        self._mean: list[torch.Tensor] = []

    def add(self, start: int, queries: torch.Tensor) -> None:
        """Takes queries [q_heads, n, d] of the positions from `start` on."""
        stop = start + queries.shape[1]
        if start != self.stop:
            self._mean_heads = 0
            self._mean = []
        self.stop = stop
        positions = self._sampled_positions(start, stop)
        at = torch.from_numpy(positions - start).to(queries.device)
        self._positions.append(positions)
        self._sampled.append(queries[:, at])
        # Cloned, because a view would keep the whole chunk.
        self._last.append(queries[:, -OBSERVED_QUERIES:].clone())
        if sum(each.shape[1] for each in self._last) > 2 * OBSERVED_QUERIES:
            self._last = [torch.cat(self._last, 1)[:, -OBSERVED_QUERIES:].clone()]
        if self._mean_heads:
            grouped = queries.unflatten(0, (self._mean_heads, -1))
            self._mean.append(grouped.float().mean(1).to(queries.dtype))

    def crop(self, tokens: int) -> None:
        """Forgets the queries of positions from `tokens` on."""
        if not self._last or tokens >= self.stop:
            return
        last = torch.cat(self._last, 1)
        self._last = [last[:, : max(0, last.shape[1] - (self.stop - tokens))]]
        positions = np.concatenate(self._positions)
        kept = int(np.count_nonzero(positions < tokens))
        self._positions = [positions[:kept]]
        self._sampled = [torch.cat(self._sampled, 1)[:, :kept]]
        if self._mean:
            self._mean = [torch.cat(self._mean, 1)[:, :tokens]]
        self.stop = tokens

    def copy(self) -> QueryRecorder:
        """A recorder that goes on from here by itself."""
        other = copy.copy(self)
        for name in ("_last", "_positions", "_sampled", "_mean"):
            setattr(other, name, list(getattr(self, name)))
        return other

    def record(self, like: torch.Tensor) -> QueryRecord:
        """What was kept; `like` [q_heads, 0, d] stands for it where nothing was seen."""
        last = torch.cat(self._last, 1)[:, -OBSERVED_QUERIES:] if self._last else like
        sampled = torch.cat(self._sampled, 1) if self._sampled else like
        positions = np.concatenate([np.empty(0, np.int64), *self._positions])
        mean = torch.cat(self._mean, 1) if self._mean else None
        return QueryRecord(last, positions, to_array(sampled), mean)

    def _sampled_positions(self, start: int, stop: int) -> IntArray:
        if self._wanted is None:
            return sample_positions(stop - start) + start
        low, high = np.searchsorted(self._wanted, (start, stop))
        return self._wanted[low:high]
