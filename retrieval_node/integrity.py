"""Whether stored bytes are what they should be: finite, equal, and unchanged since the seal."""

from __future__ import annotations

import functools
import zlib
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from longreach.types import BFLOAT16, StorageArray

if TYPE_CHECKING:  # The index kinds write files, and files need this module.
    from retrieval_node.index.base import LayerKv

_EXPONENT_BITS: dict[np.dtype[Any], int] = {np.dtype(np.float16): 0x7C00, BFLOAT16: 0x7F80}
_POLYNOMIAL = 0xEDB88320
_ONE = 1 << 31
_CHECKSUM_THREADS = 4


def kv_checksum(layers: Iterable[LayerKv]) -> int:
    """CRC-32 of the bytes of K then V of each head, layer by layer.

    Heads are summed in parallel and joined: the sum of many gigabytes keeps a Seal waiting.
    """
    arrays = [a for kv in layers for head in zip(kv.keys, kv.values, strict=True) for a in head]
    with ThreadPoolExecutor(_CHECKSUM_THREADS) as pool:
        crcs = pool.map(lambda array: zlib.crc32(raw_bytes(array).data), arrays)
        joined = 0
        for array, crc in zip(arrays, crcs, strict=True):
            joined = _product(_shift(array.nbytes), joined) ^ crc
    return joined


@functools.cache
def _shift(nbytes: int) -> int:
    """What a CRC is multiplied by when `nbytes` follow: x^(8 nbytes) modulo the polynomial."""
    result, square = _ONE, _ONE >> 8
    while nbytes:
        if nbytes & 1:
            result = _product(square, result)
        square = _product(square, square)
        nbytes >>= 1
    return result


def _product(one: int, other: int) -> int:
    """Product of two polynomials over GF(2) modulo CRC-32's, highest power in the lowest bit."""
    product = 0
    bit = _ONE
    while bit:
        if one & bit:
            product ^= other
        other = other >> 1 ^ (_POLYNOMIAL if other & 1 else 0)
        bit >>= 1
    return product


def raw_bytes(array: StorageArray) -> npt.NDArray[np.uint8]:
    """The bytes of an array; a view where the array is contiguous."""
    return np.ascontiguousarray(array).view(np.uint8)


def same_bytes(one: StorageArray, other: StorageArray) -> bool:
    """Whether two arrays of one dtype hold the same bits."""
    return bool(np.array_equal(raw_bytes(one), raw_bytes(other)))


def is_finite(array: StorageArray) -> npt.NDArray[np.bool_]:
    """Where a storage array is neither NaN nor infinite, without a float32 copy of 16-bit data."""
    exponent = _EXPONENT_BITS.get(array.dtype)
    if exponent is None:
        return np.asarray(np.isfinite(array.astype(np.float32, copy=False)))
    bits = np.ascontiguousarray(array).view(np.uint16)
    return np.asarray((bits & exponent) != exponent)
