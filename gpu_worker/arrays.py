"""Tensors of torch as arrays of NumPy and back, without losing bfloat16.

Neither library knows the other's bfloat16, so those go through their 16-bit pattern.
"""

from __future__ import annotations

import numpy as np
import torch

from longreach.types import BFLOAT16, StorageArray

_DTYPES: dict[str, torch.dtype] = {
    "float32": torch.float32,
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
}


def torch_dtype(name: str) -> torch.dtype:
    """The torch dtype of a storage dtype's name: "float32", "float16" or "bfloat16"."""
    return _DTYPES[name]


def dtype_name(dtype: torch.dtype) -> str:
    """The storage dtype's name, for example "bfloat16"."""
    return str(dtype).removeprefix("torch.")


def to_array(tensor: torch.Tensor) -> StorageArray:
    """A C-ordered array on the CPU; shares memory with a contiguous CPU tensor."""
    tensor = tensor.detach().to("cpu").contiguous()
    if tensor.dtype is torch.bfloat16:
        return np.asarray(tensor.view(torch.int16).numpy().view(BFLOAT16))
    return np.asarray(tensor.numpy())


def to_tensor(array: StorageArray, device: torch.device | None = None) -> torch.Tensor:
    """A tensor that shares the array's memory where the device is the CPU.

    Read-only arrays are copied, because torch has no read-only tensors.
    """
    if not (array.flags.writeable and array.flags.c_contiguous):
        array = np.array(array, order="C")
    if array.dtype == BFLOAT16:
        tensor = torch.from_numpy(array.view(np.int16)).view(torch.bfloat16)
    else:
        tensor = torch.from_numpy(array)
    return tensor if device is None else tensor.to(device)
