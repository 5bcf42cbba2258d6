"""What tests of foreign code share: three steps of plain gradient descent, eager or jitted."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

import ftrain
from ftrain import tree


def plain_value_and_grad(loss: Callable) -> Callable:
    """What autograd gives on leaves of its own: draws of in-place fills are those of a plain training loop."""

    def run(params: Any) -> Any:
        leaves = tree.map(lambda p: p.detach().requires_grad_(), params)
        value = loss(leaves)
        grads = torch.autograd.grad(value, tree.leaves(leaves), materialize_grads=True)
        return value.detach(), tree.unflatten(tree.flatten(leaves)[1], grads)

    return run


def three_steps(
    module: nn.Module,
    batch: Tensor,
    prepare: Callable[[Callable], Callable],
    *,
    value_and_grad: Callable = ftrain.value_and_grad,
) -> list[Any]:
    """Parameters, loss and gradients of three steps of `prepare(step)` on a module's parameters, from one seed."""

    def step(params: Any, batch: Tensor) -> Any:
        def loss(params: Any) -> Tensor:
            out = functional_call(module, params, (batch,))
            return (out.square() * torch.linspace(0.5, 1.5, out.numel(), dtype=out.dtype).reshape(out.shape)).mean()

        value, grads = value_and_grad(loss)(params)
        return tree.map(lambda p, g: p - 0.1 * g, params, grads), {"loss": value, "grads": grads}

    params = {name: p.detach().clone() for name, p in module.named_parameters()}
    run, results = prepare(step), []
    torch.manual_seed(3)
    for _ in range(3):
        params, metrics = run(params, batch)
        results.append(tree.map(torch.clone, (params, metrics)))
    return results


def eager_steps(module: nn.Module, batch: Tensor) -> list[Any]:
    """The same steps in plain PyTorch."""
    return three_steps(module, batch, lambda step: step, value_and_grad=plain_value_and_grad)


def assert_equal(ours: Any, theirs: Any, what: str) -> None:
    """Trees of tensors agree to the order of sums in float64."""
    tree.require_same(ours, theirs, names=("the jitted step's", "the eager one's"))
    for path, a, b in zip(tree.paths(theirs), tree.leaves(ours), tree.leaves(theirs), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12, msg=lambda m, p=path: f"{what} {p}: {m}")
