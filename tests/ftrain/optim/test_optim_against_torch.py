"""Fifty steps beside `torch.optim`: the same parameters, the same gradients, the same numbers."""

from collections.abc import Callable
from typing import Any

import pytest
import torch

from ftrain import optim, tree

TOLERANCE = {torch.float32: 1e-6, torch.float64: 1e-12}
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)


def random_like(shapes: Any, dtype: torch.dtype, seed: int) -> Any:
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(shape, dtype=dtype, generator=generator) for name, shape in shapes.items()}


def run_ours(tx: optim.Transform, params: Any, gradients: list[Any]) -> Any:
    state = tx.init(params)
    for grads in gradients:
        updates, state = tx.update(grads, state, params)
        params = optim.apply_updates(params, updates)
    return params


def run_torch(make: Callable[..., torch.optim.Optimizer], params: Any, gradients: list[Any]) -> Any:
    params = tree.map(lambda p: p.clone().requires_grad_(), params)
    optimizer = make(tree.leaves(params))
    for grads in gradients:
        for p, g in zip(tree.leaves(params), tree.leaves(grads), strict=True):
            p.grad = g.clone()
        optimizer.step()
    return tree.map(torch.Tensor.detach, params)


def require_close(ours: Any, theirs: Any, dtype: torch.dtype) -> None:
    for path, a, b in zip(tree.paths(ours), tree.leaves(ours), tree.leaves(theirs), strict=True):
        assert a.dtype == dtype
        torch.testing.assert_close(
            a, b, rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype], msg=lambda m, p=path: f"{p}: {m}"
        )


SHAPES = {"w": (24, 16), "experts": (3, 5, 7), "b": (33,), "scale": ()}

PAIRS = {
    "adamw": (optim.adamw(1e-2, weight_decay=0.1), lambda p: torch.optim.AdamW(p, 1e-2, weight_decay=0.1)),
    "adamw, torch's defaults": (optim.adamw(1e-3), lambda p: torch.optim.AdamW(p, 1e-3)),
    "adam": (
        optim.adamw(3e-3, b1=0.8, b2=0.95, eps=1e-3, weight_decay=0.0),
        lambda p: torch.optim.Adam(p, 3e-3, betas=(0.8, 0.95), eps=1e-3),
    ),
    "sgd": (optim.sgd(1e-2, weight_decay=0.1), lambda p: torch.optim.SGD(p, 1e-2, weight_decay=0.1)),
    "momentum": (optim.sgd(1e-2, momentum=0.9), lambda p: torch.optim.SGD(p, 1e-2, momentum=0.9)),
    "nesterov": (
        optim.sgd(1e-2, momentum=0.9, nesterov=True, weight_decay=0.01),
        lambda p: torch.optim.SGD(p, 1e-2, momentum=0.9, nesterov=True, weight_decay=0.01),
    ),
    "adafactor": (optim.adafactor(), torch.optim.Adafactor),
    "adafactor with options": (
        optim.adafactor(0.05, beta2_decay=-0.5, eps=(1e-4, 1e-2), clip=2.0, weight_decay=0.1),
        lambda p: torch.optim.Adafactor(p, 0.05, beta2_decay=-0.5, eps=(1e-4, 1e-2), d=2.0, weight_decay=0.1),
    ),
}


@DTYPES
@pytest.mark.parametrize(("ours", "theirs"), PAIRS.values(), ids=PAIRS)
def test_equal_over_fifty_steps(ours: optim.Transform, theirs: Callable, dtype: torch.dtype):
    params = random_like(SHAPES, dtype, 0)
    gradients = [random_like(SHAPES, dtype, seed) for seed in range(1, 51)]
    require_close(run_ours(ours, params, gradients), run_torch(theirs, params, gradients), dtype)


@DTYPES
@pytest.mark.parametrize("nesterov", [True, False])
@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
@pytest.mark.parametrize("adjust", ["original", "match_rms_adamw"])
def test_muon_on_transposed_weights_is_torchs_muon(
    adjust: Any, weight_decay: float, nesterov: bool, dtype: torch.dtype
):
    shapes = {"tall": (24, 10), "wide": (10, 24), "square": (16, 16)}
    params = random_like(shapes, dtype, 0)
    gradients = [random_like(shapes, dtype, seed) for seed in range(1, 51)]
    ours = run_ours(optim.muon(1e-3, adjust=adjust, weight_decay=weight_decay, nesterov=nesterov), params, gradients)

    def transpose(values: Any) -> Any:
        return tree.map(lambda x: x.mT.contiguous(), values)

    theirs = run_torch(
        lambda p: torch.optim.Muon(p, 1e-3, adjust_lr_fn=adjust, weight_decay=weight_decay, nesterov=nesterov),
        transpose(params),
        [transpose(g) for g in gradients],
    )
    require_close(ours, transpose(theirs), dtype)


def test_clip_by_global_norm_is_torchs():
    grads = random_like(SHAPES, torch.float32, 0)
    for max_norm in (0.5, 1e3):
        tx = optim.clip_by_global_norm(max_norm)
        clipped, state = tx.update(grads, tx.init(grads), grads)
        leaves = [torch.zeros_like(g, requires_grad=True) for g in tree.leaves(grads)]
        for leaf, g in zip(leaves, tree.leaves(grads), strict=True):
            leaf.grad = g.clone()
        norm = torch.nn.utils.clip_grad_norm_(leaves, max_norm)
        torch.testing.assert_close(state.norm, norm)
        for ours, leaf in zip(tree.leaves(clipped), leaves, strict=True):
            torch.testing.assert_close(ours, leaf.grad)
