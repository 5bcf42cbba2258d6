"""Stochastic rounding: unbiased, loses no small update on average, the same numbers on every mesh and in a trace."""

import math
import warnings

import pytest
import torch

import ftrain
from ftrain import TrainState, optim, tree
from ftrain.kernels import random
from ftrain.modules.spec import Constant, ParamSpec
from ftrain.optim.stochastic import round_at_random
from ftrain.sharding import Layout, Mesh, Plan


def test_the_mean_of_many_roundings_is_the_number():
    for value in (1.0 + 2.0**-10, -3.1415927, 1e-30, 2.0**100 * 1.003):
        x = torch.full((200_000,), value)
        found = round_at_random(x, random.bits(random.key(7), (200_000,)))
        assert len(found.unique()) == 2, "the two neighbours"
        assert torch.equal(found.bfloat16().float(), found)
        gap = float(found.unique().diff())
        assert abs(float(found.double().mean()) - float(x[0])) < 5 * 0.5 * gap / math.sqrt(200_000)


def test_what_needs_no_rounding_stays():
    x = torch.tensor([0.0, -0.0, 1.0, -2.5, math.inf, -math.inf, math.nan, 2.0**-130])
    words = torch.full_like(x, 2**32 - 1, dtype=torch.int64)
    torch.testing.assert_close(round_at_random(x, words), x, rtol=0, atol=0, equal_nan=True)


def test_small_updates_add_up_where_rounding_to_the_nearest_loses_them():
    params, grads = {"w": torch.ones(4000, dtype=torch.bfloat16)}, {"w": torch.ones(4000, dtype=torch.bfloat16)}
    tx = optim.stochastic_rounding(optim.sgd(2.0**-12))  # a sixteenth of the gap below one, an update
    state = TrainState.create(params, tx)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        lost = TrainState.create(params, optim.sgd(2.0**-12))
    for _ in range(64):
        state, lost = state.apply(tx, grads), lost.apply(optim.sgd(2.0**-12), grads)
    assert torch.equal(lost.params["w"], params["w"])
    assert state.params["w"].dtype == torch.bfloat16
    assert abs(float(state.params["w"].double().mean()) - (1 - 64 * 2.0**-12)) < 2e-4
    assert int(state.opt_state.steps) == 64


def test_leaves_that_are_wide_or_frozen_are_as_without_it():
    params = {"a": torch.ones(3), "b": torch.ones(3).bfloat16(), "c": torch.ones(3).bfloat16()}
    inner = optim.multi_transform({"train": optim.adamw(0.1), "still": optim.freeze()}, {"c": "still", "**": "train"})
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        state = TrainState.create(params, optim.stochastic_rounding(inner))
    grads = tree.map(torch.ones_like, params)
    moved = state.apply(optim.stochastic_rounding(inner), grads).params
    alone = TrainState.create({"a": params["a"]}, optim.adamw(0.1)).apply(optim.adamw(0.1), {"a": grads["a"]})
    assert torch.equal(moved["a"], alone.params["a"])
    assert torch.equal(moved["c"], params["c"])
    assert not torch.equal(moved["b"], params["b"])


SPECS = {"w": ParamSpec((6, 8), ("embed", "mlp"), Constant(1.0)), "b": ParamSpec((7,), ("mlp",), Constant(0.5))}


@pytest.mark.parametrize("mesh", [Mesh(shard=2, kind="virtual"), Mesh(2, 2, kind="virtual"), Mesh(4, kind="virtual"),
                                  Mesh(shard=4, kind="virtual")], ids=str)  # fmt: skip
def test_every_mesh_rounds_alike(mesh):
    """Pieces, padded ones among them (7 numbers, 6 rows over 4 ranks), draw what one device draws."""
    tx = optim.stochastic_rounding(optim.sgd(1e-3), seed=3)

    def loss(params, batch):
        y = (batch @ params["w"].float())[:, :7] * params["b"].float()
        return ftrain.Mean(y.sum(), torch.full((), float(len(batch))))

    def step(state, batch):
        return state.apply(tx, ftrain.grad(loss)(state.params, batch))

    params = tree.map(torch.Tensor.bfloat16, ftrain.init(SPECS, ftrain.key(0)))
    batch = torch.arange(8.0 * 6).reshape(8, 6) / 64  # sums are exact in any order
    one = many = TrainState.create(params, tx)
    alone, sharded = ftrain.jit(step), ftrain.jit(step, plan=Plan(mesh, Layout()), specs=SPECS)
    for _ in range(3):
        one, many = alone(one, batch), sharded(many, batch)
    for path, a, b in zip(tree.paths(one), tree.leaves(one), tree.leaves(many), strict=True):
        assert torch.equal(a, b), path
    assert not torch.equal(one.params["w"], params["w"])
