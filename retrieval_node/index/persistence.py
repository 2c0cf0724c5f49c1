"""Index files: the arrays of one layer's index, versioned, checksummed and bound to their keys.

docs/formats.md describes the file. Whatever is wrong with one, reading it raises FailedPrecondition
and nothing else, so that a node can build the index anew.
"""

from __future__ import annotations

import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from longreach.errors import FailedPrecondition
from retrieval_node.index.base import INDEX_KINDS, Index, LayerKv
from retrieval_node.integrity import raw_bytes
from retrieval_node.tensor_file import BrokenFileError, TensorFile, write_tensors

FORMAT = "longreach-index-2"
"""Name and version of the container; each kind has a version of its own beside it."""
CORRUPT = "CORRUPT_INDEX"
"""`reason` of the error when a file is damaged or is not an index file."""
OTHER = "OTHER_INDEX"
"""`reason` of the error when a file is sound but of another kind, version or context."""

FINGERPRINT_ROWS = 4096
"""Keys of each head that a fingerprint covers, evenly spaced."""


def write_index(
    path: Path, index: Index, kv: LayerKv, target: str, binding: Mapping[str, str]
) -> None:
    """Writes a new file and waits until the disk has it.

    `target` is the kind that was asked for: the index's own, or one that chooses, as `auto` does.
    `binding` says what else the keys belong to; `read_index` wants the same.
    """
    arrays = index.arrays()
    metadata = {f"crc32.{name}": _crc32(array) for name, array in arrays.items()}
    metadata |= _expected(kv, type(index), binding) | {"target": target}
    write_tensors(path, arrays, metadata)


def read_index(path: Path, kv: LayerKv, target: str, binding: Mapping[str, str]) -> Index:
    """The index over `kv` that was written for this target and binding.

    Raises FailedPrecondition with reason CORRUPT when the file is missing or damaged, and OTHER
    when it is of another kind or version, or over other keys.
    """
    try:
        with TensorFile(path) as file:
            kind = _kind(path, file.metadata, target)
            _check_metadata(path, file.metadata, _expected(kv, kind, binding))
            arrays = {name: _checked(file, name) for name in file.names}
        return kind.restore(kv, arrays)
    except (BrokenFileError, OSError, ValueError, LookupError, TypeError, MemoryError) as error:
        raise FailedPrecondition(
            f"{path} is not a sound index file ({error}); delete it and build the index again",
            reason=CORRUPT,
        ) from error


def fingerprint(kv: LayerKv) -> dict[str, str]:
    """Facts that tell one layer's keys from another's: shapes, dtype, start and a checksum."""
    step = max(1, len(kv.positions) // FINGERPRINT_ROWS)
    return {
        "keys": "x".join(str(size) for size in kv.keys.shape),
        "value_dim": str(kv.values.shape[2]),
        "dtype": str(kv.keys.dtype),
        "start": str(kv.start),
        "keys_crc32": _crc32(np.ascontiguousarray(kv.keys[:, ::step])),
    }


def _kind(path: Path, metadata: Mapping[str, str], target: str) -> type[Index]:
    """The kind of the file, when it answers for `target` and can be read."""
    _check_metadata(path, metadata, {"format": FORMAT})
    kind = metadata.get("kind", "")
    if kind not in INDEX_KINDS or target not in (kind, metadata.get("target")):
        raise FailedPrecondition(
            f"{path} holds index kind {kind!r}, built for {metadata.get('target')!r}, and "
            f"{target!r} is needed; build the index again",
            reason=OTHER,
        )
    return INDEX_KINDS[kind]


def _expected(kv: LayerKv, kind: type[Index], binding: Mapping[str, str]) -> dict[str, str]:
    facts = {f"fact.{name}": value for name, value in (fingerprint(kv) | dict(binding)).items()}
    return facts | {"format": FORMAT, "kind": kind.kind, "version": str(kind.format_version)}


def _check_metadata(path: Path, metadata: Mapping[str, str], expected: Mapping[str, str]) -> None:
    for name, value in expected.items():
        if metadata.get(name) != value:
            raise FailedPrecondition(
                f"{path}: {name} is {metadata.get(name)!r} and {value!r} is needed; "
                "build the index again",
                reason=OTHER,
            )


def _checked(file: TensorFile, name: str) -> npt.NDArray[Any]:
    """An array with the checksum it was written with, read-only."""
    array = file.read(name)
    if file.metadata.get(f"crc32.{name}") != _crc32(array):
        raise BrokenFileError(f"array {name!r} does not have the checksum it was written with")
    array.flags.writeable = False
    return array


def _crc32(array: npt.NDArray[Any]) -> str:
    """CRC-32 over dtype, shape and bytes, so that none of them can be swapped unnoticed."""
    head = zlib.crc32(f"{array.dtype.str} {array.shape}".encode())
    return f"{zlib.crc32(raw_bytes(array).data, head):08x}"
