"""Small steps that the tests of the trainer share: a deep residual stack with momentum."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ftrain import tree
from ftrain.kernels.mean import Mean
from ftrain.trace.grad import value_and_grad


def stack_params(depth: int = 3, width: int = 16, *, seed: int = 0) -> dict[str, Any]:
    """Parameters of a residual stack: `layers.N.{w, b}`."""
    generator = torch.Generator().manual_seed(seed)
    draw = lambda *shape: torch.randn(*shape, generator=generator) * 0.1  # noqa: E731
    return {"layers": [{"w": draw(width, width), "b": draw(width)} for _ in range(depth)]}


def stack_loss(params: dict[str, Any], batch: tuple[Tensor, Tensor]) -> Mean:
    """Mean squared error of the stack."""
    x, y = batch
    for layer in params["layers"]:
        x = torch.tanh(x @ layer["w"] + layer["b"]) + x
    return Mean.of((x - y).square())


def stack_batch(rows: int = 8, width: int = 16, *, seed: int = 1) -> tuple[Tensor, Tensor]:
    """Inputs and targets."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(rows, width, generator=generator), torch.randn(rows, width, generator=generator)


def momentum_step(loss_fn: Callable) -> Callable:
    """A step over `{"params", "momentum", "count"}` that returns the new state and `{"loss"}`."""
    differentiate = value_and_grad(loss_fn)

    def step(state: Any, batch: Any) -> Any:
        loss, grads = differentiate(state["params"], batch)
        momentum = tree.map(lambda m, g: 0.9 * m + g, state["momentum"], grads)
        params = tree.map(lambda p, m: p - 0.01 * m, state["params"], momentum)
        return {"params": params, "momentum": momentum, "count": state["count"] + 1}, {"loss": loss}

    return step


def momentum_state(params: Any) -> dict[str, Any]:
    """A fresh state for `momentum_step`, on memory of its own."""
    params = tree.map(torch.clone, params)
    return {"params": params, "momentum": tree.map(torch.zeros_like, params), "count": torch.tensor(0)}


def assert_same_bits(a: Any, b: Any) -> None:
    """Two trees have one structure and equal tensors, to the bit."""
    tree.require_same(a, b, names=("the first", "the second"))
    for path, x, y in zip(tree.paths(a), tree.leaves(a), tree.leaves(b), strict=True):
        assert x.dtype == y.dtype, path
        same = torch.equal(x.isnan(), y.isnan()) and torch.equal(x.nan_to_num(), y.nan_to_num())
        assert same, f"{path}: differs by up to {(x - y).abs().max()}"


def wide_loss(params, batch):
    """Layers whose inner tensors are four times as large as what they hand on."""
    x, y = batch
    for layer in params["layers"]:
        x = x + torch.tanh(x @ layer["w_in"]).square().sin() @ layer["w_out"]
    return Mean.of((x - y).square())


def wide_params(depth=8, width=16):
    generator = torch.Generator().manual_seed(0)
    draw = lambda *shape: torch.randn(*shape, generator=generator) * 0.1  # noqa: E731
    return {"layers": [{"w_in": draw(width, 4 * width), "w_out": draw(4 * width, width)} for _ in range(depth)]}
