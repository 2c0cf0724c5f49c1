"""Arrays on the wire: a dtype, a shape and raw little-endian bytes.

Decoding is a view on the message's own bytes. The claimed shape is compared with the length of
those bytes before anything else happens, so a message cannot make its receiver allocate.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from longreach.errors import MalformedTensor
from longreach.types import BFLOAT16
from longreach.v1 import tensor_pb2

MAX_AXES = 8
"""Axes a tensor may have."""

DTYPE_OF_CODE: dict[int, np.dtype[Any]] = {
    tensor_pb2.DTYPE_F32: np.dtype("<f4"),
    tensor_pb2.DTYPE_F16: np.dtype("<f2"),
    tensor_pb2.DTYPE_BF16: BFLOAT16,
    tensor_pb2.DTYPE_I32: np.dtype("<i4"),
    tensor_pb2.DTYPE_I64: np.dtype("<i8"),
}
"""NumPy dtype of each number of the proto's Dtype."""
CODE_OF_DTYPE = {dtype: code for code, dtype in DTYPE_OF_CODE.items()}
"""The other way round."""
# All exponent bits of a 16-bit or 32-bit float: set together only in NaN and the infinities.
_EXPONENT_BITS: dict[np.dtype[Any], np.unsignedinteger[Any]] = {
    np.dtype("<f4"): np.uint32(0x7F800000),
    np.dtype("<f2"): np.uint16(0x7C00),
    BFLOAT16: np.uint16(0x7F80),
}


def tensor_to_proto(array: npt.NDArray[Any]) -> tensor_pb2.Tensor:
    """The array as a message, with one copy of its elements; any strides, one of five dtypes."""
    code = CODE_OF_DTYPE.get(array.dtype)
    if code is None:
        raise MalformedTensor(
            f"arrays of dtype {array.dtype} cannot be sent; convert to one of "
            f"{', '.join(d.name for d in CODE_OF_DTYPE)}"
        )
    return tensor_pb2.Tensor(
        dtype=code,  # type: ignore[arg-type]
        shape=array.shape,
        data=array.tobytes(),
    )


def tensor_from_proto(
    msg: tensor_pb2.Tensor,
    *,
    name: str,
    shape: tuple[int | None, ...] | None = None,
    dtype: np.dtype[Any] | type[Any] | tuple[np.dtype[Any], ...] | None = None,
    finite: bool = False,
) -> npt.NDArray[Any]:
    """A read-only view of the message's elements.

    `shape` gives the extents expected, None where any will do; `dtype` one or several that are
    accepted; `finite` refuses NaN and infinity. `name` is how errors call the tensor. Raises
    MalformedTensor.
    """
    kind = DTYPE_OF_CODE.get(msg.dtype)
    if kind is None:
        raise MalformedTensor(f"{name}: dtype number {msg.dtype} is unknown; known are 1 to 5")
    extents = tuple(msg.shape)
    data = msg.data
    if len(extents) > MAX_AXES:
        raise MalformedTensor(f"{name}: {len(extents)} axes; the limit is {MAX_AXES}")
    needed = kind.itemsize
    for extent in extents:
        needed *= extent
    if len(data) != needed:
        raise MalformedTensor(
            f"{name}: {len(data)} bytes for shape {list(extents)} of {kind.name}, "
            f"which takes {needed} bytes"
        )
    if shape is not None and not _fits(extents, shape):
        wanted = ", ".join("any" if want is None else str(want) for want in shape)
        raise MalformedTensor(f"{name}: shape {list(extents)}, expected [{wanted}]")
    if dtype is not None:
        accepted = dtype if isinstance(dtype, tuple) else (np.dtype(dtype),)
        if kind not in accepted:
            wanted = " or ".join(each.name for each in accepted)
            raise MalformedTensor(f"{name}: dtype {kind.name}, expected {wanted}")
    array = np.frombuffer(data, kind).reshape(extents)
    if finite:
        _check_finite(name, array)
    return array


def _fits(extents: tuple[int, ...], shape: tuple[int | None, ...]) -> bool:
    if len(extents) != len(shape):
        return False
    for have, want in zip(extents, shape, strict=True):
        if want is not None and have != want:
            return False
    return True


def _check_finite(name: str, array: npt.NDArray[Any]) -> None:
    bits = _EXPONENT_BITS.get(array.dtype)
    if bits is None:
        return
    exponents = array.view(bits.dtype) & bits
    if exponents.size and exponents.max() == bits:
        bad = np.argwhere(exponents == bits)[0].tolist()
        raise MalformedTensor(f"{name}: NaN or infinity at {bad}; every element must be finite")
