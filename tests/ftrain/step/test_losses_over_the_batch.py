"""Losses whose parts look at the whole batch, and losses that differentiate within themselves: on a mesh value and
gradient are those of one device.
"""

import pytest
import torch

import ftrain
from ftrain import Mean, tree
from ftrain.kernels.mean import sum_over_batch
from ftrain.modules.spec import Constant, ParamSpec
from ftrain.sharding import Layout, Mesh, Plan

SPECS = {"w": ParamSpec((4, 2), ("embed", "mlp"), Constant(0.0))}
MESHES = [
    Mesh(2, kind="virtual"),
    Mesh(shard=2, kind="virtual"),
    Mesh(2, 2, kind="virtual"),
    Mesh(shard=2, sequence=2, kind="virtual"),
]


def number(value):
    return torch.tensor(value, dtype=torch.float64)


def error(w, batch):
    return Mean.of((batch["x"] @ w - batch["y"]).square())


def root_of_the_mean(params, batch):
    return Mean(error(params["w"], batch).value().sqrt(), number(1.0))


def centred(params, batch):
    h = batch["x"] @ params["w"]
    mean = sum_over_batch(h.sum()) / sum_over_batch(number(float(h.numel())))
    return Mean.of((h - mean).square())


def batch_norm(params, batch):
    h = batch["x"] @ params["w"]
    count = sum_over_batch(number(float(h.shape[0])))
    mean = sum_over_batch(h.sum(0)) / count
    var = sum_over_batch((h - mean).square().sum(0)) / count
    return Mean.of(((h - mean) / var.sqrt() - batch["y"]).square())


def weighed_by_the_loss(params, batch):
    h = batch["x"] @ params["w"]
    return Mean.of(h.square() * Mean.of(h.abs()).value())


def several(params, batch):
    terms = {"a": error(params["w"], batch), "b": root_of_the_mean(params, batch)}
    return ftrain.weighted_sum(terms, {"b": 0.3})


def two_steps_within(params, batch):
    w = params["w"]
    for _ in range(2):
        w = w - 0.1 * ftrain.grad(lambda w: error(w, batch))(w)
    return error(w, batch)


def norm_of_a_gradient(params, batch):
    slope = ftrain.grad(lambda w: error(w, batch))(params["w"])
    return Mean.of((batch["x"] @ params["w"]).square() + slope.square().sum())


LOSSES = [
    root_of_the_mean, centred, batch_norm, weighed_by_the_loss, several, two_steps_within, norm_of_a_gradient,
]  # fmt: skip


def arguments():
    random = torch.Generator().manual_seed(0)
    draw = lambda *shape: torch.randn(*shape, generator=random, dtype=torch.float64)  # noqa: E731
    return {"w": draw(4, 2)}, {"x": draw(12, 4), "y": draw(12, 2)}


@pytest.mark.parametrize("mesh", MESHES, ids=str)
@pytest.mark.parametrize("loss", LOSSES)
def test_value_and_gradient_are_those_of_one_device(loss, mesh):
    def step(params, batch):
        return ftrain.value_and_grad(loss)(params, batch)

    one = ftrain.jit(step)(*arguments())
    many = ftrain.jit(step, plan=Plan(mesh, Layout()), specs=SPECS)(*arguments())
    for a, b in zip(tree.leaves(one), tree.leaves(many), strict=True):
        torch.testing.assert_close(b, a, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("mesh", MESHES, ids=str)
def test_gradients_at_rows_of_the_batch_are_each_ranks_own(mesh):
    def step(params, batch):
        return ftrain.value_and_grad(penalty)(params, batch)

    def penalty(params, batch):
        score = lambda x: Mean((x @ params["w"]).square().sum(), torch.full((), 1.0, dtype=x.dtype))  # noqa: E731
        count = sum_over_batch(torch.full((), 1.0, dtype=torch.float64))
        slope = ftrain.grad(score)(batch["x"]) * count
        return Mean.of((slope.square().sum(-1) - 1).square())

    one = ftrain.jit(step)(*arguments())
    many = ftrain.jit(step, plan=Plan(mesh, Layout()), specs=SPECS)(*arguments())
    for a, b in zip(tree.leaves(one), tree.leaves(many), strict=True):
        torch.testing.assert_close(b, a, rtol=1e-12, atol=1e-12)
