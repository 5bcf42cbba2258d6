"""The parameters that a loss computes with: cast to the compute dtype, and on a mesh gathered from their pieces."""

from collections.abc import Callable, Sequence

from torch import Tensor

from ftrain.sharding.placement import use
from ftrain.trace.precision import compute_dtype, reduce_dtype
from ftrain.trace.spmd import current_sharded

View = Callable[[Tensor], Tensor]
"""From a leaf, or a tensor in its place, to the tensor that a loss computes with."""


def compute_views(leaves: Sequence[Tensor], *, differentiated: bool = True) -> list[View]:
    """For each leaf, of any shape, the function that casts it to the compute dtype and, on a mesh, gathers it.

    The function also takes a tensor in place of the leaf, e.g. its detached copy. ValueError on a mesh, if the leaves
    are `differentiated`, for an input of the step whose placement the plan does not know.
    """
    trace = current_sharded()
    for leaf in leaves if trace is not None and differentiated else ():
        trace.require_known(leaf)  # type: ignore[union-attr]
    return [_gathered(leaf) or _cast for leaf in leaves]


def materialize(leaf: Tensor) -> Tensor:
    """The tensor that a loss computes with for a leaf, of any shape, that is not differentiated.

    It is gathered if it is a piece of an array, and never cast.
    """
    trace = current_sharded()
    if trace is None or trace.placement_of_piece(leaf) is None:
        return leaf
    view = _gathered(leaf, cast=False)
    return leaf if view is None else view(leaf)


def _cast(x: Tensor) -> Tensor:
    return x.to(compute_dtype(x))


def _gathered(leaf: Tensor, *, cast: bool = True) -> View | None:
    """The view that gathers a piece; None without a mesh, and for a tensor that only this rank has."""
    trace = current_sharded()
    found = None if trace is None else trace.array_of(leaf)
    if trace is None or found is None:
        return None
    path, placement = found

    def view(x: Tensor) -> Tensor:
        dtype = compute_dtype(x) if cast else None
        whole = use(x, placement, trace.plan.mesh, dtype=dtype, reduce=reduce_dtype())
        trace.note_use(whole, path, placement)
        return whole

    return view
