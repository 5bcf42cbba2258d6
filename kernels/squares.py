"""Questions about all gradients at once, each one node of a graph: sums of squares for a global norm, and extremes."""

from collections.abc import Callable, Sequence
from functools import reduce

import torch
from torch import Tensor

from ftrain.kernels.backend import choose_backend
from ftrain.kernels.opaque import opaque_op

LONGEST_RUN = 2**16  # a float32 running sum of more equal terms than this loses its third digit

_BACKENDS = {"cpu": "loop"}  # elsewhere compilers fuse the plain form


def sums_of_squares(xs: Sequence[Tensor], dtype: torch.dtype, *, backend: str = "auto") -> Tensor:
    """`[N]` in `dtype` (floating): the sum of all squares of each of the N >= 1 tensors, summed in at least float32.

    - `xs`: floating tensors of any shapes on one device.
    - `backend`: "auto", "reference" (plain torch) or "loop" (one op for all tensors, CPU). "loop" sums in float64 where
      the squares exceed float32; the plain form is infinite there, from elements of 1.8e19 on.

    "loop" is not differentiable: "auto" takes the plain form where a tensor requires a gradient, and off the CPU.
    ValueError for another backend.

    >>> import torch
    >>> from ftrain.kernels.squares import sums_of_squares
    >>> sums_of_squares([torch.ones(3), torch.full((2, 2), 2.0)], torch.float32)
    tensor([ 3.0000, 16.0000])
    """
    frozen = not torch.is_grad_enabled() or not any(x.requires_grad for x in xs)
    if choose_backend(backend, xs[0].device, _BACKENDS if frozen else {}) == "reference":
        return sums_of_squares_reference(xs, dtype)
    return sums_of_squares_loop(list(xs), dtype)


def sums_of_squares_reference(xs: Sequence[Tensor], dtype: torch.dtype) -> Tensor:
    """The definition of `sums_of_squares`: `[N]` in `dtype`, in plain torch."""
    return torch.stack([sum_of_squares(x).to(dtype) for x in xs])


@opaque_op(
    "sums_of_squares(Tensor[] xs, ScalarType dtype) -> Tensor",
    fake=lambda xs, dtype: xs[0].new_empty(len(xs), dtype=dtype),
)
def sums_of_squares_loop(xs: list[Tensor], dtype: torch.dtype) -> Tensor:
    """`sums_of_squares` as one op: `[N]` in `dtype`, one tensor of `xs` after the other.

    One whose squares exceed float32 is summed again in float64.
    """
    sums_N = sums_of_squares_reference(xs, dtype)
    for n in (~sums_N.isfinite()).nonzero().flatten().tolist():
        parts = xs[n].detach().reshape(-1).split(LONGEST_RUN)
        sums_N[n] = sum(part.double().square().sum() for part in parts)
    return sums_N


def sum_of_squares(x: Tensor) -> Tensor:
    """The sum of all squares of a tensor of any shape: 0-d, at least float32, in one pass where that is exact enough.

    `vector_norm` reads once but keeps one running sum per lane (2% low for 1e8 equal float32), so it only runs along a
    contiguous dim of moderate length; `sum` adds pairwise.
    """
    dtype = torch.promote_types(x.dtype, torch.float32)
    along = _dim_to_run_along(x)
    if along is not None:
        return torch.linalg.vector_norm(x, dim=along, dtype=dtype).square().sum()
    x = x.to(dtype)
    return (x * x).sum()


def _dim_to_run_along(x: Tensor) -> int | None:
    along = min(range(x.ndim), key=x.stride, default=None)
    if along is not None and 0 < x.shape[along] <= LONGEST_RUN and x.stride(along) == 1:
        return along
    return None


def extremes(xs: Sequence[Tensor], *, backend: str = "auto") -> Tensor:
    """`[N, 2]`: the smallest and the largest number of each of the N >= 1 tensors, NaN where one holds a NaN.

    `xs`: tensors of any shapes, none empty, on one device; the result has their widest dtype. `backend`: as in
    `sums_of_squares`. "loop" is not differentiable: "auto" takes the plain form where a tensor requires a gradient, and
    off the CPU. ValueError for another backend.

    >>> import torch
    >>> from ftrain.kernels.squares import extremes
    >>> extremes([torch.tensor([3.0, -1.0]), torch.tensor([5.0])])
    tensor([[-1.,  3.],
            [ 5.,  5.]])
    """
    frozen = not torch.is_grad_enabled() or not any(x.requires_grad for x in xs)
    if choose_backend(backend, xs[0].device, _BACKENDS if frozen else {}) == "reference":
        return extremes_reference(xs)
    return extremes_loop(list(xs))


def extremes_reference(xs: Sequence[Tensor]) -> Tensor:
    """The definition of `extremes`: `[N, 2]`, in plain torch."""
    wide = _widest(xs)
    return torch.stack([torch.stack(torch.aminmax(x)).to(wide) for x in xs])


@opaque_op(
    "extremes(Tensor[] xs) -> Tensor",
    fake=lambda xs: xs[0].new_empty((len(xs), 2), dtype=_widest(xs)),
)
def extremes_loop(xs: list[Tensor]) -> Tensor:
    """`extremes` as one op: `[N, 2]` in the widest dtype of `xs`, one tensor after the other."""
    return extremes_reference(xs)


def _widest(xs: Sequence[Tensor]) -> torch.dtype:
    return reduce(torch.promote_types, (x.dtype for x in xs))


def _workspace(xs: list[Tensor], dtype: torch.dtype) -> int:
    """Of one tensor at a time: the norms of its rows and their squares, or the tensor and its square."""
    return max((_workspace_of(x) for x in xs), default=0)


def _workspace_of(x: Tensor) -> int:
    along, item = _dim_to_run_along(x), torch.promote_types(x.dtype, torch.float32).itemsize
    converted = x.numel() * item if x.element_size() < item else 0
    if along is None:
        return x.numel() * item + converted
    return converted + 2 * item * (x.numel() // x.shape[along])


WORKSPACE: dict[str, Callable[..., int]] = {"ftrain::sums_of_squares": _workspace, "ftrain::extremes": lambda xs: 0}
"""Op name to peak bytes beyond the op's outputs, from its arguments."""
