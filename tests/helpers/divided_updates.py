"""Updates of one's own on a small linear model: the results on one device beside those on a mesh."""

import torch

import ftrain
from ftrain import Mean, tree
from ftrain.modules.spec import Constant, ParamSpec
from ftrain.sharding import Layout, Mesh, Plan

MESHES = [
    Mesh(shard=2, kind="virtual"),
    Mesh(2, 2, kind="virtual"),
    Mesh(shard=2, sequence=2, kind="virtual"),
    Mesh(shard=3, kind="virtual"),  # pieces with padding
]
SPECS = {"w": ParamSpec((4, 8), ("embed", "mlp"), Constant(0.0)), "b": ParamSpec((8,), ("mlp",), Constant(0.0))}


def loss(params, batch):
    """Squared errors of a linear map: a `Mean` over all numbers of the batch."""
    e = (batch["x"] @ params["w"] + params["b"] - batch["y"]).square()
    return Mean(e.sum(), torch.full((), float(e.numel()), dtype=e.dtype))


def arguments():
    """Parameters and a batch of twelve rows, in float64."""
    random = torch.Generator().manual_seed(0)
    numbers = lambda *shape: torch.randn(shape, generator=random, dtype=torch.float64)  # noqa: E731
    return {"w": numbers(4, 8), "b": numbers(8)}, {"x": numbers(12, 4), "y": numbers(12, 8)}


def both(step, mesh, **options):
    """The step's results on one device, in eager code, and on the mesh."""
    state, batch = arguments()
    plan = Plan(mesh, Layout(**options))
    return step(state, batch), ftrain.jit(step, plan=plan, specs=SPECS)(state, batch)


def assert_equal(one, many):
    """Trees of tensors agree to the order of sums in float64."""
    for path, a, b in zip(tree.paths(one), tree.leaves(one), tree.leaves(many), strict=True):
        torch.testing.assert_close(b, a, rtol=1e-12, atol=1e-12, msg=lambda m, path=path: f"{path}: {m}")


def updated(update):
    """The step that replaces each leaf `w` by `update(w, gradient)`."""

    def step(state, batch):
        grads = ftrain.grad(loss)(state, batch)
        return {k: update(state[k], grads[k]) for k in state}

    return step
