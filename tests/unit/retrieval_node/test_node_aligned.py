"""Arrays begin at a cache line, whatever their size and type."""

from __future__ import annotations

import numpy as np
import pytest

from longreach.types import BFLOAT16
from retrieval_node.aligned import LINE_BYTES, aligned_empty


@pytest.mark.parametrize("dtype", [np.uint8, np.float16, BFLOAT16, np.float32])
@pytest.mark.parametrize("shape", [(0,), (1,), (2, 3, 5), (2, 1000, 64), (1 << 22,)])
def test_arrays_begin_at_a_line_and_hold_what_is_written(
    shape: tuple[int, ...], dtype: np.dtype[np.generic]
) -> None:
    array = aligned_empty(shape, dtype)
    assert (array.shape, array.dtype) == (shape, np.dtype(dtype))
    assert array.size == 0 or array.ctypes.data % LINE_BYTES == 0
    assert array.flags.c_contiguous
    array[...] = 1
    assert (array == 1).all()
