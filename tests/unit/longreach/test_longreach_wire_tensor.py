"""Tensors on the wire: what goes in comes out, and nothing malformed comes in."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from longreach import wire
from longreach.errors import MalformedTensor
from longreach.types import BFLOAT16
from longreach.v1 import tensor_pb2

DTYPES = {
    tensor_pb2.DTYPE_F32: np.dtype("<f4"),
    tensor_pb2.DTYPE_F16: np.dtype("<f2"),
    tensor_pb2.DTYPE_BF16: BFLOAT16,
    tensor_pb2.DTYPE_I32: np.dtype("<i4"),
    tensor_pb2.DTYPE_I64: np.dtype("<i8"),
}
shapes = hnp.array_shapes(min_dims=0, max_dims=5, min_side=0, max_side=4)


def proto(dtype=tensor_pb2.DTYPE_F32, shape=(2,), data=bytes(8)):
    return tensor_pb2.Tensor(dtype=dtype, shape=shape, data=data)


@st.composite
def arrays(draw):
    dtype = draw(st.sampled_from(list(DTYPES.values())))
    shape = draw(shapes)
    size = dtype.itemsize * math.prod(shape)
    return np.frombuffer(draw(st.binary(min_size=size, max_size=size)), dtype).reshape(shape)


@given(arrays())
@settings(deadline=None)
def test_every_array_survives_the_wire_bit_for_bit(array):
    message = tensor_pb2.Tensor.FromString(wire.tensor_to_proto(array).SerializeToString())
    back = wire.tensor_from_proto(message, name="t")
    assert back.dtype == array.dtype
    assert back.shape == array.shape
    assert back.tobytes() == array.tobytes()


def test_strided_arrays_travel_in_row_major_order():
    array = np.arange(24, dtype=np.float32).reshape(2, 3, 4).transpose(2, 0, 1)[::-1]
    back = wire.tensor_from_proto(wire.tensor_to_proto(array), name="t")
    np.testing.assert_array_equal(back, array)


def test_a_decoded_tensor_is_a_read_only_view():
    back = wire.tensor_from_proto(proto(), name="t")
    assert not back.flags.writeable
    assert not back.flags.owndata


@given(
    dtype=st.sampled_from([*DTYPES, 0, 6, 99]),
    shape=st.lists(st.integers(0, 2**32 - 1), max_size=10),
    data=st.binary(max_size=64),
)
@settings(deadline=None)
def test_bytes_that_do_not_fit_dtype_and_shape_are_refused(dtype, shape, data):
    fits = (
        dtype in DTYPES
        and len(shape) <= 8
        and len(data) == math.prod(shape) * DTYPES[dtype].itemsize
    )
    if fits:
        assert wire.tensor_from_proto(proto(dtype, shape, data), name="t").shape == tuple(shape)
    else:
        with pytest.raises(MalformedTensor, match=r"^t: "):
            wire.tensor_from_proto(proto(dtype, shape, data), name="t")


def test_a_shape_whose_product_overflows_64_bits_is_refused_before_allocating():
    with pytest.raises(MalformedTensor, match="8 bytes for shape"):
        wire.tensor_from_proto(proto(shape=[2**32 - 1] * 8), name="t")


def test_unexpected_shapes_and_dtypes_are_named():
    with pytest.raises(MalformedTensor, match=r"queries: shape \[2\], expected \[any, 128\]"):
        wire.tensor_from_proto(proto(), name="queries", shape=(None, 128))
    with pytest.raises(MalformedTensor, match=r"shape \[2\], expected \[3\]"):
        wire.tensor_from_proto(proto(), name="t", shape=(3,))
    with pytest.raises(MalformedTensor, match="dtype float32, expected int32"):
        wire.tensor_from_proto(proto(), name="t", dtype=np.int32)
    with pytest.raises(MalformedTensor, match="expected float16 or bfloat16"):
        wire.tensor_from_proto(proto(), name="t", dtype=(np.dtype("<f2"), BFLOAT16))
    assert wire.tensor_from_proto(proto(), name="t", shape=(None,), dtype=np.float32).shape == (2,)


@pytest.mark.parametrize("dtype", [np.float32, np.float16, BFLOAT16])
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_nan_and_infinity_are_refused_where_elements_must_be_finite(dtype, bad):
    array = np.ones((3, 4), dtype)
    largest = np.finfo(np.float16).max if dtype == np.float16 else 3e38
    array[0, 0] = largest
    array[1, 1] = -largest
    message = wire.tensor_to_proto(array)
    wire.tensor_from_proto(message, name="t", finite=True)
    array[2, 1] = bad
    message = wire.tensor_to_proto(array)
    wire.tensor_from_proto(message, name="t")
    with pytest.raises(MalformedTensor, match=r"NaN or infinity at \[2, 1\]"):
        wire.tensor_from_proto(message, name="t", finite=True)


def test_arrays_the_wire_has_no_dtype_for_are_refused_by_name():
    with pytest.raises(MalformedTensor, match="float64 cannot be sent"):
        wire.tensor_to_proto(np.zeros(3))
