"""Index files: named arrays of one index, versioned and checksummed.

A file is a safetensors container whose metadata name the index kind, the format version of that
kind, facts the loader compares with the keys at hand, and a CRC-32 of every array. Whatever is
wrong with a file, loading it raises FailedPrecondition and nothing else, so that a node can build
the index anew.
"""

from __future__ import annotations

import os
import tempfile
import zlib
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from longreach.errors import FailedPrecondition
from longreach.types import StorageArray
from retrieval_node.index.base import LayerKv

CORRUPT = "CORRUPT_INDEX"
"""`reason` of the error when a file is damaged or is not an index file."""
OTHER = "OTHER_INDEX"
"""`reason` of the error when a file is sound but of another kind, version or context."""

FINGERPRINT_ROWS = 4096
"""Keys of each head that a fingerprint covers, evenly spaced."""


def fingerprint(kv: LayerKv) -> dict[str, str]:
    """Facts that tell one layer's keys from another's: shape, dtype, start and a checksum."""
    step = max(1, len(kv.positions) // FINGERPRINT_ROWS)
    return {
        "keys": "x".join(str(size) for size in kv.keys.shape),
        "dtype": str(kv.keys.dtype),
        "start": str(kv.start),
        "keys_crc32": _crc32(np.ascontiguousarray(kv.keys[:, ::step])),
    }


def save_index(
    path: Path, kind: str, version: int, facts: Mapping[str, str], arrays: Mapping[str, np.ndarray]
) -> None:
    """Write an index file; readers see the whole file or none of it."""
    metadata = {f"fact.{name}": value for name, value in facts.items()}
    metadata |= {f"crc32.{name}": _crc32(array) for name, array in arrays.items()}
    metadata |= {"kind": kind, "version": str(version)}
    contiguous = {name: np.ascontiguousarray(array) for name, array in arrays.items()}
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=path.name, suffix=".partial")
    os.close(handle)
    try:
        save_file(contiguous, temporary, metadata)
        with open(temporary, "rb") as written:
            os.fsync(written.fileno())
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


def load_index(
    path: Path, kind: str, version: int, facts: Mapping[str, str]
) -> dict[str, np.ndarray]:
    """The arrays of an index file, read-only.

    Raises FailedPrecondition with reason CORRUPT when the file is damaged, and OTHER when it is of
    another kind, version, or has other facts than expected.
    """
    try:
        with safe_open(str(path), framework="np") as file:
            metadata = file.metadata() or {}
            _expect(path, metadata, kind, version, facts)
            arrays = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except FailedPrecondition:
        raise
    except (SafetensorError, OSError, ValueError, TypeError, KeyError, MemoryError) as error:
        raise FailedPrecondition(
            f"{path} is not a readable index file ({error}); delete it and build the index again",
            reason=CORRUPT,
        ) from error
    for name, array in arrays.items():
        if metadata.get(f"crc32.{name}") != _crc32(array):
            raise FailedPrecondition(
                f"{path}: array {name!r} does not have the checksum it was written with; "
                "delete the file and build the index again",
                reason=CORRUPT,
            )
        array.flags.writeable = False
    return arrays


def _expect(
    path: Path, metadata: Mapping[str, str], kind: str, version: int, facts: Mapping[str, str]
) -> None:
    expected = {"kind": kind, "version": str(version)}
    expected |= {f"fact.{name}": value for name, value in facts.items()}
    for name, value in expected.items():
        if metadata.get(name) != value:
            raise FailedPrecondition(
                f"{path}: {name} is {metadata.get(name)!r} and {value!r} is needed; "
                "build the index again",
                reason=OTHER,
            )


def _crc32(array: StorageArray) -> str:
    """CRC-32 over shape, dtype and bytes, so that none of them can be swapped unnoticed."""
    contiguous = np.ascontiguousarray(array)
    head = zlib.crc32(f"{contiguous.dtype.str} {contiguous.shape}".encode())
    return f"{zlib.crc32(contiguous.view(np.uint8).data, head):08x}"
