"""Parameters in fewer bits than float32, gradients that are absent, and rates that are tensors."""

import math
import warnings
from typing import Any

import pytest
import torch

import ftrain
from ftrain import TrainState, optim, tree
from ftrain.trace.precision import Precision

OPTIMIZERS = {
    "adamw": optim.adamw(1e-3, weight_decay=0.1),
    "sgd": optim.sgd(1e-3, momentum=0.9),
    "lion": optim.lion(1e-3),
    "adafactor": optim.adafactor(1e-3),
    "muon": optim.muon(1e-3, ns_dtype=torch.float32),
}


def train(tx: optim.Transform, params: Any, grads: Any, steps: int) -> TrainState:
    state = TrainState.create(params, tx)
    for i in range(steps):
        state = state.apply(tx, tree.map(lambda g, i=i: g * math.cos(0.05 * i), grads))
    return state


@pytest.mark.parametrize("tx", OPTIMIZERS.values(), ids=OPTIMIZERS)
def test_masters_follow_the_float32_run_and_parameters_are_these_rounded(tx: optim.Transform):
    generator = torch.Generator().manual_seed(0)
    wide = {"w": torch.randn(4, 6, generator=generator).bfloat16().float()}
    grads = {"w": torch.randn(4, 6, generator=generator).bfloat16().float()}
    expected = train(tx, wide, grads, 30).params["w"]
    narrow = tree.map(torch.Tensor.bfloat16, wide)
    state = train(optim.master_weights(tx), narrow, grads, 30)
    torch.testing.assert_close(state.opt_state.masters["w"], expected, rtol=0, atol=0)
    assert torch.equal(state.params["w"], expected.bfloat16())
    with pytest.warns(UserWarning, match="rounds to nothing"):
        lost = train(tx, narrow, grads, 30)
    assert not torch.equal(lost.params["w"], expected.bfloat16())


def test_masters_are_of_narrow_trained_leaves_alone():
    params = {"a": torch.ones(3).half(), "b": torch.ones(3), "c": torch.ones(3).bfloat16()}
    tx = optim.multi_transform({"train": optim.sgd(0.1), "still": optim.freeze()}, {"c": "still", "**": "train"})
    state = optim.master_weights(tx).init(params)
    assert tree.paths(state.masters) == ["a"]
    moved = train(optim.master_weights(tx), params, tree.map(torch.ones_like, params), 1).params
    assert [x.dtype for x in tree.leaves(moved)] == [torch.float16, torch.float32, torch.bfloat16]
    assert torch.equal(moved["c"], params["c"])


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_small_steps_on_narrow_parameters_are_warned_of(name: str):
    tx, params = OPTIMIZERS[name], {"w": torch.ones(2, 2, dtype=torch.bfloat16)}
    with pytest.warns(UserWarning, match=rf"{name}: 1 parameters, such as 'w', are bfloat16.*1/256.*master_weights"):
        tx.init(params)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        optim.master_weights(tx).init(params)
        tx.init(tree.map(torch.Tensor.float, params))
        optim.freeze().init(params)


@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
@pytest.mark.parametrize("make", [optim.muon, optim.lion])
def test_a_leaf_without_a_gradient_stands_still(make: Any, weight_decay: float):
    """Steps of one size would go on for ever after the last gradient."""
    tx, params = make(0.01, weight_decay=weight_decay), {"used": torch.randn(4, 4), "absent": torch.randn(4, 4)}
    first, later = tree.map(torch.randn_like, params), {"used": torch.randn(4, 4), "absent": torch.zeros(4, 4)}
    after_one = TrainState.create(params, tx).apply(tx, first)
    after_two = after_one.apply(tx, later)
    for part in (after_two.params, after_two.opt_state[1]):
        before = after_one.params if part is after_two.params else after_one.opt_state[1]
        assert torch.equal(part["absent"], before["absent"])
        assert not torch.equal(part["used"], before["used"])
    alone = TrainState.create({"absent": params["absent"]}, tx).apply(tx, {"absent": first["absent"]})
    assert torch.equal(after_one.params["absent"], alone.params["absent"])


@pytest.mark.parametrize("make", [optim.adamw, optim.sgd, optim.lion, optim.adafactor, optim.scale_by_learning_rate])
def test_a_rate_may_be_a_tensor_and_never_traces_again(make: Any):
    params = {"w": torch.randn(3, 4), "scale": torch.randn(())}
    grads = tree.map(torch.randn_like, params)
    init = make(1.0).init(params)

    @ftrain.jit
    def step(params: Any, state: Any, grads: Any, rate: torch.Tensor) -> Any:
        return make(rate).update(grads, state, params)[0]

    for rate in (0.5, 0.25, 1e-3):
        expected = make(rate).update(grads, init, params)[0]
        found = step(params, init, grads, torch.tensor(rate))
        for a, b in zip(tree.leaves(found), tree.leaves(expected), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-9)
    assert step.traces == 1


def test_float32_masters_with_a_narrow_compute_dtype_move_by_small_steps():
    params, tx = {"w": torch.ones(4)}, optim.sgd(1e-3)
    step = ftrain.jit(
        lambda state, x: state.apply(tx, ftrain.grad(lambda p: (p["w"] * x).sum())(state.params)),
        precision=Precision(compute="bfloat16"),
    )
    state = TrainState.create(params, tx)
    for _ in range(10):
        state = step(state, torch.ones(4, dtype=torch.bfloat16))
    torch.testing.assert_close(state.params["w"], torch.full((4,), 0.99))


def test_schedules_by_optax_names():
    at = lambda schedule, *counts: [round(float(schedule(torch.tensor(c))), 6) for c in counts]  # noqa: E731
    assert at(optim.linear_schedule(1.0, 0.0, 4, transition_begin=2), 0, 2, 3, 6, 9) == [1, 1, 0.75, 0, 0]
    assert at(optim.cosine_decay_schedule(2.0, 4, alpha=0.5), 0, 2, 4, 9) == [2, 1.5, 1, 1]
    warm = optim.warmup_cosine_decay_schedule(0.5, 2.0, 2, 6, end_value=1.0)
    assert at(warm, 0, 1, 2, 4, 6, 7) == [0.5, 1.25, 2, 1.5, 1, 1]
    joined = optim.join_schedules([optim.constant_schedule(3.0), optim.linear_schedule(1.0, 0.0, 2)], [2])
    assert at(joined, 0, 1, 2, 3, 4) == [3, 3, 1, 0.5, 0]
