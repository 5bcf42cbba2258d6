"""The workspace of ATen's reductions on CUDA.

A reduction over rows, whose results are adjacent in memory (the gradient of a bias: a sum over tokens), is divided
among blocks of threads. Each block writes partial results to a buffer in global memory of results x blocks x threads
entries. This file repeats ATen's choice of blocks (setReduceConfig and global_memory_size in
ATen/native/cuda/Reduce.cuh, torch 2.11) for A100 and H100, which differ only in the number of multiprocessors.
Reductions along rows need only kilobytes and are left out. So are the workspaces of cuDNN and cuBLAS.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

_MAX_THREADS = 512  # of a block that reduces
_WARP = 32
_THREADS_PER_MULTIPROCESSOR = 2048
_MULTIPROCESSORS = 132  # of an H100, on a machine without a card
_FEWEST_VALUES, _MOST_VALUES = 16, 256  # values that one thread reduces
_VECTOR = 4  # results that one thread computes together


def cuda_workspace(op: torch._ops.OpOverload, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> int:
    """Bytes of workspace that `op(*args, **kwargs)` allocates on CUDA. Tensors may be fake."""
    rule = RULES.get(op._schema.name)
    return int(rule(*args, **kwargs)) if rule is not None else 0


def reduction_bytes(x: Tensor, dims: Sequence[int] | None, item: int) -> int:
    """Bytes of the buffer of a reduction of `x`, of any shape, over `dims`; 0 if it needs none.

    `dims`: None or empty for all. `item`: bytes of a partial result.
    """
    reduced = {d % x.dim() for d in dims} if dims else set(range(x.dim()))
    kept = [d for d in range(x.dim()) if d not in reduced and x.shape[d] > 1]
    inside = [d for d in reduced if x.shape[d] > 1]
    if not kept or not inside or min(x.stride(d) for d in inside) < min(x.stride(d) for d in kept):
        return 0
    values, results = (math.prod(x.shape[d] for d in some) for some in (inside, kept))
    vector = _vector(x, kept)
    width, height = _block(results // vector, values, _MAX_THREADS // vector)
    of_a_thread = values
    if of_a_thread < height * _FEWEST_VALUES and of_a_thread < _MOST_VALUES:
        return 0
    of_a_thread = -(-of_a_thread // height)
    grid = -(-(results // vector) // width)
    target = _multiprocessors() * (_THREADS_PER_MULTIPROCESSOR // (width * height))
    if of_a_thread < _MOST_VALUES or grid > target:
        return 0
    fills_the_card, with_few_values = -(-target // grid), -(-of_a_thread // _FEWEST_VALUES)
    blocks = max(min(fills_the_card, with_few_values), -(-of_a_thread // _MOST_VALUES))
    return item * results * blocks * width * vector if blocks > 1 else 0


def _vector(x: Tensor, kept: Sequence[int]) -> int:
    """How many results one thread computes together: up to 4 that divide the row of results, if that is contiguous."""
    fastest = min(kept, key=x.stride)
    if x.stride(fastest) != 1:
        return 1
    row = 1
    for d in sorted(kept, key=x.stride):
        if x.stride(d) == row:  # ATen merges dims that can be viewed as one
            row *= x.shape[d]
    return math.gcd(_VECTOR, row, *(x.stride(d) for d in range(x.dim()) if x.shape[d] > 1 and x.stride(d) > 1))


def _block(wide: int, high: int, most: int) -> tuple[int, int]:
    """The threads of a block: over results, and over values."""
    wide, high = (min(most, 1 << (max(n, 1).bit_length() - 1)) for n in (wide, high))
    height = min(high, most // min(wide, _WARP))
    return min(wide, most // height), height


def _multiprocessors() -> int:
    if not torch.cuda.is_available():
        return _MULTIPROCESSORS
    return torch.cuda.get_device_properties(torch.cuda.current_device()).multi_processor_count


def _summed(
    x: Tensor, dims: Sequence[int] | None = None, *rest: Any, dtype: torch.dtype | None = None, **_: Any
) -> int:
    """Half precision is summed in float32, integers in int64."""
    dtype = dtype or (x.dtype if x.is_floating_point() or x.is_complex() else torch.int64)
    return reduction_bytes(x, dims, max(4, dtype.itemsize))


def _norm(x: Tensor, order: float = 2, dims: Sequence[int] | None = None, *rest: Any, **_: Any) -> int:
    return reduction_bytes(x, dims, max(4, x.dtype.itemsize))


def _extreme(x: Tensor, dims: Sequence[int] | None = None, *rest: Any, **_: Any) -> int:
    return reduction_bytes(x, dims, x.dtype.itemsize)


# By the name of an op, the function from its arguments to the bytes of its workspace.
RULES: Mapping[str, Callable[..., int]] = {
    "aten::sum": _summed,
    "aten::mean": _summed,
    "aten::linalg_vector_norm": _norm,
    "aten::amax": _extreme,
    "aten::amin": _extreme,
}
