"""Every optimizer in a jitted step is the eager one, on one device, donated, and on meshes; it is traced once."""

from typing import Any

import pytest
import torch

import ftrain
from ftrain import TrainState, optim, tree
from ftrain.kernels.mean import Mean
from ftrain.modules.spec import Constant, ParamSpec
from ftrain.sharding import Layout, Mesh, Plan
from tests.helpers.optimizers import TRANSFORMS, loss, problem

STEPS = 3
SPECS = {
    "up": {"w": ParamSpec((4, 8), ("embed", "mlp"), Constant(0.0)), "b": ParamSpec((8,), ("mlp",), Constant(0.0))},
    "down": {"w": ParamSpec((2, 8, 3), (None, "mlp", "embed"), Constant(0.0))},
    "scale": ParamSpec((), (), Constant(0.0)),
}
WAYS: dict[str, dict[str, Any]] = {
    "one device": {},
    "donated": {"donate": "state"},
    "two shards": {"plan": Plan(Mesh(shard=2, kind="virtual"), Layout()), "specs": SPECS},
    "three shards, with padding": {"plan": Plan(Mesh(shard=3, kind="virtual"), Layout()), "specs": SPECS},
    "two replicas of two shards": {"plan": Plan(Mesh(2, 2, kind="virtual"), Layout()), "specs": SPECS},
}
ROWS = 24  # divide over every mesh


def batch() -> dict[str, torch.Tensor]:
    _, (x_ND, target) = problem(torch.float64)
    return {"x_ND": x_ND[:ROWS], "target": target.movedim(0, 1)[:ROWS]}


def train_step(tx: optim.Transform) -> Any:
    def mean_loss(params: Any, batch: Any) -> Mean:
        target = batch["target"].movedim(1, 0)
        count = torch.full((), float(target.numel()), dtype=target.dtype)
        return Mean(loss(params, batch["x_ND"], target) * target.numel(), count)

    def step(state: TrainState, batch: Any) -> Any:
        value, grads = ftrain.value_and_grad(mean_loss)(state.params, batch)
        return state.apply(tx, grads), {"loss": value}

    return step


def trained(step: Any, tx: optim.Transform) -> TrainState:
    state = TrainState.create(tree.map(torch.clone, problem(torch.float64)[0]), tx)
    for _ in range(STEPS):
        state, _ = step(state, batch())
    return state


WITHIN = ("one device", "two shards")
"""Ways that are within the ones after them, which add donation and replicas; `make test-exhaustive` has them."""


@pytest.mark.parametrize(
    "way", [pytest.param(way, marks=pytest.mark.exhaustive if way in WITHIN else []) for way in WAYS]
)
@pytest.mark.parametrize("name", TRANSFORMS)
def test_a_jitted_step_is_the_eager_one_and_is_traced_once(name: str, way: str) -> None:
    tx = TRANSFORMS[name]
    step = ftrain.jit(train_step(tx), **WAYS[way])
    with ftrain.disable_jit():
        eager = trained(train_step(tx), tx)
    found = trained(step, tx)
    assert step.traces == 1
    for path, a, b in zip(tree.paths(eager), tree.leaves(eager), tree.leaves(found), strict=True):
        torch.testing.assert_close(b, a, rtol=1e-11, atol=1e-12, msg=lambda m, path=path: f"{path}: {m}")
