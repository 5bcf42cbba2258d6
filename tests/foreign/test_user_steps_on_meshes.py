"""Updates and losses of people's own scripts on meshes: the numbers of one device in float64."""

import pytest
import torch
from user_steps import LEAVES, LOSSES, UPDATES, WHOLE_STEPS, base, batch, state

import ftrain
from ftrain import tree
from ftrain.modules import spec
from ftrain.sharding import Layout, Mesh, Plan

MESHES = [
    pytest.param(Mesh(shard=2, kind="virtual"), marks=pytest.mark.exhaustive),  # the next one has these pieces too
    Mesh(2, 2, kind="virtual"),
    Mesh(shard=3, kind="virtual"),  # pieces with padding
]
SPECS = spec.of({k: state()[k] for k in LEAVES})


def parameters(s):
    return {k: s[k] for k in LEAVES}


def assert_equal_on(mesh, step):
    one = step(state(), batch())
    many = ftrain.jit(step, plan=Plan(mesh, Layout()), specs=SPECS)(state(), batch())
    for path, a, b in zip(tree.paths(one), tree.leaves(one), tree.leaves(many), strict=True):
        torch.testing.assert_close(b, a, rtol=1e-9, atol=1e-11, msg=lambda m, p=path: f"{p}: {m}")


@pytest.mark.parametrize("mesh", MESHES, ids=str)
def test_updates_of_each_leaf(mesh):
    def step(s, batch):
        grads = ftrain.grad(base)(parameters(s), batch)
        return {name: {k: update(s[k], grads[k], s["m"][k]) for k in LEAVES} for name, update in UPDATES.items()}

    assert_equal_on(mesh, step)


@pytest.mark.parametrize("mesh", MESHES, ids=str)
def test_updates_of_all_leaves_at_once(mesh):
    def step(s, batch):
        grads = ftrain.grad(base)(parameters(s), batch)
        return {name: update(s, grads) for name, update in WHOLE_STEPS.items()}

    assert_equal_on(mesh, step)


@pytest.mark.parametrize("mesh", MESHES, ids=str)
def test_losses(mesh):
    def step(s, batch):
        found = {}
        for name, loss in LOSSES.items():
            found[name] = ftrain.value_and_grad(lambda p, b, loss=loss: loss(p, b, s))(parameters(s), batch)
        return found

    assert_equal_on(mesh, step)
