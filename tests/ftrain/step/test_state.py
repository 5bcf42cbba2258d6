"""A training state: made by `step.init`, moved on by `apply`, changed by `replace`."""

import pytest
import torch

import ftrain
from ftrain import TrainState, optim
from ftrain.modules import decoder

CFG = decoder.preset("llama-tiny")


def init_state(key: torch.Tensor) -> TrainState:
    return TrainState.create(ftrain.init(decoder.specs(CFG), key), optim.adamw(1e-3))


def test_init_under_jit_gives_the_numbers_of_eager_init() -> None:
    step = ftrain.jit(lambda state: state)
    made, eager = step.init(init_state, ftrain.key(3)), init_state(ftrain.key(3))
    assert ftrain.tree.paths(made) == ftrain.tree.paths(eager)
    for a, b in zip(ftrain.tree.leaves(made), ftrain.tree.leaves(eager), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0)


def test_apply_counts_steps_and_moves_parameters() -> None:
    params = {"w": torch.ones(3)}
    tx = optim.sgd(0.5)
    state = TrainState.create(params, tx).apply(tx, {"w": torch.ones(3)})
    assert int(state.step) == 1
    torch.testing.assert_close(state.params["w"], torch.full((3,), 0.5))


def test_replace_refuses_unknown_fields() -> None:
    state = TrainState.create({"w": torch.ones(3)}, optim.sgd(0.5))
    assert state.replace(extra=7).extra == 7
    with pytest.raises(ValueError, match="has no field parms"):
        state.replace(parms=1)
