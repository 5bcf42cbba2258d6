"""What ATen's ops allocate on CUDA beyond their outputs, as far as it can matter to a peak: sums over many rows.

A reduction whose results lie side by side (the gradient of a bias: a sum over tokens) is divided among blocks of
threads, and each block leaves what it found in a buffer in global memory; ATen sizes that buffer by results x blocks x
threads. Here is its choice of blocks (setReduceConfig and global_memory_size in ATen/native/cuda/Reduce.cuh, torch
2.11), for A100 and H100, which differ in the number of multiprocessors alone. Sums along rows need kilobytes, and are
left out, as is what cuDNN and cuBLAS take, which is theirs.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

_MAX_THREADS = 512  # of a block that reduces
_WARP = 32
_THREADS_PER_MULTIPROCESSOR = 2048
_MULTIPROCESSORS = 132  # of an H100, where no card is at hand
_FEWEST_VALUES, _MOST_VALUES = 16, 256  # that one thread is given
_VECTOR = 4  # results that a thread makes at once


def cuda_workspace(op: torch._ops.OpOverload, args: tuple, kwargs: Mapping[str, Any]) -> int:
    """Bytes that `op(*args, **kwargs)` allocates for itself on CUDA; tensors may be fake."""
    rule = RULES.get(op._schema.name)
    return int(rule(*args, **kwargs)) if rule is not None else 0


def reduction_bytes(x: Tensor, dims: Sequence[int] | None, item: int) -> int:
    """The buffer of a reduction of `x` over `dims` (None or empty: all), whose partial results take `item` bytes."""
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
    """How many results a thread makes at once: as many as divide the row of results, if they lie side by side."""
    fastest = min(kept, key=x.stride)
    if x.stride(fastest) != 1:
        return 1
    row = 1
    for d in sorted(kept, key=x.stride):
        if x.stride(d) == row:  # ATen looks at dims that can be one as one
            row *= x.shape[d]
    return math.gcd(_VECTOR, row, *(x.stride(d) for d in range(x.dim()) if x.shape[d] > 1 and x.stride(d) > 1))


def _block(wide: int, high: int, most: int) -> tuple[int, int]:
    """Threads of a block over results and over values."""
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


RULES: Mapping[str, Callable[..., int]] = {
    "aten::sum": _summed,
    "aten::mean": _summed,
    "aten::linalg_vector_norm": _norm,
    "aten::amax": _extreme,
    "aten::amin": _extreme,
}
