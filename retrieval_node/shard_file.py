"""The files of a snapshot: one for the K and V of a shard, one for the index of each of its layers.

docs/formats.md describes both.
"""

from __future__ import annotations

import dataclasses
import json
import zlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from longreach.errors import LongreachError
from longreach.types import Identity, LayerGeometry, QuerySample, Shard, Span, storage_dtype
from retrieval_node.index.base import Index
from retrieval_node.index.persistence import read_index, write_index
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

_FORMAT = "longreach-shard-1"


@dataclass(frozen=True, slots=True)
class LoadedIndex:
    """A layer's index read from disk, with the memory it was given."""

    index: Index
    reservation: Reservation


@dataclass(frozen=True, slots=True)
class LoadedShard:
    """A shard read from disk with the indexes of its layers, and the memory it was given."""

    sealed: SealedShard
    samples: Mapping[int, QuerySample]
    reservation: Reservation
    samples_reservation: Reservation
    path: Path
    indexes: Mapping[int, LoadedIndex] = dataclasses.field(default_factory=dict)

    def release(self) -> None:
        """Gives the memory back of a shard that is not served after all."""
        self.reservation.release()
        self.samples_reservation.release()
        for each in self.indexes.values():
            each.reservation.release()


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


def read_samples(path: Path) -> dict[int, QuerySample]:
    """The query samples of a shard's file, by layer; raises BrokenFileError."""
    with TensorFile(path) as file:
        return _read_description(file)[2]


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


def write_layer_index(
    path: Path, sealed: SealedShard, layer: int, index: Index, target_kind: str
) -> None:
    """Writes the index of a layer to a new file, bound to the checksum of the shard."""
    write_index(path, index, sealed.layers[layer], target_kind, _binding(sealed, layer))


def read_layer_index(
    path: Path, sealed: SealedShard, layer: int, target_kind: str, memory: MemoryBudget
) -> LoadedIndex:
    """Reads the index of a layer; its memory is reserved before it is allocated.

    Raises FailedPrecondition when the file is not a sound index of exactly this shard and of the
    kind wanted, ResourceExhausted.
    """
    reservation = memory.reserve(Use.INDEX, path.stat().st_size, f"index file {path.name}")
    try:
        index = read_index(path, sealed.layers[layer], target_kind, _binding(sealed, layer))
        # Some kinds hold more in memory than in their file.
        reservation.grow(max(0, index.index_bytes - reservation.nbytes))
    except BaseException:
        reservation.release()
        raise
    return LoadedIndex(index, reservation)


def _binding(sealed: SealedShard, layer: int) -> dict[str, str]:
    """What an index belongs to: a layer of the K and V whose checksum was taken at the seal."""
    return {"shard_crc32": f"{sealed.checksum:08x}", "layer": str(layer)}
