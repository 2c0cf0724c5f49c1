"""One data set of the retrieval benchmark: its truth, its bandwidth, and how answers are judged."""

from __future__ import annotations

import time
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from threading import Event
from typing import Any

import faiss as _typed_faiss
import numpy as np

from benchmarks.synthetic import Workload, workload
from longreach.attention import attention_logits, softmax_partial
from longreach.types import BFLOAT16, Budget, FloatArray, PartialAttention, QuerySample, Span
from retrieval_node.aligned import aligned_empty
from retrieval_node.index.base import INDEX_KINDS, BuildControl, Index, IndexRows, LayerKv

faiss: Any = _typed_faiss

TOP = 100
STEPS_MADE = 24
"""Decode steps that a workload has, and so the most a scene can time."""

FLUSH_BYTES = 96 << 20
"""Streamed through the caches before a cold measurement."""

_FLUSH = np.zeros(FLUSH_BYTES // 8)


def flush() -> None:
    """Push what was cached out of the caches (of this core; a larger shared cache may keep it)."""
    np.add(_FLUSH, 1.0, out=_FLUSH)


@dataclass(frozen=True, slots=True)
class Quality:
    """How close answers come: recall of the best TOP keys, median relative error of the output,
    median error of the LSE, and median share of the attention mass on the keys used."""

    recall: float
    output_error: float
    lse_error: float
    mass: float


class Scene:
    """A synthetic head of `keys` keys, `steps` decode steps of its query group, and the truth."""

    def __init__(self, name: str, keys: int, steps: int, cache: Path) -> None:
        self.name = name
        self.keys = keys
        self.work = cached_workload(name, keys, cache)
        self.kv = LayerKv(self.work.keys[None], self.work.values[None], 0)
        self.sample = QuerySample(
            0, 0, self.work.prefill_positions, self.work.prefill_queries.astype(np.float32)
        )
        # [steps, 1 KV head, group, d]
        decode = self.work.decode_queries[:, :steps].transpose(1, 0, 2)
        # What has bfloat16 keys has bfloat16 queries, and they are sent as such.
        rounded = decode.astype(BFLOAT16).astype(np.float32)
        self.queries = np.ascontiguousarray(rounded)[:, None]
        self.steps = len(self.queries)

    @cached_property
    def label(self) -> str:
        """Name, size and a checksum of the keys: cached indexes are of these keys and no others."""
        checksum = zlib.crc32(self.work.keys.view(np.uint8).data)
        return f"{self.name}-{self.keys}-{checksum:08x}"

    @cached_property
    def centred(self) -> FloatArray:
        """Keys [n, d] fp32 less their mean."""
        keys = np.asarray(self.work.keys, np.float32)
        return np.asarray(keys - keys.mean(axis=0), np.float32)

    def layer_sample(self, kv_heads: int) -> QuerySample:
        """Prefill queries of a layer whose KV heads are all like this one."""
        queries = np.tile(self.sample.queries, (kv_heads, 1, 1))
        return QuerySample(0, 0, self.sample.positions, queries)

    @cached_property
    def flat(self) -> Index:
        """The exact kind."""
        return build("flat", self)[0]

    def rows(self, step: int, budget: Budget) -> IndexRows:
        """One decode step's query group over all keys."""
        return IndexRows(self.queries[step : step + 1], 0, Span(0, self.keys), budget)

    @cached_property
    def full(self) -> PartialAttention:
        """Exact attention of every step: output [steps, group, value_dim], lse [steps, group]."""
        parts = [
            self.flat.attend([self.rows(step, Budget(exact=True))], self.work.scale)[0].partial
            for step in range(self.steps)
        ]
        return PartialAttention(
            np.concatenate([part.output[:, 0] for part in parts]),
            np.concatenate([part.lse[:, 0] for part in parts]),
        )

    @cached_property
    def best(self) -> np.ndarray:
        """The TOP best keys of every query [steps, group, TOP]."""
        budget = Budget(top_k=TOP)
        found = [
            self.flat.attend([self.rows(step, budget)], self.work.scale, want_selected=True)[0]
            for step in range(self.steps)
        ]
        return np.array([answer.selected[0][0] for answer in found if answer.selected])

    def attention_over(self, ids: np.ndarray) -> PartialAttention:
        """Exact attention of every query over its own keys ids [steps, group, k]; -1 is none."""
        keys = self.work.keys[np.maximum(ids, 0)]
        queries = self.queries[:, 0, :, None]
        logits = attention_logits(queries, keys, self.work.scale)
        logits = np.where(ids[:, :, None] >= 0, logits, np.float32(-np.inf))
        part = softmax_partial(logits, self.work.values[np.maximum(ids, 0)])
        return PartialAttention(part.output[:, :, 0], part.lse[:, :, 0])

    def judge(self, selected: list[list[np.ndarray]], partial: PartialAttention) -> Quality:
        """Quality of partial attention whose keys were `selected[step][query head]`."""
        recalls, masses = [], []
        for step in range(self.steps):
            for g, keys in enumerate(selected[step]):
                recalls.append(np.isin(self.best[step, g], keys).mean())
                query = self.queries[step, 0, g : g + 1]
                logits = attention_logits(query, self.work.keys[keys], self.work.scale)
                masses.append(np.exp(logits - self.full.lse[step, g]).sum())
        error = np.linalg.norm(partial.output - self.full.output, axis=-1)
        return Quality(
            float(np.mean(recalls)),
            float(np.median(error / np.linalg.norm(self.full.output, axis=-1))),
            float(np.median(np.abs(partial.lse - self.full.lse))),
            float(np.median(masses)),
        )


def build(kind: str, scene: Scene) -> tuple[Index, float]:
    """An index of a kind over the scene, and the CPU seconds its build took."""
    started = time.process_time()
    index = build_over(kind, scene.kv, scene.sample)
    return index, time.process_time() - started


def build_over(kind: str, kv: LayerKv, sample: QuerySample) -> Index:
    """An index of a kind."""
    return INDEX_KINDS[kind].build(kv, sample, BuildControl(lambda built, total: None, Event()))


def cached_workload(name: str, keys: int, cache: Path) -> Workload:
    """A workload, kept on disk because large ones take a minute to make."""
    path = cache / f"workload-1-{name}-{keys}-{STEPS_MADE}.npz"
    if not path.exists():
        made = workload(keys, name=name, steps=STEPS_MADE, prefill=keys // 16)
        cache.mkdir(parents=True, exist_ok=True)
        np.savez(
            path,
            keys=made.keys.view(np.uint16),
            values=made.values.view(np.uint16),
            decode_queries=made.decode_queries,
            prefill_queries=made.prefill_queries.astype(np.float16),
            prefill_positions=made.prefill_positions,
        )
    with np.load(path) as file:
        return Workload(
            name,
            _stored(file["keys"].view(BFLOAT16)),
            _stored(file["values"].view(BFLOAT16)),
            file["decode_queries"],
            file["prefill_queries"].astype(np.float32),
            file["prefill_positions"],
        )


def _stored(rows: np.ndarray) -> np.ndarray:
    """Rows in memory as a node holds them."""
    held = aligned_empty(rows.shape, rows.dtype)
    held[:] = rows
    return held


@dataclass(frozen=True, slots=True)
class Bandwidth:
    """What the machine's memory gives one thread: sequential bytes per second, cold, and rows of
    256 bytes per second at random places, in bytes per second."""

    sequential: float
    gather: float


def measure_bandwidth(scene: Scene) -> Bandwidth:
    """Medians over the scene's own keys (fp32, as the libraries hold them)."""
    keys = scene.centred
    dim = keys.shape[1]
    query = np.ascontiguousarray(scene.queries[0, 0, :1])
    scores = np.empty(len(keys), np.float32)
    half = np.ascontiguousarray(query[:, : dim // 2])
    rows = np.random.default_rng(0).integers(0, len(keys), 8192)
    gathered = np.empty((1, len(rows)), np.float32)

    def stream() -> None:
        faiss.fvec_inner_products_ny(
            faiss.swig_ptr(scores), faiss.swig_ptr(query), faiss.swig_ptr(keys), dim, len(keys)
        )

    def gather() -> None:
        faiss.fvec_inner_products_by_idx(
            faiss.swig_ptr(gathered), faiss.swig_ptr(half), faiss.swig_ptr(keys),
            faiss.swig_ptr(rows), dim // 2, 1, len(rows)
        )  # fmt: skip

    return Bandwidth(keys.nbytes / median_cold(stream), len(rows) * dim * 2 / median_cold(gather))


def median_cold(call: Callable[[], object], turns: int = 9) -> float:
    """Median CPU seconds of a call right after the caches were flushed."""
    return float(np.median([cold_seconds(call) for _ in range(turns)]))


def cold_seconds(call: Callable[[], object]) -> float:
    """CPU seconds of one call right after the caches were flushed."""
    flush()
    return warm_seconds(call)


def warm_seconds(call: Callable[[], object]) -> float:
    """CPU seconds of one call; CPU time, so that other processes' turns do not count."""
    started = time.process_time_ns()
    call()
    return (time.process_time_ns() - started) * 1e-9
