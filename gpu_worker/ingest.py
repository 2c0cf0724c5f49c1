"""One context on its way from token ids to sealed shards.

The prefill runs on the device's thread; this generator runs on the caller's, tells progress and
seals. If it ends early, for whatever reason, the nodes forget what they were sent.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import TimeoutError as FutureTimeoutError
from typing import Protocol

import torch

from gpu_worker.chunking import ChunkSizer
from gpu_worker.earlier import EarlierKv, LayerKv, ReadNode
from gpu_worker.model import Model
from gpu_worker.offload import Destination, Offload, PutNode
from gpu_worker.patterns import Pattern
from gpu_worker.prefill import PrefillJob
from gpu_worker.scheduler import DeviceThread
from longreach import telemetry
from longreach.errors import Cancelled
from longreach.rpc.retrieval import NodeClient
from longreach.steps import PrefillProgress, PrefillSummary

log = logging.getLogger(__name__)
_PREFILL_TOKENS = telemetry.counter("prefill_tokens").bind()

PROGRESS_S = 0.25
"""Time between two progress reports."""
_ROOM_S = 0.005


class IngestNode(PutNode, ReadNode, Protocol):
    """A node to store on and to read earlier KV from."""


class Ingest:
    """Prefills one context and stores it; `run` once. `cancelled` may be set by any thread."""

    def __init__(
        self,
        model: Model,
        device: DeviceThread,
        to: Destination,
        token_ids: Sequence[int],
        sizer: ChunkSizer,
        cancelled: threading.Event,
        pattern: Pattern | None = None,
        connect: Callable[[str], IngestNode] = NodeClient,
    ) -> None:
        self._model = model
        self._device = device
        self._to = to
        self._token_ids = token_ids
        self._sizer = sizer
        self._cancelled = cancelled
        self._pattern = pattern
        self._connect = connect
        self._at = (0, 0)
        self._compute_s = 0.0
        self._peak_device_bytes = 0

    def run(self) -> Iterator[PrefillProgress]:
        """Yields progress, the last with the summary. Raises Cancelled and what nodes refused."""
        started = time.perf_counter()
        offload = Offload(self._to, self._model.layers, self._connect)
        sealed = False
        try:
            computing = self._device.call_long(lambda: self._compute(offload))
            while True:
                yield self._progress()
                try:
                    computing.result(PROGRESS_S)
                    break
                except FutureTimeoutError:
                    self._check()
            checksums = offload.seal(self._token_ids, self._check)
            sealed = True
            summary = PrefillSummary(
                compute_s=self._compute_s,
                total_s=time.perf_counter() - started,
                offloaded_bytes=offload.offloaded_bytes,
                peak_device_bytes=self._peak_device_bytes,
                checksums=checksums,
            )
            yield self._progress(summary)
        finally:
            if not sealed:
                self._cancelled.set()
                offload.drop()
            offload.close()

    def _compute(self, offload: Offload) -> None:
        """Runs on the device's thread."""

        def point(layer: int, tokens_done: int) -> bool:
            self._check()
            self._at = max(self._at, (layer, tokens_done))  # A layer may be swept twice.
            shared = self._device.run_pending()
            while not offload.has_room(_ROOM_S):
                self._check()
                shared = self._device.run_pending()
            return shared

        self._check()
        offload.start()
        earlier = None
        if self._to.start:
            earlier = EarlierKv(self._to, self._model.layers, self._to.start, self._connect)
        job = PrefillJob(
            self._token_ids,
            self._model.layers,
            offload,
            self._sizer,
            point,
            self._pattern,
            start=self._to.start,
            earlier=None if earlier is None else self._reader(earlier),
        )
        started = time.perf_counter()
        try:
            with _PeakMemory(self._model.device) as peak:
                job.run(self._model.module, self._model.device)
        finally:
            if earlier is not None:
                earlier.close()
        self._compute_s = time.perf_counter() - started
        _PREFILL_TOKENS.add(job.tokens)
        self._peak_device_bytes = peak.bytes
        if job.pairs_visible:
            log.info(
                "prefill of %d tokens with %s ran at density %.4f",
                job.tokens,
                self._pattern,
                job.pairs_attended / job.pairs_visible,
            )
        self._at = (len(self._model.layers), 0)

    def _reader(self, earlier: EarlierKv) -> Callable[[int], LayerKv]:
        """Takes a layer's earlier KV; other sessions' steps run while it is on its way."""

        def meanwhile() -> None:
            self._check()
            self._device.run_pending()

        return lambda layer: earlier.take(layer, meanwhile)

    def _check(self) -> None:
        if self._cancelled.is_set():
            raise Cancelled("the prefill was cancelled; what was stored is dropped")

    def _progress(self, summary: PrefillSummary | None = None) -> PrefillProgress:
        layer, tokens_done = self._at
        layers, tokens = len(self._model.layers), len(self._token_ids) - self._to.start
        return PrefillProgress(
            layers_done=layer,
            layers_total=layers,
            tokens_done=tokens_done,
            tokens_total=tokens,
            fraction=1.0 if summary else min(0.99, (layer + tokens_done / tokens) / layers),
            summary=summary,
        )


class _PeakMemory:
    """Highest device memory above what was allocated at entry; 0 without allocator statistics."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._base = 0
        self.bytes = 0

    def __enter__(self) -> _PeakMemory:
        if self._device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self._device)
            self._base = torch.cuda.memory_allocated(self._device)
        return self

    def __exit__(self, *error: object) -> None:
        if self._device.type == "cuda":
            self.bytes = torch.cuda.max_memory_allocated(self._device) - self._base
