"""What somebody kept of a donated leaf keeps its numbers, however it was kept and at whichever call."""

import gc
import itertools
import warnings

import numpy as np
import pytest
import torch
from torch import nn

import ftrain
from ftrain.modules.spec import Constant, ParamSpec
from ftrain.runtime.argument_memory import ArgumentMemory
from ftrain.runtime.other_holders import OtherHolders
from ftrain.sharding import Mesh, Plan
from ftrain.sharding.private import local_of
from tests.helpers.rank_processes import run

KEPT = {
    "detach": lambda w: w.detach(),
    "data": lambda w: w.data,
    "a row": lambda w: w[0],
    "a view": lambda w: w.view(-1),
    "a parameter": lambda w: nn.Parameter(w, requires_grad=False),
    "numpy": lambda w: w.numpy(),
    "dlpack": np.from_dlpack,
    "its storage": lambda w: torch.empty(0, dtype=w.dtype).set_(w.untyped_storage(), 0, w.shape),
}


def step(state, batch):
    return {"w": state["w"] * 0.5 - batch.sum(), "count": state["count"] + 1}


def fresh():
    return {"w": torch.randn(2, 3, dtype=torch.float64), "count": torch.zeros(())}, torch.ones(2, dtype=torch.float64)


def as_array(kept):
    return kept if isinstance(kept, np.ndarray) else kept.detach().numpy()


def copied(tree):
    return {key: x.clone() for key, x in tree.items()}


def quietly(jitted, state, batch):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        return jitted(state, batch)


@pytest.mark.parametrize("calls", [1, 2, 4])
@pytest.mark.parametrize("keep", KEPT.values(), ids=KEPT)
def test_what_was_kept_has_its_numbers_and_the_leaf_is_named(keep, calls):
    jitted, (state, batch) = ftrain.jit(step, donate="state"), fresh()
    for _ in range(calls):
        state = quietly(jitted, state, batch)
    expected, kept = step(copied(state), batch), keep(state["w"])
    before = as_array(kept).copy()
    with pytest.warns(UserWarning, match=r"holds the memory of 'state.w' \(a view.*step writes.*a copy of 48 B"):
        new = jitted(state, batch)
    assert np.array_equal(as_array(kept), before)
    assert torch.equal(new["w"], expected["w"])
    with pytest.raises(ValueError, match=r"leaf 'state.w' was donated"):
        state["w"] + 1
    memory = new["w"].data_ptr()
    new = quietly(jitted, new, batch)
    assert new["w"].data_ptr() == memory
    assert np.array_equal(as_array(kept), before)


@pytest.mark.parametrize("keep", KEPT.values(), ids=KEPT)
@pytest.mark.filterwarnings("ignore:something else than the state")
def test_also_before_the_first_call(keep):
    (state, batch), jitted = fresh(), ftrain.jit(step, donate="state")
    expected, kept = step(copied(state), batch), keep(state["w"])
    before = as_array(kept).copy()
    assert torch.equal(jitted(state, batch)["w"], expected["w"])
    assert np.array_equal(as_array(kept), before)


def test_a_gradient_that_needs_a_leaf_gets_its_old_numbers():
    (state, batch), jitted = fresh(), ftrain.jit(step, donate="state")
    state = jitted(state, batch)
    x = torch.ones(2, 3, dtype=torch.float64, requires_grad=True)
    loss, before = (x * state["w"]).sum(), state["w"].clone()
    with pytest.warns(UserWarning, match=r"'state.w'"):
        jitted(state, batch)
    loss.backward()
    assert torch.equal(x.grad, before)


def test_memory_of_numpy_is_left_alone_without_noise():
    array, jitted = np.ones((2, 3)), ftrain.jit(step, donate="state")
    state = quietly(jitted, {"w": torch.from_numpy(array), "count": torch.zeros(())}, fresh()[1])
    assert np.array_equal(array, np.ones((2, 3)))
    assert state["w"].unique().tolist() == [-1.5]
    memory = state["w"].data_ptr()
    assert quietly(jitted, state, fresh()[1])["w"].data_ptr() == memory


def test_a_look_by_numpy_that_is_over_costs_nothing():
    (state, batch), jitted = fresh(), ftrain.jit(step, donate="state")
    state = quietly(jitted, state, batch)
    state = quietly(jitted, state, batch)
    for _ in range(3):
        state["w"].numpy().sum()
        memory = state["w"].data_ptr()
        state = quietly(jitted, state, batch)
        assert state["w"].data_ptr() == memory


def test_parameters_of_a_module_may_be_the_state():
    module = nn.Linear(3, 2).double().requires_grad_(False)
    expected = module.weight * 0.5 - 2
    jitted, memory = ftrain.jit(step, donate="state"), module.weight.data_ptr()
    new = quietly(jitted, {"w": module.weight, "count": torch.zeros(())}, fresh()[1])
    assert torch.equal(new["w"], expected)
    assert new["w"].data_ptr() == memory
    with pytest.raises(ValueError, match="was donated"):
        module(torch.ones(1, 3).double())


def test_a_module_whose_parameters_were_detached_stays_as_it_is():
    module = nn.Linear(3, 2).double()
    before = module.weight.clone()
    with pytest.warns(UserWarning, match=r"'state.w'.*a parameter of a module"):
        ftrain.jit(step, donate="state")({"w": module.weight.detach(), "count": torch.zeros(())}, fresh()[1])
    assert torch.equal(module.weight, before)


@pytest.mark.parametrize("kept_from", [0, 2])
def test_donated_leaves_that_are_kept_hold_no_memory(kept_from):
    (state, batch), jitted, kept, memory = fresh(), ftrain.jit(step, donate="state"), [], None
    for i in range(8):
        if i >= kept_from:
            kept.append(state)
        state = quietly(jitted, state, batch)
        assert memory in (None, state["w"].data_ptr())
        memory = state["w"].data_ptr()


def test_a_new_state_that_is_also_shown_keeps_what_is_shown():
    def shows(state, batch):
        new = step(state, batch)
        return new, {"w": new["w"]}

    (state, batch), jitted = fresh(), ftrain.jit(shows, donate="state")
    state, shown = jitted(state, batch)
    before = shown["w"].clone()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        jitted(state, batch)
    assert torch.equal(shown["w"], before)


def test_a_parts_of_one_buffer_leave_the_buffer():
    buffer = torch.arange(6.0, dtype=torch.float64)
    jitted = ftrain.jit(step, donate="state")
    new = jitted({"w": buffer[:3], "count": buffer[3:]}, torch.ones(2))
    assert new["w"].tolist() == [-2, -1.5, -1]
    assert buffer.tolist() == [0, 1, 2, 3, 4, 5]


def test_what_a_recorded_program_keeps_is_no_other_holder():
    state, memory = [torch.ones(3), torch.zeros(())], ArgumentMemory({0, 1}, device_type="cpu")
    holders = OtherHolders("step", ["w", "n"], [0, 1], memory)
    for _ in range(4):
        assert holders.copy_shared(state) is state
        memory.watch(state)
    memory.settle(state)
    assert holders.copy_shared(state) is state
    assert holders.known_unshared(state)
    kept = state[0].detach()
    assert not holders.known_unshared(state)
    with pytest.warns(UserWarning, match="'w'"):
        other = holders.copy_shared(state)
    assert other[0].data_ptr() != kept.data_ptr()
    assert other[1] is state[1]


SPECS = {"w": ParamSpec((4, 3), ("embed", "mlp"), Constant(0.5))}


def started(jitted):
    return jitted.init(lambda key: ftrain.init(SPECS, key), ftrain.key(0))


def test_a_virtual_mesh_leaves_what_was_kept():
    jitted = ftrain.jit(
        lambda state, batch: {"w": state["w"] * 0.5},
        donate="state",
        plan=Plan(Mesh(shard=2, kind="virtual")),
        specs=SPECS,
    )
    state = started(jitted)
    for _ in range(3):
        kept, before = state["w"].detach(), state["w"].clone()
        state = jitted(state, {"x": torch.ones(4)})
        assert torch.equal(kept, before)
        assert torch.equal(state["w"], before * 0.5)


def on_processes(rank, found):
    jitted = ftrain.jit(
        lambda state, batch: {"w": state["w"] * 0.5}, donate="state", plan=Plan(Mesh(shard=2)), specs=SPECS
    )
    state, wrong, noise, moved = started(jitted), [], 0, []
    for i in range(8):
        whole = state["w"].full_tensor()
        kept = state["w"].to_local() if i % 3 == 2 else None
        before = None if kept is None else kept.clone()
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            state = jitted(state, {"x": torch.ones(4) * rank})
        moved.append(state["w"].padded_piece.data_ptr())
        noise += len([w for w in said if "holds the memory of 'state.w'" in str(w.message)])
        if kept is not None and not torch.equal(kept, before):
            wrong.append(i)
        if not torch.equal(state["w"].full_tensor(), whole * 0.5):
            wrong.append(-i)
    found[rank] = wrong, noise, [a != b for a, b in itertools.pairwise(moved)]


def test_a_mesh_of_processes_leaves_what_was_kept_of_a_piece():
    copied = [False, True, False, False, True, False, False]
    assert run(on_processes, 2) == {0: ([], 1, copied), 1: ([], 1, copied)}
    gc.collect()


def with_a_local_held_for_a_while(rank, found):
    jitted = ftrain.jit(
        lambda state, batch: {"w": state["w"] * 0.5}, donate="state", plan=Plan(Mesh(shard=2)), specs=SPECS
    )
    state, batch = started(jitted), {"x": torch.ones(4) * rank}
    for _ in range(3):
        state = jitted(state, batch)
    held = [local_of(state["w"])]
    state = jitted(state, batch)
    held.clear()
    kept = state["w"].to_local()
    before = kept.clone()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        jitted(state, batch)
    found[rank] = torch.equal(kept, before)


def test_a_tensor_around_a_piece_that_was_replaced_does_not_hide_what_is_kept():
    assert run(with_a_local_held_for_a_while, 2) == {0: True, 1: True}
