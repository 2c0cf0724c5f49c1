"""Arrays that begin at a cache line.

NumPy puts large arrays 16 bytes past a page: each row of K or V then touches one line more than it
fills, and each load of a wide vector touches two.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

LINE_BYTES = 64


def aligned_empty(shape: Sequence[int], dtype: npt.DTypeLike) -> np.ndarray[Any, Any]:
    """Like numpy.empty; the first element lies at a multiple of LINE_BYTES."""
    kind = np.dtype(dtype)
    size = int(np.prod(shape, dtype=np.int64)) * kind.itemsize
    memory = np.empty(size + LINE_BYTES, np.uint8)
    first = -memory.ctypes.data % LINE_BYTES
    return memory[first : first + size].view(kind).reshape(shape)
