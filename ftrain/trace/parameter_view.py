"""How a loss sees parameters: cast to the compute dtype, and on a mesh gathered from their pieces."""

from collections.abc import Callable, Sequence

from torch import Tensor

from ftrain.sharding.placement import use
from ftrain.trace.precision import compute_dtype, reduce_dtype
from ftrain.trace.spmd import current_sharded

View = Callable[[Tensor], Tensor]


def compute_views(leaves: Sequence[Tensor], *, differentiated: bool = True) -> list[View]:
    """For each leaf the function that makes of it what a loss computes with: cast to the compute dtype, and gathered.

    The function also takes tensors that stand for the leaf (detached). ValueError on a mesh for an input of the step
    that is `differentiated` and whose placement the plan does not know.
    """
    trace = current_sharded()
    for leaf in leaves if trace is not None and differentiated else ():
        trace.require_known(leaf)  # type: ignore[union-attr]
    return [_gathered(leaf) or _cast for leaf in leaves]


def materialize(leaf: Tensor) -> Tensor:
    """What a loss computes with for a tensor (any shape) that is not differentiated: gathered if it is a piece, never
    cast.
    """
    trace = current_sharded()
    if trace is None or trace.placement_of_piece(leaf) is None:
        return leaf
    view = _gathered(leaf, cast=False)
    return leaf if view is None else view(leaf)


def _cast(x: Tensor) -> Tensor:
    return x.to(compute_dtype(x))


def _gathered(leaf: Tensor, *, cast: bool = True) -> View | None:
    """None without a mesh, and for a tensor that is a rank's own: its gradient is the rank's own too."""
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
