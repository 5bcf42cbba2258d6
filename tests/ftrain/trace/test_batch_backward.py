"""Hooks of gradients in a loss on a mesh: those of each number run, those that mix rows are refused."""

import pytest
import torch

import ftrain
from ftrain import Mean, tree
from ftrain.modules import spec
from ftrain.sharding import Layout, Mesh, Plan


def numbers(seed, *shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


PARAMS = {"w": numbers(0, 6, 4), "v": numbers(1, 4, 4)}
BATCH = {"x": numbers(2, 8, 6), "y": numbers(3, 8, 4)}


def hidden(p, b):
    return torch.tanh(b["x"] @ p["w"]) @ p["v"]


def both(loss):
    """Value and gradients on one device, and on a mesh of two ranks."""

    def step(p, batch):
        return ftrain.value_and_grad(loss)(p, batch)

    plan = Plan(Mesh(shard=2, kind="virtual"), Layout())
    return ftrain.jit(step)(PARAMS, BATCH), ftrain.jit(step, plan=plan, specs=spec.of(PARAMS))(PARAMS, BATCH)


HOOKS = {
    "means": lambda g: g - g.mean(0),
    "norms": lambda g: g / (1 + g.norm()),
    "order": lambda g: g.flip(0),
    "spread": lambda g: g.mean(0).expand_as(g),
    "the sign of a sum": lambda g: g.sign(),
}


@pytest.mark.parametrize("name", HOOKS)
def test_hooks_that_mix_rows_are_refused(name):
    def loss(p, b):
        h = (p["w"] if name == "the sign of a sum" else hidden(p, b)) * 1
        h.register_hook(HOOKS[name])
        return Mean.of((b["x"] @ h if name == "the sign of a sum" else h).square())

    with pytest.raises(ValueError, match=r"test_batch_backward.py:\d+ .*a hook mixes rows of the batch"):
        both(loss)


@pytest.mark.parametrize("hook", [lambda g: -g, lambda g: g.clamp(-0.01, 0.01), lambda g: None])
def test_hooks_of_each_number_are_run(hook):
    def loss(p, b):
        h = hidden(p, b)
        h.register_hook(hook)
        return Mean.of(h.square())

    one, many = both(loss)
    for a, b in zip(tree.leaves(one), tree.leaves(many), strict=True):
        torch.testing.assert_close(b, a, rtol=1e-12, atol=1e-12)


def test_a_mean_counts_rows_and_not_the_sums_over_them():
    with pytest.raises(ValueError, match="a Mean counts 16, and its total is a sum over a rank's"):
        both(lambda p, b: Mean.of(hidden(p, b).T @ b["y"]))
