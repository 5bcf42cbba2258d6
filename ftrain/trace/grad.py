"""`grad` and `value_and_grad`: derivatives of losses that are scalars, `Mean`s or weighted sums of them.

They behave as those of `torch.func`, and compose with `torch.func.vmap`, `jvp` and each other. The outermost gradient
of a traced step is computed by `torch.autograd.grad` on detached leaves, with the same numbers. Its backward is not
itself differentiated, so the graph holds only what a training step needs, and each backward node can be traced to its
forward op.
"""

import functools
from collections.abc import Callable
from contextlib import nullcontext
from contextvars import ContextVar
from typing import Any, NamedTuple, ParamSpec, TypeVar

import torch
from torch import Tensor
from torch._C import _functorch

from ftrain import tree
from ftrain.graph.source import user_source
from ftrain.kernels.backend import reference_kernels
from ftrain.kernels.mean import Mean, WeightedSum
from ftrain.trace.batch_backward import watch_own_backwards
from ftrain.trace.own_counts import require_own_counts
from ftrain.trace.parameter_view import compute_views, materialize, sum_inner_gradients
from ftrain.trace.provenance import current_provenance
from ftrain.trace.refusals import Untraceable
from ftrain.trace.spmd import current_sharded, note_gradients, summing_totals

P = ParamSpec("P")
R = TypeVar("R")
_LossOfLeaves = Callable[..., tuple[Any, Any]]  # of tensors, one for each leaf

_depth: ContextVar[int] = ContextVar("ftrain_grad_depth", default=0)


class _Differentiated(NamedTuple):
    value: Tensor
    aux: Any
    grads: list[Tensor]


def grad(fn: Callable[P, Any], argnums: int | tuple[int, ...] = 0, has_aux: bool = False) -> Callable[P, Any]:
    """A function that returns the gradient of `fn`; with `has_aux`, `(gradient, aux)`.

    Arguments and errors are those of `value_and_grad`.

    >>> import torch
    >>> import ftrain
    >>> ftrain.grad(lambda params: (params["w"] ** 2).sum())({"w": torch.tensor([1.0, 3.0])})
    {'w': tensor([2., 6.])}
    """
    with_value = value_and_grad(fn, argnums, has_aux)

    @functools.wraps(fn)
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        value, grads = with_value(*args, **kwargs)
        return (grads, value[1]) if has_aux else grads

    return wrapped


def value_and_grad(
    fn: Callable[P, Any], argnums: int | tuple[int, ...] = 0, has_aux: bool = False
) -> Callable[P, tuple[Any, Any]]:
    """A function of the same arguments as `fn` that returns `(value, gradient)`.

    - `fn`: the loss. It returns a scalar tensor, a `Mean` or a `WeightedSum`; with `has_aux`, a pair of it and any tree
      `aux`. For `ftrain.accumulate(...)` the micro-batches run one after the other.
    - `argnums`: the position of the argument to differentiate, or a tuple of positions.
    - `has_aux`: the result is `((value, aux), gradient)`.

    The value is a 0-d tensor. The gradient has the structure, shapes and dtypes of the argument (for a tuple of
    `argnums`, a tuple of these). Leaves that the loss does not use get zeros. Float32 leaves reach `fn` in the compute
    dtype of the step (`ftrain.Precision`), and on a mesh gathered.

    ValueError for a leaf that is not floating (by its path), for a loss of another type, for a plain tensor as loss on
    a mesh of several ranks, for a leaf without a known placement on a mesh, and under `torch.inference_mode` with torch
    before 2.12.

    >>> import torch
    >>> import ftrain
    >>> def loss(params, x):
    ...     return (params["w"] * x).sum()
    >>> ftrain.value_and_grad(loss)({"w": torch.tensor([1.0, 2.0])}, torch.tensor([3.0, 4.0]))
    (tensor(11.), {'w': tensor([3., 4.])})
    """
    numbers = (argnums,) if isinstance(argnums, int) else tuple(argnums)

    @functools.wraps(fn)
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        leaves, treedef = tree.flatten([args[n] for n in numbers])
        _check_floating(args, numbers)
        inner = _depth.get() > 0
        views = compute_views(leaves, within(tree.paths([args[n] for n in numbers])), inner=inner)
        others = [arg if i in numbers else tree.map(materialize, arg) for i, arg in enumerate(args)]

        def loss_of_leaves(*new_leaves: Tensor) -> tuple[Any, Any]:
            new_args = list(others)
            computed = [view(leaf) for view, leaf in zip(views, new_leaves, strict=True)]
            for n, value in zip(numbers, tree.unflatten(treedef, computed), strict=True):
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


def forward(fn: Callable[P, R], argnums: int | tuple[int, ...] = 0) -> Callable[P, R]:
    """`fn`, not differentiated, on the arguments that `value_and_grad` gives it: for evaluation, teachers, generation.

    Float32 leaves of the arguments `argnums` (a position, or a tuple of them) are cast to the step's compute dtype. On
    a mesh all sharded leaves are gathered at first use, as in training. Without a mesh and a precision, the result
    behaves as `fn`.

    >>> import torch
    >>> import ftrain
    >>> step = ftrain.jit(ftrain.forward(lambda params, x: params["w"] * x), precision="bf16")
    >>> step({"w": torch.tensor(2.0)}, torch.tensor(3.0, dtype=torch.bfloat16))
    tensor(6., dtype=torch.bfloat16)
    """
    numbers = (argnums,) if isinstance(argnums, int) else tuple(argnums)

    @functools.wraps(fn)
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        return fn(
            *(
                tree.map_with_path(_materialize, arg) if i in numbers else tree.map(materialize, arg)
                for i, arg in enumerate(args)
            ),
            **kwargs,
        )

    return wrapped


def within(paths: list[str]) -> list[str]:
    """The paths of a list of arguments, each within its argument."""
    return [path.partition(".")[2] for path in paths]


def _materialize(path: str, leaf: Any) -> Any:
    floating = isinstance(leaf, Tensor) and leaf.is_floating_point()
    return compute_views([leaf], [path], differentiated=False)[0](leaf) if floating else materialize(leaf)


def differentiated(loss_of_leaves: _LossOfLeaves, leaves: list[Tensor]) -> _Differentiated:
    """Value (0-d), aux and gradients (of the leaves' shapes) of a function of flat leaves that returns `(loss, aux)`.

    ValueError if the loss is not a scalar tensor, a `Mean` or a `WeightedSum`, and under `torch.inference_mode` with
    torch before 2.12.
    """
    is_outermost = current_provenance() is not None and _depth.get() == 0 and not _inside_transform()
    is_outermost = is_outermost and not any(leaf.requires_grad for leaf in leaves)
    token = _depth.set(_depth.get() + 1)
    try:
        if is_outermost:
            return _by_autograd(loss_of_leaves, leaves)
        with reference_kernels() if _depth.get() > 1 else nullcontext():
            return _by_func(loss_of_leaves, leaves)
    finally:
        _depth.reset(token)


def loss_value(loss: Any) -> Tensor:
    """The 0-d value of a loss: a scalar tensor itself, or the `value()` of a `Mean` or `WeightedSum`.

    ValueError for anything else.
    """
    if isinstance(loss, Mean | WeightedSum):
        require_tensors(loss)
        require_own_counts(loss.terms if isinstance(loss, WeightedSum) else [loss])
        with summing_totals():
            return loss.value()
    if not isinstance(loss, Tensor) or loss.dim() != 0:
        what = f"a tensor of shape {tuple(loss.shape)}" if isinstance(loss, Tensor) else type(loss).__name__
        raise ValueError(f"the loss must be a scalar tensor, a Mean or a WeightedSum, not {what}: return loss.sum()?")
    return loss


def require_tensors(loss: Mean | WeightedSum) -> None:
    """ValueError for a `Mean` of Python numbers, and for a term of a `WeightedSum` that is no `Mean`."""
    for mean in (loss,) if isinstance(loss, Mean) else loss.terms:
        parts = zip(mean._fields, mean, strict=True) if isinstance(mean, Mean) else [("", mean)]
        for name, part in parts:
            if not isinstance(part, Tensor) or not name:
                what = f"Mean({name}={part!r})" if name else f"a term {part!r} of a weighted sum"
                raise ValueError(
                    f"{user_source()}: {what} is {type(part).__name__}: a Mean has 0-d tensors, e.g. "
                    "Mean(total, torch.tensor(8.0)) or Mean.of(values)"
                )


def _require_mean(loss: Any) -> None:
    """ValueError for a plain tensor on a mesh: it is the loss of one rank, not of the whole batch."""
    sharded = current_sharded()
    if sharded is not None and sharded.plan.mesh.size > 1 and not isinstance(loss, Mean | WeightedSum):
        raise Untraceable(
            f"{user_source()}: on a mesh of ranks a loss must say what it is a mean of: return Mean(total, count) or a "
            "WeightedSum"
        )


def _by_autograd(loss_of_leaves: _LossOfLeaves, leaves: list[Tensor]) -> _Differentiated:
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
        sharded = current_sharded()
        if sharded is not None and sharded.plan.mesh.size > 1:
            watch_own_backwards(value, sharded.rows)
        with provenance.in_phase("backward"):
            grads = torch.autograd.grad(value, detached, materialize_grads=True)
    return _Differentiated(value.detach(), tree.map(_detach, aux), list(grads))


def _by_func(loss_of_leaves: _LossOfLeaves, leaves: list[Tensor]) -> _Differentiated:
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
    """False on torch before 2.12, whose transforms silently return zeros there."""
    with torch.inference_mode():
        return bool(torch.func.grad(lambda x: x * x)(torch.ones(())) == 2)


def _inside_transform() -> bool:
    return bool(_functorch.get_interpreter_stack())


def _detach(leaf: Any) -> Any:
    """A leaf of aux as `torch.func` returns it: detached if it depends on the parameters."""
    return leaf.detach() if isinstance(leaf, Tensor) and leaf.requires_grad else leaf


def _check_floating(args: tuple[Any, ...], numbers: tuple[int, ...]) -> None:
    for n in numbers:
        for path, leaf in zip(tree.paths(args[n]), tree.flatten(args[n])[0], strict=True):
            if not isinstance(leaf, Tensor) or not leaf.is_floating_point():
                what = f"dtype {leaf.dtype}" if isinstance(leaf, Tensor) else type(leaf).__name__
                way_out = "keep it in another argument"
                if isinstance(leaf, Tensor) and leaf.is_complex():
                    way_out = "keep its real and imaginary parts as two leaves, and torch.complex(a, b) in the loss"
                raise ValueError(f"argument {n}, leaf {path!r} is {what}, which has no gradient: {way_out}")
