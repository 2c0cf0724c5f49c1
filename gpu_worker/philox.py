"""Philox 4x32-10, a counter-based random generator, vectorised over counters.

Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011. A counter-based generator has
no state: the number for (seed, position) is the same whatever else is drawn, before or beside it.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

UInt = npt.NDArray[np.uint64]

_ROUNDS = 10
_MULTIPLIERS = (np.uint64(0xD2511F53), np.uint64(0xCD9E8D57))
_WEYL = (np.uint64(0x9E3779B9), np.uint64(0xBB67AE85))
_LOW = np.uint64(0xFFFFFFFF)
_HALF = np.uint64(32)


def philox4x32(counter: UInt, key: UInt) -> UInt:
    """Four random words for each counter [n, 4] and key [n, 2] of 32-bit words; returns [n, 4]."""
    c0, c1, c2, c3 = (counter[:, i].astype(np.uint64) for i in range(4))
    k0, k1 = key[:, 0].astype(np.uint64), key[:, 1].astype(np.uint64)
    for _ in range(_ROUNDS):
        first, second = _MULTIPLIERS[0] * c0, _MULTIPLIERS[1] * c2
        c0, c1, c2, c3 = (
            (second >> _HALF) ^ c1 ^ k0,
            second & _LOW,
            (first >> _HALF) ^ c3 ^ k1,
            first & _LOW,
        )
        k0, k1 = (k0 + _WEYL[0]) & _LOW, (k1 + _WEYL[1]) & _LOW
    return np.stack([c0, c1, c2, c3], axis=1)


def uniform(seeds: UInt, positions: UInt) -> npt.NDArray[np.float64]:
    """One number in (0, 1) for each (seed, position) of 64 bits, with 52 random bits."""
    zero = np.zeros_like(positions)
    counter = np.stack([positions & _LOW, positions >> _HALF, zero, zero], axis=1)
    key = np.stack([seeds & _LOW, seeds >> _HALF], axis=1)
    words = philox4x32(counter, key)
    bits = (words[:, 0] << np.uint64(20)) | (words[:, 1] >> np.uint64(12))
    return (bits.astype(np.float64) + 0.5) / 2.0**52
