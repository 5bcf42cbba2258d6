"""The hunt for NaNs and infinities on a mesh: the rank is named, and what only the sum over ranks has made is found."""

import pytest
import torch

from ftrain import tree
from ftrain.debug.finite import check_finite
from ftrain.kernels.mean import Mean
from ftrain.modules.spec import Normal, ParamSpec
from ftrain.plan.jit import jit
from ftrain.sharding import Mesh, Plan
from tests.helpers.momentum_steps import assert_same_bits, momentum_state, momentum_step

SPECS = {"w": ParamSpec((4, 6), ("embed", "mlp"), Normal(0.3))}


def log_loss(params, x_TD):
    rows_T = (x_TD @ params["w"]).sum(1).log()
    return Mean(rows_T.sum(), torch.ones_like(rows_T).sum())


def linear_loss(params, x_TD):
    return Mean(8 * (x_TD @ params["w"]).sum(), torch.full((), float(len(x_TD))))  # on two ranks of four rows: the sum


def make(mesh, loss):
    step = jit(momentum_step(loss), plan=Plan(mesh), specs=SPECS, donate="state")
    return step, momentum_state({"w": torch.full((4, 6), 0.5)}), torch.ones(8, 4)


@pytest.mark.parametrize("mesh", [Mesh(1, 2, kind="virtual"), Mesh(2, 1, kind="virtual"), Mesh(2, 2, kind="virtual")])
def test_a_sound_step_is_sound_and_its_arguments_stay(mesh):
    step, state, batch = make(mesh, log_loss)
    before = tree.map(torch.clone, state)
    assert check_finite(step, state, batch) is None
    assert_same_bits(state, before)
    step(state, batch)


def test_the_rank_whose_share_went_wrong_is_named():
    step, state, batch = make(Mesh(2, 2, kind="virtual"), log_loss)
    batch[5] = 0
    found = check_finite(step, state, batch)
    assert (found.kind, found.op, found.phase) == ("infinity", "log", "forward")
    assert (found.count, found.size) == (1, 2), "of the rows of one rank"
    assert found.rank == "rank 2 (replicate 1, shard 0, sequence 0)"
    assert "on rank 2 (replicate 1, shard 0, sequence 0)" in str(found)
    assert found.source.endswith(f"test_debug_mesh.py:{log_loss.__code__.co_firstlineno + 1}")


def test_an_overflow_of_the_sum_over_ranks_is_found_at_its_collective():
    step, state, batch = make(Mesh(1, 2, kind="virtual"), linear_loss)
    state["params"]["w"] /= 1e6
    batch[1, 2] = batch[6, 2] = 2e38
    found = check_finite(step, state, batch)
    assert (found.kind, found.phase, found.path) == ("infinity", "backward", "state.params.w")
    assert "reduce_scatter" in found.op
    assert all(given.finite for given in found.inputs)


def test_an_argument_is_named_as_the_caller_gave_it():
    step, state, batch = make(Mesh(1, 2, kind="virtual"), log_loss)
    batch[6, 1] = torch.nan
    found = check_finite(step, state, batch)
    assert (found.op, found.path, found.count, found.size) == ("input", "batch", 1, 32)
