"""Donated leaves share memory with nothing else, at any call."""

import pytest
import torch

import ftrain
from ftrain.runtime.shared_memory import SharedMemory


def step(state, batch):
    return {"ema": state["ema"] * 0.9 + state["w"] * 0.1, "w": state["w"] - batch.sum()}


def fresh():
    return {"w": torch.arange(3.0), "ema": torch.zeros(3)}, torch.ones(2)


@pytest.mark.parametrize("calls", [0, 1, 2, 3])
def test_a_shared_leaf_is_refused_at_any_call(calls):
    jitted = ftrain.jit(step, donate="state")
    state, batch = fresh()
    for _ in range(calls):
        state = jitted(state, batch)
    shared = torch.arange(3.0)
    with pytest.raises(ValueError, match=r"'state.ema' and 'state.w' share memory"):
        jitted({"w": shared, "ema": shared}, batch)
    assert torch.equal(shared, torch.arange(3.0))


def test_a_batch_that_looks_at_the_state_is_refused():
    jitted = ftrain.jit(step, donate="state")
    state, _ = fresh()
    for _ in range(3):
        state = jitted(state, torch.ones(2))
    with pytest.raises(ValueError, match=r"'state.w' and 'batch' share memory"):
        jitted(state, state["w"][1:])


def test_a_captured_tensor_on_the_state_is_refused():
    state, batch = fresh()
    reference = state["w"]
    jitted = ftrain.jit(lambda state, batch: {k: v - reference for k, v in state.items()}, donate="state")
    with pytest.raises(ValueError, match=r"'state.w' and 'reference'.*which the step captures, share memory"):
        jitted(state, batch)


def test_parts_of_one_buffer_that_do_not_overlap_are_fine():
    buffer = torch.arange(6.0)
    got = ftrain.jit(step, donate="state")({"w": buffer[:3], "ema": buffer[3:]}, torch.ones(2))
    assert got["w"].tolist() == [-2, -1, 0]


def test_spans():
    x = torch.zeros(4, 6)
    memory = SharedMemory(["a", "b", "c"], [0], {})
    memory.require_none([x[:, :3].clone(), x, x], contiguous=True)
    with pytest.raises(ValueError, match="'a' and 'b'"):
        memory.require_none([x[:, :3], x[3], torch.ones(1)], contiguous=False)
    memory.require_none([x[:2], x[2], torch.ones(0)], contiguous=True)
