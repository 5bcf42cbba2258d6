"""Orthogonalised updates: what torch's Muon does not do (stacks of matrices), and what the factor is for."""

import math
from typing import Any

import pytest
import torch

import ftrain
from ftrain import optim, tree
from ftrain.modules.spec import ParamSpec, zeros
from ftrain.sharding import Mesh, Plan


@pytest.mark.parametrize("shape", [(4, 6, 5), (3, 5, 8), (2, 3, 4, 4)])
def test_each_matrix_of_a_stack_is_orthogonalised_on_its_own(shape: tuple[int, ...]):
    torch.manual_seed(0)
    g = torch.randn(shape, dtype=torch.float64)
    stacked = optim.orthogonalize(g, dtype=torch.float64).flatten(0, -3)
    for one, together in zip(g.flatten(0, -3), stacked, strict=True):
        torch.testing.assert_close(together, optim.orthogonalize(one, dtype=torch.float64))


def test_stacks_are_updated_as_their_matrices():
    torch.manual_seed(0)
    stack, grad = torch.randn(3, 6, 4), torch.randn(3, 6, 4)
    tx = optim.muon(0.1, ns_dtype=torch.float32)
    updates, _ = tx.update(grad, tx.init(stack), stack)
    parts, part_grads = list(stack), list(grad)
    expected, _ = tx.update(part_grads, tx.init(parts), parts)
    torch.testing.assert_close(updates, torch.stack(expected))


@pytest.mark.parametrize("shape", [(6, 6), (6, 20), (20, 6)])
def test_singular_values_come_near_one_and_singular_vectors_stay(shape: tuple[int, int]):
    torch.manual_seed(0)
    g = torch.randn(shape, dtype=torch.float64)
    u, s, vh = torch.linalg.svd(g, full_matrices=False)
    inner = u.mT @ optim.orthogonalize(g, dtype=torch.float64) @ vh.mT
    assert torch.allclose(inner, torch.diag(inner.diagonal()), atol=1e-9)
    assert bool((s > 0.01 * s.max()).all())
    assert bool(((inner.diagonal() > 0.6) & (inner.diagonal() < 1.3)).all())


def test_a_zero_gradient_stays_zero():
    assert torch.equal(optim.orthogonalize(torch.zeros(3, 4)).float(), torch.zeros(3, 4))


@pytest.mark.parametrize(
    ("adjust", "shape", "factor"),
    [
        ("original", (4, 16), 2.0),
        ("original", (16, 4), 1.0),
        ("match_rms_adamw", (4, 16), 0.8),
        ("match_rms_adamw", (16, 4), 0.8),
    ],
)
def test_the_factor_counts_outputs_over_inputs(adjust: Any, shape: tuple[int, int], factor: float):
    """Weights are [in, out]: only where outputs outnumber inputs does the original rule enlarge the step."""
    torch.manual_seed(0)
    g = torch.randn(shape, dtype=torch.float64)
    tx = optim.muon(1.0, adjust=adjust, weight_decay=0.0, momentum=0.0, ns_dtype=torch.float64)
    updates, _ = tx.update(g, tx.init(g), g)
    torch.testing.assert_close(updates, -factor * optim.orthogonalize(g, dtype=torch.float64))
    assert math.isclose(
        float(updates.norm() / optim.orthogonalize(g, dtype=torch.float64).norm()), factor, rel_tol=1e-9
    )


def test_the_ranks_of_a_mesh_divide_the_work():
    """Of four ranks each makes a quarter of the products, and sends less than a gather of all momenta would."""
    specs = {f"w_{i}_IO": ParamSpec((16, 24), ("embed", "mlp"), zeros()) for i in range(8)}
    specs["w_EIO"] = ParamSpec((8, 16, 24), ("expert", "embed", "mlp"), zeros())
    tx = optim.muon(1e-2, ns_dtype=torch.bfloat16)

    def step(state, batch):
        return state["run"].apply(tx, state["grads"])

    params = ftrain.init(specs, ftrain.key(0))
    state = {"run": ftrain.TrainState.create(params, tx), "grads": params}
    alone = ftrain.jit(step).lower(state, torch.zeros(4))
    for mesh in (Mesh(1, 4, kind="fake"), Mesh(2, 2, kind="fake"), Mesh(4, kind="fake"), Mesh(1, 4, 1, 2, "fake")):
        rank = ftrain.jit(step, plan=Plan(mesh), specs=specs).lower(state, torch.zeros(4))
        assert rank.cost().flops == alone.cost().flops / 4
        whole = sum(p.numel() for p in tree.leaves(params)) * torch.float32.itemsize
        assert sum(rank.bytes_moved().values()) < whole / 2


def test_without_a_dtype_newton_schulz_runs_in_what_the_device_is_fast_in():
    def dtypes(device):
        w = ftrain.Aval((16, 24), torch.float32, torch.device(device))
        tx = optim.muon(1e-2, ns_dtype=None)
        step = ftrain.jit(lambda w, g, m: tx.update(g, optim.MuonState(torch.zeros((), dtype=torch.int64), m), w)[0])
        return {n.meta["val"].dtype for n in step.lower(w, w, w).graph.graph.nodes if "mm" in str(n.target)}

    assert dtypes("cpu") == {torch.float32}
    assert dtypes("cuda:0") == {torch.bfloat16}
