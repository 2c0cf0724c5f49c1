"""What a pattern costs on one layer, and how far each head's output is from dense."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from gpu_worker.attention import causal_attention
from gpu_worker.chunking import MIN_CHUNK_TOKENS
from gpu_worker.pattern_search.capture import LayerTensors
from gpu_worker.patterns.base import Pattern, PatternResult
from gpu_worker.patterns.executor import attend_selection
from gpu_worker.prefill import PROBE_QUERIES


@dataclass(frozen=True, slots=True)
class Cost:
    """One run over the measured chunks: seconds in all and for the index alone, and density."""

    seconds: float
    index_s: float
    density: float


def chunk_starts(tokens: int, chunk_rows: int, chunks: int) -> list[int]:
    """Starts of at most `chunks` chunks of a prompt, spread evenly, the last one included."""
    total = -(-tokens // chunk_rows)
    count = min(chunks, total)
    return [(total - 1 - i * total // count) * chunk_rows for i in range(count)][::-1]


class LayerMeter:
    """Runs patterns over some chunks of one layer, all heads together, as a prefill does."""

    def __init__(self, tensors: LayerTensors, chunk_rows: int, chunks: int) -> None:
        if chunk_rows % MIN_CHUNK_TOKENS:
            raise ValueError(
                f"chunks have {chunk_rows} rows; it must be a multiple of {MIN_CHUNK_TOKENS}"
            )
        self.tensors = tensors
        self.chunk_rows = chunk_rows
        self.starts = chunk_starts(tensors.tokens, chunk_rows, chunks)
        # Probing the prompt happens once for all its chunks: those measured bear their share.
        self._share = len(self.starts) * chunk_rows / max(tensors.tokens, chunk_rows)

    def run(
        self, pattern: Pattern, take: Callable[[int, PatternResult], None] | None = None
    ) -> Cost:
        """Attends the measured chunks; `take` is given each chunk's start and result."""
        t = self.tensors
        began = self._now()
        state = None
        if pattern.needs == "prompt":
            state = pattern.probe(t.q[:, -PROBE_QUERIES:], t.k, t.scale)
        index_s = (self._now() - began) * self._share
        seconds, attended, visible = index_s, 0, 0
        for start in self.starts:
            stop = min(t.tokens, start + self.chunk_rows)
            q, k, v = t.q[:, start:stop], t.k[:, :stop], t.v[:, :stop]
            began = self._now()
            selection = pattern.select(q, k, start, t.tokens, t.scale, state)
            selected = self._now()
            result = attend_selection(q, k, v, start, t.scale, selection)
            seconds += self._now() - began
            index_s += selected - began
            attended += result.pairs_attended
            visible += result.pairs_visible
            if take is not None:
                take(start, result)
        return Cost(seconds, index_s, attended / max(1, visible))

    def dense(self) -> dict[int, Tensor]:
        """Output [q_heads, rows, value_dim] of dense attention, by chunk start."""
        t = self.tensors
        outputs = {}
        for start in self.starts:
            stop = min(t.tokens, start + self.chunk_rows)
            part = causal_attention(
                t.q[:, start:stop], t.k[:, :stop], t.v[:, :stop], start, t.scale
            )
            outputs[start] = part.output
        return outputs

    def errors(self, pattern: Pattern, dense: dict[int, Tensor]) -> tuple[Cost, list[float]]:
        """The cost of one run, and per query head: norm of the output's difference from dense /
        norm of dense."""
        squared = torch.zeros(2, self.tensors.q.shape[0], dtype=torch.float64)

        def take(start: int, result: PatternResult) -> None:
            difference = (result.output - dense[start]).double().square().sum((1, 2))
            squared[0] += difference.cpu()
            squared[1] += dense[start].double().square().sum((1, 2)).cpu()

        cost = self.run(pattern, take)
        return cost, (squared[0] / squared[1].clamp(min=1e-30)).sqrt().tolist()

    def _now(self) -> float:
        """Seconds; the device has finished what it was given."""
        if self.tensors.q.is_cuda:
            torch.cuda.synchronize()
        return time.perf_counter()
