"""`grad` and `value_and_grad`: derivatives of losses that are scalars, `Mean`s or weighted sums of them.

They mean what `torch.func`'s mean, and compose with `torch.func.vmap`, `jvp` and each other. At the bottom of a traced
step the same numbers come from `torch.autograd.grad` on detached leaves: its backward is not itself differentiated, so
the graph holds only what a training step needs, and each of its nodes can be led back to the forward op it transposes.
"""

import functools
from collections.abc import Callable
from contextlib import nullcontext
from contextvars import ContextVar
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch._C import _functorch

from ftrain import tree
from ftrain.graph.source import user_source
from ftrain.kernels.backend import reference_kernels
from ftrain.kernels.mean import Mean, WeightedSum
from ftrain.trace.parameter_view import compute_views, materialize, sum_inner_gradients
from ftrain.trace.provenance import current_provenance
from ftrain.trace.spmd import current_sharded, ending, note_gradients

_depth: ContextVar[int] = ContextVar("ftrain_grad_depth", default=0)


class _Differentiated(NamedTuple):
    value: Tensor
    aux: Any
    grads: list[Tensor]


def grad(fn: Callable, argnums: int | tuple[int, ...] = 0, has_aux: bool = False) -> Callable:
    """The gradient of `fn` with respect to its arguments `argnums`; with `has_aux`, `(gradient, aux)`."""
    with_value = value_and_grad(fn, argnums, has_aux)

    @functools.wraps(fn)
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        value, grads = with_value(*args, **kwargs)
        return (grads, value[1]) if has_aux else grads

    return wrapped


def value_and_grad(fn: Callable, argnums: int | tuple[int, ...] = 0, has_aux: bool = False) -> Callable:
    """A function of the same arguments that returns `(value, gradient)`, or `((value, aux), gradient)`.

    `fn` returns a scalar tensor, a `Mean` or a `WeightedSum` (with `has_aux`, a pair of it and any tree of tensors);
    the value is its number. The gradient has the tree of the argument (a tuple of trees for a tuple of `argnums`);
    leaves that the loss does not use have zero gradients. Every leaf must be floating: others are a ValueError that
    names the path. For an accumulated loss (`ftrain.accumulate`) the micro-batches are run one after the other.
    """
    numbers = (argnums,) if isinstance(argnums, int) else tuple(argnums)

    @functools.wraps(fn)
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        leaves, treedef = tree.flatten([args[n] for n in numbers])
        _check_floating(args, numbers)
        inner = _depth.get() > 0
        views = compute_views(leaves, inner=inner)
        others = [arg if i in numbers else tree.map(materialize, arg) for i, arg in enumerate(args)]

        def loss_of_leaves(*new_leaves: Tensor) -> tuple[Any, Any]:
            new_args = list(others)
            shown = [view(leaf) for view, leaf in zip(views, new_leaves, strict=True)]
            for n, value in zip(numbers, tree.unflatten(treedef, shown), strict=True):
                new_args[n] = value
            out = fn(*new_args, **kwargs)
            loss, aux = out if has_aux else (out, None)
            _require_mean(loss)
            return loss, aux

        differentiate = getattr(fn, "value_and_grad", None)
        if differentiate is not None:
            result = _Differentiated(*differentiate(args, kwargs, numbers, leaves, treedef, has_aux))
        else:
            result = differentiated(loss_of_leaves, leaves)
        if inner:
            result = result._replace(grads=sum_inner_gradients(leaves, result.grads))
        note_gradients(leaves, result.grads)
        grads = tree.unflatten(treedef, result.grads)
        value = (result.value, result.aux) if has_aux else result.value
        return value, (grads[0] if isinstance(argnums, int) else tuple(grads))

    return wrapped


def forward(fn: Callable, argnums: int | tuple[int, ...] = 0) -> Callable:
    """`fn` run forward alone, with arguments as `value_and_grad` shows them: for evaluation, teachers, generation.

    Arguments `argnums` are cast to the compute dtype; on a mesh all that are divided are gathered at first use, as
    training does. Without a mesh and a precision this is `fn`.
    """
    numbers = (argnums,) if isinstance(argnums, int) else tuple(argnums)

    @functools.wraps(fn)
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        return fn(
            *(tree.map(_materialize if i in numbers else materialize, arg) for i, arg in enumerate(args)), **kwargs
        )

    return wrapped


def _materialize(leaf: Any) -> Any:
    floating = isinstance(leaf, Tensor) and leaf.is_floating_point()
    return compute_views([leaf], differentiated=False)[0](leaf) if floating else materialize(leaf)


def differentiated(loss_of_leaves: Callable, leaves: list[Tensor]) -> _Differentiated:
    """Value, aux and gradients of a function of flat leaves that returns `(loss, aux)`."""
    bottom = current_provenance() is not None and _depth.get() == 0 and not _inside_transform()
    bottom = bottom and not any(leaf.requires_grad for leaf in leaves)
    token = _depth.set(_depth.get() + 1)
    try:
        if bottom:
            return _by_autograd(loss_of_leaves, leaves)
        with reference_kernels() if _depth.get() > 1 else nullcontext():
            return _by_func(loss_of_leaves, leaves)
    finally:
        _depth.reset(token)


def loss_value(loss: Any) -> Tensor:
    """The number of a loss: a scalar tensor as it is, a `Mean` or `WeightedSum` by its `value()`."""
    if isinstance(loss, Mean | WeightedSum):
        with ending():
            return loss.value()
    if not isinstance(loss, Tensor) or loss.dim() != 0:
        what = f"a tensor of shape {tuple(loss.shape)}" if isinstance(loss, Tensor) else type(loss).__name__
        raise ValueError(f"the loss must be a scalar tensor, a Mean or a WeightedSum, not {what}: return loss.sum()?")
    return loss


def _require_mean(loss: Any) -> None:
    """On a mesh a plain number would be one rank's: no gradient of the whole batch follows from it."""
    sharded = current_sharded()
    if sharded is not None and sharded.plan.mesh.size > 1 and not isinstance(loss, Mean | WeightedSum):
        raise ValueError(
            f"{user_source()}: on a mesh of ranks a loss must say what it is a mean of: return Mean(total, count) or a "
            "WeightedSum"
        )


def _by_autograd(loss_of_leaves: Callable, leaves: list[Tensor]) -> _Differentiated:
    provenance = current_provenance()
    assert provenance is not None
    with torch.enable_grad():
        detached = [leaf.detach().requires_grad_() for leaf in leaves]
        with provenance.in_phase("forward"):
            loss, aux = loss_of_leaves(*detached)
            value = loss_value(loss)
        if not value.requires_grad:
            return _Differentiated(value, aux, [torch.zeros_like(leaf) for leaf in leaves])
        provenance.watch_backward(value, detached)
        with provenance.in_phase("backward"):
            grads = torch.autograd.grad(value, detached, materialize_grads=True)
    return _Differentiated(value.detach(), tree.map(_detach, aux), list(grads))


def _by_func(loss_of_leaves: Callable, leaves: list[Tensor]) -> _Differentiated:
    structure: list[Any] = []

    def flat(*new_leaves: Tensor) -> tuple[Tensor, list[Tensor]]:
        loss, aux = loss_of_leaves(*new_leaves)
        aux_leaves, aux_tree = tree.flatten(aux)
        structure.append(aux_tree)
        return loss_value(loss), aux_leaves

    if torch.is_inference_mode_enabled() and not _differentiates_in_inference_mode():
        raise ValueError(
            f"{user_source()}: under torch.inference_mode this torch's gradients are zeros: take them outside of it, "
            "or jit the step"
        )
    numbers = tuple(range(len(leaves)))
    grads, (value, aux_leaves) = torch.func.grad_and_value(flat, argnums=numbers, has_aux=True)(*leaves)
    return _Differentiated(value, tree.unflatten(structure[-1], aux_leaves), list(grads))


@functools.cache
def _differentiates_in_inference_mode() -> bool:
    """False on torch before 2.12, whose transforms give zeros there and say nothing."""
    with torch.inference_mode():
        return bool(torch.func.grad(lambda x: x * x)(torch.ones(())) == 2)


def _inside_transform() -> bool:
    return bool(_functorch.get_interpreter_stack())


def _detach(leaf: Any) -> Any:
    """A leaf of aux as `torch.func` returns it: what depends on the parameters without its history, else itself."""
    return leaf.detach() if isinstance(leaf, Tensor) and leaf.requires_grad else leaf


def _check_floating(args: tuple, numbers: tuple[int, ...]) -> None:
    for n in numbers:
        for path, leaf in zip(tree.paths(args[n]), tree.flatten(args[n])[0], strict=True):
            if not isinstance(leaf, Tensor) or not leaf.is_floating_point():
                what = f"dtype {leaf.dtype}" if isinstance(leaf, Tensor) else type(leaf).__name__
                way_out = "keep it in another argument"
                if isinstance(leaf, Tensor) and leaf.is_complex():
                    way_out = "keep its real and imaginary parts as two leaves, and torch.complex(a, b) in the loss"
                raise ValueError(f"argument {n}, leaf {path!r} is {what}, which has no gradient: {way_out}")
