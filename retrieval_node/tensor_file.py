"""Tensors in a safetensors file, written and read array by array without a second copy in memory.

The format (https://github.com/huggingface/safetensors): eight bytes with the length of a JSON
header, the header, then the arrays' bytes. The safetensors package can read these files; its own
writer wants every array as a bytes object first, which would double the memory of a large shard.
"""

from __future__ import annotations

import json
import math
import os
import struct
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import numpy.typing as npt

from longreach.types import BFLOAT16
from retrieval_node.aligned import aligned_empty
from retrieval_node.integrity import raw_bytes

_CODES: dict[np.dtype[Any], str] = {
    np.dtype(np.float32): "F32",
    np.dtype(np.float16): "F16",
    BFLOAT16: "BF16",
    np.dtype(np.int32): "I32",
    np.dtype(np.int64): "I64",
    np.dtype(np.uint8): "U8",
    np.dtype(np.uint16): "U16",
}
_DTYPES = {code: dtype for dtype, code in _CODES.items()}
_LENGTH = struct.Struct("<Q")
_MAX_HEADER_BYTES = 100_000_000
_DAMAGE = (ValueError, LookupError, TypeError, AttributeError, OverflowError, RecursionError)
"""What reading a header that holds anything at all may raise."""


class BrokenFileError(Exception):
    """The file is not what was written: cut short, or changed since."""


def write_tensors(
    path: Path, tensors: Mapping[str, npt.NDArray[Any]], metadata: Mapping[str, str]
) -> None:
    """Writes a new file and waits until the disk has it."""
    header: dict[str, Any] = {"__metadata__": dict(metadata)}
    offset = 0
    for name, array in tensors.items():
        header[name] = {
            "dtype": _CODES[array.dtype],
            "shape": list(array.shape),
            "data_offsets": [offset, offset + array.nbytes],
        }
        offset += array.nbytes
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % _LENGTH.size)
    with open(path, "xb") as file:
        file.write(_LENGTH.pack(len(text)) + text)
        for array in tensors.values():
            file.write(raw_bytes(array).data)
        file.flush()
        os.fsync(file.fileno())


class TensorFile:
    """A file open for reading. Raises BrokenFileError where it is not whole."""

    def __init__(self, path: Path) -> None:
        self._file = open(path, "rb", buffering=0)  # noqa: SIM115 (closed by __exit__)
        try:
            self._read_header(path.stat().st_size)
        except BaseException:
            self._file.close()
            raise

    def __enter__(self) -> TensorFile:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._file.close()

    def read(self, name: str) -> npt.NDArray[Any]:
        """A tensor in an array of its own."""
        entry = self._entry(name)
        array = aligned_empty(entry["shape"], _DTYPES[entry["dtype"]])
        self.read_into(name, array)
        return array

    def read_into(self, name: str, array: npt.NDArray[Any]) -> None:
        """Fills a contiguous array of the tensor's shape and dtype."""
        entry = self._entry(name)
        if (list(array.shape), _CODES[array.dtype]) != (entry["shape"], entry["dtype"]):
            raise BrokenFileError(
                f"tensor {name!r} is {entry['dtype']} {entry['shape']}, not {array.dtype} "
                f"{list(array.shape)}"
            )
        target = array.view(np.uint8).reshape(-1).data
        self._file.seek(self._data_start + entry["data_offsets"][0])
        while len(target):
            count = self._file.readinto(target)
            if not count:
                raise BrokenFileError(f"the file ends within tensor {name!r}")
            target = target[count:]

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the tensors, in the order of the file."""
        return tuple(self._header)

    def __contains__(self, name: str) -> bool:
        return name in self._header

    def _entry(self, name: str) -> dict[str, Any]:
        if name not in self._header:
            raise BrokenFileError(f"the file has no tensor {name!r}")
        entry: dict[str, Any] = self._header[name]
        return entry

    def _read_header(self, file_bytes: int) -> None:
        prefix = self._file.read(_LENGTH.size)
        length = _LENGTH.unpack(prefix)[0] if len(prefix) == _LENGTH.size else 0
        if not 0 < length <= min(_MAX_HEADER_BYTES, file_bytes - _LENGTH.size):
            raise BrokenFileError(f"a header of {length} bytes in a file of {file_bytes}")
        try:
            header = json.loads(self._file.read(length))
            self.metadata: dict[str, str] = header.pop("__metadata__")
            self._data_start = _LENGTH.size + length
            data_bytes = max((e["data_offsets"][1] for e in header.values()), default=0)
            for entry in header.values():
                start, stop = entry["data_offsets"]
                if not 0 <= start <= stop or any(size < 0 for size in entry["shape"]):
                    raise ValueError("a tensor has a negative place or size")
                if stop - start != math.prod(entry["shape"]) * _DTYPES[entry["dtype"]].itemsize:
                    raise ValueError("shape and length of a tensor disagree")
            if not isinstance(self.metadata, dict):
                raise ValueError("its metadata are no object")
        except _DAMAGE as error:
            raise BrokenFileError(f"the header is damaged: {error!r}") from None
        if file_bytes != self._data_start + data_bytes:
            raise BrokenFileError(
                f"the file has {file_bytes} bytes; its header asks for "
                f"{self._data_start + data_bytes}"
            )
        self._header = header
