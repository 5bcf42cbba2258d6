"""Tensors as NumPy arrays of the same memory, with tensorstore's dtypes for those that NumPy lacks."""

import numpy as np
import tensorstore as ts
import torch
from torch import Tensor

# The names of torch and zarr agree for all of these.
_NAMES = (
    *("bool", "uint8", "uint16", "uint32", "uint64", "int8", "int16", "int32", "int64"),
    *("float16", "bfloat16", "float32", "float64", "complex64", "complex128"),
    *("float8_e4m3fn", "float8_e4m3fnuz", "float8_e5m2", "float8_e5m2fnuz", "float8_e8m0fnu"),
)
DTYPES: dict[str, torch.dtype] = {name: getattr(torch, name) for name in _NAMES if hasattr(torch, name)}
_NAME_OF = {dtype: name for name, dtype in DTYPES.items()}
_BITS = {1: torch.uint8, 2: torch.int16}


def dtype_name(dtype: torch.dtype, path: str) -> str:
    """The name under which a dtype is stored; ValueError that names the leaf `path` when it cannot be."""
    if dtype not in _NAME_OF:
        known = ", ".join(DTYPES)
        raise ValueError(f"{path!r} has dtype {dtype}, which zarr cannot store: view it as uint8 (possible: {known})")
    return _NAME_OF[dtype]


def as_array(tensor: Tensor) -> np.ndarray:
    """The memory of a contiguous CPU tensor as an array of the same shape; `bfloat16` and `float8` come as ml_dtypes.

    >>> import torch
    >>> from ftrain.checkpoint.dtypes import as_array
    >>> as_array(torch.ones(2, dtype=torch.bfloat16)).dtype
    dtype(bfloat16)
    """
    target = ts.dtype(_NAME_OF[tensor.dtype]).numpy_dtype
    if target.isbuiltin == 1:
        return tensor.numpy()
    return tensor.view(_BITS[tensor.itemsize]).numpy().view(target)
