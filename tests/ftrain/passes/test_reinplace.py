"""A donated AdamW step runs the in-place op where nothing else needs the old values, and gives the same bits."""

import pytest
import torch

import ftrain
from ftrain import tree
from ftrain.optim import adamw, chain, scale, skip_nonfinite
from ftrain.step.state import TrainState


def run(tx, donate, also=lambda state, new: ()):
    def step(state, x):
        _, grads = ftrain.value_and_grad(lambda p: (torch.tanh(x @ p["w"]) + p["b"]).square().sum())(state.params)
        new = state.apply(tx, grads)
        return new, also(state, new)

    generator = torch.Generator().manual_seed(0)
    params = {"w": torch.randn(6, 4, generator=generator), "b": torch.randn(4, generator=generator)}
    state, jitted = TrainState.create(params, tx), ftrain.jit(step, donate=donate)
    x = torch.randn(3, 6, generator=generator)
    for _ in range(4):
        state, extra = jitted(state, x)
    compiled = jitted.lower(state, x)
    assert compiled.memory().peak > 0
    targets = [str(n.target) for n in compiled.executed.graph.nodes]
    return state, extra, sum("adamw_in_place" in t for t in targets)


CASES = {
    "alone": (adamw(1e-2), lambda state, new: (), 2),
    "new values are results too": (adamw(1e-2), lambda state, new: new.params["w"] * 2, 2),
    "old values are results too": (adamw(1e-2), lambda state, new: new.params["w"] - state.params["w"], 1),
    "the update is scaled": (chain(adamw(1e-2), scale(0.5)), lambda state, new: (), 0),
    "the update is chosen": (skip_nonfinite(adamw(1e-2)), lambda state, new: (), 2),
    "bfloat16 averages": (adamw(1e-2, state_dtype=torch.bfloat16), lambda state, new: (), 0),
}


@pytest.mark.parametrize(("tx", "also", "replaced"), CASES.values(), ids=CASES)
def test_same_bits_as_without_donation(tx, also, replaced):
    pure, pure_extra, none = run(tx, None, also)
    donated, extra, used = run(tx, "state", also)
    assert (none, used) == (0, replaced)
    for path, a, b in zip(tree.paths(pure), tree.leaves(pure), tree.leaves(donated), strict=True):
        assert torch.equal(a, b), path
    assert all(torch.equal(a, b) for a, b in zip(tree.leaves(pure_extra), tree.leaves(extra), strict=True))


def test_a_skipped_step_writes_nothing():
    tx = skip_nonfinite(adamw(1e-2))

    def step(state, x):
        _, grads = ftrain.value_and_grad(lambda p: (x @ p["w"]).square().sum())(state.params)
        return state.apply(tx, grads), ()

    pure, donated = ftrain.jit(step), ftrain.jit(step, donate="state")
    a, b = (TrainState.create({"w": torch.ones(3, 2)}, tx) for _ in range(2))
    for factor in (1.0, float("nan"), 2.0):
        a, _ = pure(a, torch.full((4, 3), factor))
        b, _ = donated(b, torch.full((4, 3), factor))
    assert a.opt_state.skipped_total == 1
    assert all(torch.equal(x, y) for x, y in zip(tree.leaves(a), tree.leaves(b), strict=True))
