"""Sealed shards and their indexes on the node's disk, so that a restarted node serves them again.

A shard is one file, and so is the index of each of its layers; see docs/formats.md. Each is written
under a temporary name, synced and renamed: under its own name it is whole. Loading reads into
memory and checks the checksum made at the seal, so the token path never waits for the disk and
damaged data is never served. An index file that cannot be used costs its layer a build, no more.
Tails are not snapshotted; they live in memory.
"""

from __future__ import annotations

import dataclasses
import hashlib
import logging
import os
import queue
import secrets
import threading
import weakref
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from longreach import telemetry
from longreach.errors import FailedPrecondition, LongreachError, ResourceExhausted
from longreach.types import QuerySample
from retrieval_node.background import lower_priority
from retrieval_node.contexts import Served
from retrieval_node.index.base import INDEX_KINDS
from retrieval_node.memory import MemoryBudget
from retrieval_node.shard import SealedShard
from retrieval_node.shard_file import (
    LoadedIndex,
    LoadedShard,
    read_layer_index,
    read_shard,
    write_layer_index,
    write_shard,
)
from retrieval_node.tensor_file import BrokenFileError

_LOG = logging.getLogger(__name__)
_FAILURES = telemetry.counter("snapshot_failures").bind()
_CHECKSUM_FAILURES = telemetry.counter("checksum_failures").bind()
_SUFFIX = ".safetensors"
_INDEX_SUFFIX = ".index"
_LOADERS = 4
_CLOSE_TIMEOUT_S = 20.0


class Snapshots:
    """The snapshot directory and the thread that writes to it.

    `index_kind` is the kind that indexes are to be of; files of another kind are not loaded.
    Queued jobs refer to their shard weakly, so that a drop frees its memory at once.
    """

    def __init__(self, directory: Path, index_kind: str) -> None:
        self._directory = directory
        self._index_kind = index_kind
        directory.mkdir(parents=True, exist_ok=True)
        for left in directory.glob("*.tmp"):
            left.unlink()
        self._lock = threading.Lock()
        self._jobs: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._unfinished = 0
        self._idle = threading.Condition()
        self._thread = threading.Thread(target=self._work, name="snapshots", daemon=True)
        self._thread.start()

    def save(self, served: Served, samples: Mapping[int, QuerySample]) -> None:
        """Queues a shard for writing; `served.snapshot` names the file once it is on disk."""
        kept = weakref.ref(served)
        self._queue(lambda: self._write_shard(kept(), samples))

    def index_saver(self, served: Served) -> Callable[[int], None]:
        """What queues the index of a layer for writing, behind its shard; keeps no shard alive."""
        kept = weakref.ref(served)
        return lambda layer: self._queue(lambda: self._write_index(kept(), layer))

    def remove(self, served: Served) -> None:
        """Deletes the files of a shard whose indexes were released; a late write is deleted too."""
        with self._lock:
            if served.snapshot is not None:
                served.snapshot.unlink(missing_ok=True)
                for each in self._directory.glob(f"{served.snapshot.stem}.*{_INDEX_SUFFIX}"):
                    each.unlink(missing_ok=True)
                served.snapshot = None

    def wait_idle(self, timeout_s: float) -> bool:
        """Waits until every queued shard is written; False when the time runs out first."""
        with self._idle:
            return self._idle.wait_for(lambda: self._unfinished == 0, timeout_s)

    def close(self) -> None:
        """Writes what is queued, for at most 20 s, and stops."""
        self._jobs.put(None)
        self._thread.join(_CLOSE_TIMEOUT_S)

    def load(self, memory: MemoryBudget, serve: Callable[[LoadedShard], None]) -> int:
        """Reads every file and serves its shard; returns how many are served.

        Damaged files are renamed aside and never served. Files that do not fit into memory, or
        beside what is served already, stay where they are.
        """
        paths = sorted(self._directory.glob(f"*{_SUFFIX}"))
        with ThreadPoolExecutor(_LOADERS) as pool:
            served = sum(pool.map(lambda path: self._load_one(path, memory, serve), paths))
        self._remove_stray_indexes()
        return served

    def _load_one(
        self, path: Path, memory: MemoryBudget, serve: Callable[[LoadedShard], None]
    ) -> bool:
        try:
            loaded = read_shard(path, memory)
        except BrokenFileError as error:
            aside = path.with_suffix(".corrupt")
            path.rename(aside)
            _CHECKSUM_FAILURES.add()
            _FAILURES.add()
            _LOG.error("snapshot %s is damaged and was renamed to %s: %s", path, aside.name, error)
            return False
        except (OSError, ResourceExhausted) as error:
            _FAILURES.add()
            _LOG.error("snapshot %s was not loaded: %s", path, error)
            return False
        loaded = dataclasses.replace(loaded, indexes=self._load_indexes(loaded, memory))
        try:
            serve(loaded)
        except LongreachError as error:
            loaded.release()
            _FAILURES.add()
            _LOG.error("snapshot %s is not served: %s", path, error.message)
            return False
        _LOG.info(
            "snapshot %s is served again, with the indexes of %d of %d layers",
            path.name,
            len(loaded.indexes),
            len(loaded.sealed.searched_layers),
        )
        return True

    def _load_indexes(self, loaded: LoadedShard, memory: MemoryBudget) -> dict[int, LoadedIndex]:
        """The index of each layer whose file can be used; the others are built again."""
        found: dict[int, LoadedIndex] = {}
        if not INDEX_KINDS[self._index_kind].needs_build:
            return found
        for layer in loaded.sealed.searched_layers:
            path = _index_path(loaded.path, layer)
            if not path.exists():
                continue
            try:
                found[layer] = read_layer_index(
                    path, loaded.sealed, layer, self._index_kind, memory
                )
            except (FailedPrecondition, ResourceExhausted) as error:
                _LOG.warning("index file %s is not used: %s", path.name, error.message)
        return found

    def _remove_stray_indexes(self) -> None:
        """Deletes index files whose shard is gone: a drop was interrupted, or it was damaged."""
        for path in self._directory.glob(f"*{_INDEX_SUFFIX}"):
            shard_name = path.name.partition(".")[0] + _SUFFIX
            if not (self._directory / shard_name).exists():
                path.unlink(missing_ok=True)

    def _queue(self, job: Callable[[], None]) -> None:
        with self._idle:
            self._unfinished += 1
        self._jobs.put(job)

    def _work(self) -> None:
        lower_priority()
        while self._work_once():
            pass

    def _work_once(self) -> bool:
        """Runs the next job; keeps nothing of it, so that a drop frees its shard."""
        job = self._jobs.get()
        if job is None:
            return False
        try:
            job()
        except OSError as error:
            _FAILURES.add()
            _LOG.error("a shard or index was not written to %s: %s", self._directory, error)
        except Exception:
            _FAILURES.add()
            _LOG.exception("writing a shard or index to %s failed", self._directory)
        finally:
            with self._idle:
                self._unfinished -= 1
                self._idle.notify_all()
        return True

    def _write_shard(self, served: Served | None, samples: Mapping[int, QuerySample]) -> None:
        if served is None or served.indexes.cancelled.is_set():
            return
        path = self._directory / _file_name(served.sealed)
        temporary = path.with_suffix(".tmp")
        try:
            write_shard(temporary, served.sealed, samples)
            with self._lock:
                if not served.indexes.cancelled.is_set():
                    temporary.rename(path)
                    served.snapshot = path
            _sync_directory(self._directory)
        finally:
            temporary.unlink(missing_ok=True)

    def _write_index(self, served: Served | None, layer: int) -> None:
        if served is None or served.snapshot is None or served.indexes.cancelled.is_set():
            return
        index = served.indexes.serving[layer]
        if not index.format_version:
            return
        path = _index_path(served.snapshot, layer)
        temporary = path.with_suffix(".tmp")
        try:
            write_layer_index(temporary, served.sealed, layer, index, self._index_kind)
            with self._lock:
                if not served.indexes.cancelled.is_set():
                    temporary.rename(path)
            _sync_directory(self._directory)
        finally:
            temporary.unlink(missing_ok=True)


def _index_path(shard_path: Path, layer: int) -> Path:
    return shard_path.with_name(f"{shard_path.stem}.layer-{layer}{_INDEX_SUFFIX}")


def _file_name(sealed: SealedShard) -> str:
    """A name that no context or shard id can steer to another path, new for every seal."""
    digest = hashlib.blake2b(
        f"{sealed.context_id}\0{sealed.shard.shard_id}".encode(), digest_size=16
    )
    return f"{digest.hexdigest()}-{secrets.token_hex(4)}{_SUFFIX}"


def _sync_directory(directory: Path) -> None:
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
