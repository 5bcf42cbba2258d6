"""The parameters that a loss computes with: cast to the compute dtype, and on a mesh gathered from their pieces."""

from collections.abc import Callable, Sequence
from functools import partial

from torch import Tensor

from ftrain.sharding.placement import use
from ftrain.trace.precision import compute_dtype, reduce_dtype
from ftrain.trace.provenance import current_provenance
from ftrain.trace.spmd import batch_sum, current_sharded

View = Callable[[Tensor], Tensor]
"""From a leaf, or a tensor in its place, to the tensor that a loss computes with."""


def compute_views(
    leaves: Sequence[Tensor], paths: Sequence[str], *, differentiated: bool = True, inner: bool = False
) -> list[View]:
    """For each leaf, of any shape, the function that casts it to the compute dtype and, on a mesh, gathers it.

    `paths`: of the leaves in the tree that the loss takes. The function also takes a tensor in place of the leaf, e.g.
    its detached copy. `inner`: within another loss, where what all ranks have is used as it is, and
    `sum_inner_gradients` sums its gradients. ValueError on a mesh, if the leaves are `differentiated`, for an input of
    the step whose placement the plan does not know.
    """
    trace = current_sharded()
    for leaf in leaves if trace is not None and differentiated else ():
        trace.require_known(leaf)  # type: ignore[union-attr]
    return [
        partial(_cast, path=path) if inner and _is_shared(leaf) else _gathered(leaf, path) or partial(_cast, path=path)
        for leaf, path in zip(leaves, paths, strict=True)
    ]


def sum_inner_gradients(leaves: Sequence[Tensor], gradients: Sequence[Tensor]) -> list[Tensor]:
    """The gradients (of the leaves' shapes) that a loss takes within itself, of the whole batch.

    A rank has its rows' part of the gradient of what all ranks share: the parts are summed, and each rank goes on with
    the sum. What is a rank's own, such as rows of the batch, has its own gradient.
    """
    trace = current_sharded()
    if trace is None or trace.plan.mesh.size == 1:
        return list(gradients)
    mesh = trace.plan.mesh
    return [batch_sum(g, mesh) if _is_shared(leaf) else g for leaf, g in zip(leaves, gradients, strict=True)]


def _is_shared(leaf: Tensor) -> bool:
    """True for what is whole and equal on every rank."""
    trace = current_sharded()
    found = None if trace is None else trace.array_of(leaf)
    return found is not None and not found[1].splits


def materialize(leaf: Tensor) -> Tensor:
    """The tensor that a loss computes with for a leaf, of any shape, that is not differentiated.

    It is gathered if it is a piece of an array, and never cast.
    """
    trace = current_sharded()
    if trace is None or trace.placement_of_piece(leaf) is None:
        return leaf
    view = _gathered(leaf)
    return leaf if view is None else view(leaf)


def _cast(x: Tensor, *, path: str) -> Tensor:
    return _noted(x.to(compute_dtype(x, path)), x, path)


def _noted(copy: Tensor, x: Tensor, path: str) -> Tensor:
    """`copy`, of the parameter `x` at `path`, into which the loss may not write if it is another tensor."""
    provenance = current_provenance()
    if copy is not x and provenance is not None:
        provenance.note_copy(copy, path)
    return copy


def _gathered(leaf: Tensor, cast_at: str | None = None) -> View | None:
    """The view that gathers a piece; None without a mesh, and for a tensor that only this rank has.

    `cast_at`: the path by which it is cast; None for no cast.
    """
    trace = current_sharded()
    found = None if trace is None else trace.array_of(leaf)
    if trace is None or found is None:
        return None
    path, placement = found

    def view(x: Tensor) -> Tensor:
        dtype = None if cast_at is None else compute_dtype(x, cast_at)
        whole = use(x, placement, trace.plan.mesh, dtype=dtype, reduce=reduce_dtype())
        trace.note_use(whole, path, placement)
        return _noted(whole, x, path)

    return view
