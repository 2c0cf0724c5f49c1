"""Indexes of a shard or of a chunk of a tail: one that answers at once, and better ones built in
the background.

A build that fails is given up for good: the index before it goes on answering, the status says
why, and nobody has to wait for it any longer.
"""

from __future__ import annotations

import logging
import queue
import threading
import time
import weakref
from collections.abc import Callable, Mapping

from longreach import telemetry
from longreach.errors import Cancelled, LongreachError
from longreach.types import IndexStatus, QuerySample
from retrieval_node.background import lower_priority
from retrieval_node.index.base import INDEX_KINDS, BuildControl, Index, LayerKv
from retrieval_node.memory import MemoryBudget, Reservation, Use
from retrieval_node.shard import SealedShard

_LOG = logging.getLogger(__name__)
_BUILD_SECONDS = telemetry.histogram("index_build_seconds").bind()
FIRST_KIND = "flat"
"""The kind that answers until the first build is done; it needs none."""

OnBuilt = Callable[[int], None]
"""`on_built(layer)`: told on the builder's thread when a layer's index answers."""


class LayerIndexes:
    """The index that answers for each of some layers, and how its successor fares.

    Readers take `serving[layer]` without a lock; a finished build replaces that entry. `layers`
    maps layer number to K and V that never change, `name` says whose they are.
    """

    def __init__(self, name: str, layers: Mapping[int, LayerKv], target_kind: str) -> None:
        self.name = name
        self.layers = dict(layers)
        self.target_kind = target_kind
        self.cancelled = threading.Event()
        control = BuildControl(lambda built, total: None, self.cancelled)
        first = INDEX_KINDS[FIRST_KIND]
        self.serving: dict[int, Index] = {
            layer: first.build(kv, None, control) for layer, kv in self.layers.items()
        }
        needs_build = INDEX_KINDS[target_kind].needs_build
        self._pending = set(self.layers) if needs_build else set()
        self._built = {
            layer: 0 if needs_build else kv.kv_heads for layer, kv in self.layers.items()
        }
        self._reservations: list[Reservation] = []
        self._build_cpu_s = 0.0
        self._error = ""
        self._lock = threading.Lock()

    @property
    def pending(self) -> tuple[int, ...]:
        """Layers whose target index is not built yet."""
        with self._lock:
            return tuple(sorted(self._pending))

    def sample(self, layer: int) -> QuerySample | None:
        """Queries to fit the index of a layer to; none are known here."""
        return None

    def progressed(self, layer: int, heads_built: int) -> None:
        """Notes how many heads of a layer are built."""
        with self._lock:
            self._built[layer] = heads_built

    def finished(self, layer: int, index: Index, memory: Reservation, cpu_s: float) -> None:
        """Lets a built index answer from now on; its memory is freed by `release`."""
        with self._lock:
            self._reservations.append(memory)
            self._build_cpu_s += cpu_s
            self._built[layer] = self.layers[layer].kv_heads
            self.serving[layer] = index
            self._settle(layer)
            if self.cancelled.is_set():
                memory.release()

    def failed(self, layer: int, error: str) -> None:
        """Notes that a build failed; the index before it goes on answering."""
        with self._lock:
            self._error = f"layer {layer}: {error}"
            self._built[layer] = 0
            self._settle(layer)

    def release(self) -> int:
        """Cancels builds and frees the indexes' memory; returns the bytes freed."""
        self.cancelled.set()
        with self._lock:
            return sum(reservation.release() for reservation in self._reservations)

    def status(self) -> IndexStatus:
        """Where the indexes stand; layers of different kinds are joined by "+"."""
        with self._lock:
            serving = "+".join(sorted({index.kind for index in self.serving.values()}))
            done = not self._pending and not self._error
            return IndexStatus(
                serving_kind=serving,
                target_kind=serving if done else self.target_kind,
                built=sum(self._built.values()),
                total=sum(kv.kv_heads for kv in self.layers.values()),
                bytes=sum(index.index_bytes for index in self.serving.values()),
                build_cpu_s=self._build_cpu_s,
                error=self._error,
            )

    def _settle(self, layer: int) -> None:
        self._pending.discard(layer)


class ShardIndexes(LayerIndexes):
    """The indexes of a sealed shard's searched layers.

    Query samples are kept until every layer has used its own.
    """

    def __init__(
        self,
        sealed: SealedShard,
        samples: Mapping[int, QuerySample],
        samples_reservation: Reservation,
        target_kind: str,
    ) -> None:
        layers = {layer: sealed.layers[layer] for layer in sealed.searched_layers}
        super().__init__(f"shard {sealed.shard.shard_id!r}", layers, target_kind)
        self._samples = dict(samples)
        self._samples_reservation = samples_reservation
        if not self._pending:
            self._free_samples()

    def sample(self, layer: int) -> QuerySample | None:
        """Prefill queries of a layer, when there are some and its build is still to come."""
        with self._lock:
            return self._samples.get(layer)

    def samples(self) -> dict[int, QuerySample]:
        """Prefill queries of every layer whose build is still to come."""
        with self._lock:
            return dict(self._samples)

    def release(self) -> int:
        """See LayerIndexes.release; the samples go too."""
        freed = super().release()
        with self._lock:
            self._samples.clear()
            return freed + self._samples_reservation.release()

    def _settle(self, layer: int) -> None:
        super()._settle(layer)
        self._samples.pop(layer, None)
        if not self._pending:
            self._free_samples()

    def _free_samples(self) -> None:
        self._samples.clear()
        self._samples_reservation.release()


class Builder:
    """Builds indexes in background threads of low priority, layer by layer, first come first.

    Queued jobs refer to their indexes weakly, and no thread keeps them between jobs: the memory of
    a dropped shard or session is free at once, however long the queue.
    """

    def __init__(self, memory: MemoryBudget, kind: str, threads: int) -> None:
        self.kind = kind
        INDEX_KINDS[kind]  # an unknown kind fails at start, not at the first seal
        self._memory = memory
        self._jobs: queue.SimpleQueue[tuple[weakref.ref[LayerIndexes], int, OnBuilt] | None]
        self._jobs = queue.SimpleQueue()
        self._unfinished = 0
        self._running = 0
        self._idle = threading.Condition()
        self._threads = [
            threading.Thread(target=self._work, name=f"builder-{n}", daemon=True)
            for n in range(threads)
        ]
        for thread in self._threads:
            thread.start()

    @property
    def running(self) -> int:
        """Builds of a layer that are under way now."""
        return self._running

    def start(self, indexes: LayerIndexes, on_built: OnBuilt = lambda layer: None) -> None:
        """Queues the builds of the layers. `on_built` must not keep the indexes alive."""
        layers = indexes.pending
        with self._idle:
            self._unfinished += len(layers)
        for layer in layers:
            self._jobs.put((weakref.ref(indexes), layer, on_built))

    def wait_idle(self, timeout_s: float) -> bool:
        """Waits until no build is waiting or running; False when the time runs out first."""
        with self._idle:
            return self._idle.wait_for(lambda: self._unfinished == 0, timeout_s)

    def close(self) -> None:
        """Ends the threads after the layer each is building."""
        for _ in self._threads:
            self._jobs.put(None)

    def _work(self) -> None:
        lower_priority()
        while self._work_once():
            pass

    def _work_once(self) -> bool:
        job = self._jobs.get()
        if job is None:
            return False
        with self._idle:
            self._running += 1
        try:
            indexes, layer, on_built = job[0](), job[1], job[2]
            if (
                indexes is not None
                and not indexes.cancelled.is_set()
                and self._build(indexes, layer)
            ):
                on_built(layer)
        finally:
            with self._idle:
                self._running -= 1
                self._unfinished -= 1
                self._idle.notify_all()
        return True

    def _build(self, indexes: LayerIndexes, layer: int) -> bool:
        """Whether the layer has its index now."""
        name = f"{self.kind} index of {indexes.name}, layer {layer}"
        control = BuildControl(
            lambda built, total: indexes.progressed(layer, built), indexes.cancelled
        )
        began, began_cpu = time.perf_counter(), time.thread_time()
        try:
            index = INDEX_KINDS[self.kind].build(
                indexes.layers[layer], indexes.sample(layer), control
            )
            memory = self._memory.reserve(Use.INDEX, index.index_bytes, name)
        except Cancelled:
            return False
        except LongreachError as error:
            _LOG.warning("no %s: %s", name, error.message)
            indexes.failed(layer, error.message)
        except Exception as error:
            _LOG.exception("building the %s failed", name)
            indexes.failed(layer, f"{type(error).__name__}: {error}")
        else:
            indexes.finished(layer, index, memory, time.thread_time() - began_cpu)
            _BUILD_SECONDS.record(time.perf_counter() - began)
            return True
        return False
