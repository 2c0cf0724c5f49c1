"""Sealed shards on the node's disk, so that a restarted node serves them again.

A shard is one file, written under a temporary name, synced and renamed: under its own name it is
whole. Loading reads into memory and checks the checksum made at the seal, so the token path never
waits for the disk and damaged data is never served. Tails are not snapshotted; they live in memory.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import logging
import os
import queue
import secrets
import threading
import weakref
import zlib
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from longreach.errors import LongreachError, ResourceExhausted
from longreach.types import Identity, LayerGeometry, QuerySample, Shard, Span, storage_dtype
from retrieval_node.background import lower_priority
from retrieval_node.contexts import Served
from retrieval_node.integrity import raw_bytes
from retrieval_node.memory import MemoryBudget, Reservation, Use
from retrieval_node.shard import (
    SealedShard,
    allocate_layers,
    check_geometry,
    sealed_shard,
    shard_bytes,
)
from retrieval_node.tensor_file import BrokenFileError, TensorFile, write_tensors

_LOG = logging.getLogger(__name__)
_FORMAT = "longreach-shard-1"
_SUFFIX = ".safetensors"
_LOADERS = 4
_CLOSE_TIMEOUT_S = 20.0


@dataclass(frozen=True, slots=True)
class LoadedShard:
    """A shard read from disk, with the memory it was given."""

    sealed: SealedShard
    samples: Mapping[int, QuerySample]
    reservation: Reservation
    samples_reservation: Reservation
    path: Path


class Snapshots:
    """The snapshot directory and the thread that writes to it."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        directory.mkdir(parents=True, exist_ok=True)
        for left in directory.glob("*.tmp"):
            left.unlink()
        self._lock = threading.Lock()
        self._jobs: queue.SimpleQueue[tuple[weakref.ref[Served], Mapping[int, QuerySample]] | None]
        self._jobs = queue.SimpleQueue()
        self._unfinished = 0
        self._idle = threading.Condition()
        self._thread = threading.Thread(target=self._work, name="snapshots", daemon=True)
        self._thread.start()

    def save(self, served: Served, samples: Mapping[int, QuerySample]) -> None:
        """Queues a shard for writing; `served.snapshot` names the file once it is on disk."""
        with self._idle:
            self._unfinished += 1
        self._jobs.put((weakref.ref(served), samples))

    def remove(self, served: Served) -> None:
        """Deletes the file of a shard whose indexes were released; a late write is deleted too."""
        with self._lock:
            if served.snapshot is not None:
                served.snapshot.unlink(missing_ok=True)
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
            return sum(pool.map(lambda path: self._load_one(path, memory, serve), paths))

    def _load_one(
        self, path: Path, memory: MemoryBudget, serve: Callable[[LoadedShard], None]
    ) -> bool:
        try:
            loaded = read_shard(path, memory)
        except BrokenFileError as error:
            aside = path.with_suffix(".corrupt")
            path.rename(aside)
            _LOG.error("snapshot %s is damaged and was renamed to %s: %s", path, aside.name, error)
            return False
        except (OSError, ResourceExhausted) as error:
            _LOG.error("snapshot %s was not loaded: %s", path, error)
            return False
        try:
            serve(loaded)
        except LongreachError as error:
            loaded.reservation.release()
            loaded.samples_reservation.release()
            _LOG.error("snapshot %s is not served: %s", path, error.message)
            return False
        return True

    def _work(self) -> None:
        lower_priority()
        while self._work_once():
            pass

    def _work_once(self) -> bool:
        """Writes the next shard, if it still is; keeps nothing of it, so that a drop frees it."""
        job = self._jobs.get()
        if job is None:
            return False
        try:
            served = job[0]()
            if served is not None and not served.indexes.cancelled.is_set():
                self._write(served, job[1])
        except OSError as error:
            _LOG.error("a shard was not written to %s: %s", self._directory, error)
        finally:
            with self._idle:
                self._unfinished -= 1
                self._idle.notify_all()
        return True

    def _write(self, served: Served, samples: Mapping[int, QuerySample]) -> None:
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


def write_shard(path: Path, sealed: SealedShard, samples: Mapping[int, QuerySample]) -> None:
    """Writes a shard to a new file and waits until the disk has it."""
    extras: dict[str, npt.NDArray[Any]] = {"token_ids": sealed.token_ids}
    for layer, sample in samples.items():
        extras[f"sample.{layer}.positions"] = sample.positions
        extras[f"sample.{layer}.queries"] = sample.queries
    tensors = dict(extras)
    for layer, kv in sealed.layers.items():
        tensors[f"keys.{layer}"] = kv.keys
        tensors[f"values.{layer}"] = kv.values
    description = json.dumps(
        {
            "context_id": sealed.context_id,
            "shard": dataclasses.asdict(sealed.shard),
            "identity": dataclasses.asdict(sealed.identity),
            "geometry": [dataclasses.asdict(each) for each in sealed.geometry.values()],
            "sampled_layers": sorted(samples),
            "kv_crc32": sealed.checksum,
        }
    )
    crc = _description_crc(description, extras.values())
    metadata = {"format": _FORMAT, "description": description, "description_crc32": str(crc)}
    write_tensors(path, tensors, metadata)


def read_shard(path: Path, memory: MemoryBudget) -> LoadedShard:
    """Reads a shard; its memory is reserved before it is allocated.

    Raises BrokenFileError when anything differs from what was written, ResourceExhausted.
    """
    with TensorFile(path) as file:
        if file.metadata.get("format") != _FORMAT:
            raise BrokenFileError(
                f"format {file.metadata.get('format')!r} instead of {_FORMAT!r}; remove the file "
                "or load it with the version that wrote it"
            )
        about, token_ids, samples = _read_description(file)
        shard, identity, geometry = about.shard, about.identity, about.geometry
        what = f"snapshot of shard {shard.shard_id!r} of context {about.context_id!r}"
        reservation = memory.reserve(
            Use.CONTEXT, shard_bytes(shard, geometry, identity.dtype), what
        )
        sample_bytes = sum(s.queries.nbytes + s.positions.nbytes for s in samples.values())
        try:
            samples_reservation = memory.reserve(Use.INDEX, sample_bytes, what)
            layers = allocate_layers(shard, geometry, storage_dtype(identity.dtype))
            for layer, kv in layers.items():
                file.read_into(f"keys.{layer}", kv.keys)
                file.read_into(f"values.{layer}", kv.values)
            sealed = sealed_shard(about.context_id, shard, identity, geometry, layers, token_ids)
            if sealed.checksum != about.checksum:
                raise BrokenFileError(
                    f"checksum of K and V is {sealed.checksum:08x}; it was {about.checksum:08x} at "
                    "the seal"
                )
        except BaseException:
            reservation.release()
            raise
    return LoadedShard(sealed, samples, reservation, samples_reservation, path)


@dataclass(frozen=True, slots=True)
class _Description:
    context_id: str
    shard: Shard
    identity: Identity
    geometry: Mapping[int, LayerGeometry]
    checksum: int


def _read_description(
    file: TensorFile,
) -> tuple[_Description, npt.NDArray[np.int32], dict[int, QuerySample]]:
    """What the file says about itself, once its own checksum agrees."""
    try:
        text = file.metadata["description"]
        raw = json.loads(text)
        extras = {"token_ids": file.read("token_ids")}
        for layer in raw["sampled_layers"]:
            for part in ("positions", "queries"):
                extras[f"sample.{layer}.{part}"] = file.read(f"sample.{layer}.{part}")
        if str(_description_crc(text, extras.values())) != file.metadata["description_crc32"]:
            raise BrokenFileError("the description, token ids or query samples have changed")
        shard = Shard(
            **{
                **raw["shard"],
                "span": Span(**raw["shard"]["span"]),
                "layers": tuple(raw["shard"]["layers"]),
                "node_ids": tuple(raw["shard"]["node_ids"]),
            }
        )
        geometry = check_geometry(shard, [LayerGeometry(**each) for each in raw["geometry"]])
        about = _Description(
            raw["context_id"], shard, Identity(**raw["identity"]), geometry, raw["kv_crc32"]
        )
    except (ValueError, KeyError, TypeError, LongreachError) as error:
        raise BrokenFileError(f"the description is damaged: {error}") from None
    samples = {
        layer: QuerySample(
            layer,
            shard.kv_head_start,
            extras[f"sample.{layer}.positions"],
            extras[f"sample.{layer}.queries"],
        )
        for layer in raw["sampled_layers"]
    }
    return about, extras["token_ids"], samples


def _description_crc(text: str, extras: Iterable[npt.NDArray[Any]]) -> int:
    crc = zlib.crc32(text.encode())
    for array in extras:
        crc = zlib.crc32(raw_bytes(array).data, crc)
    return crc


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
