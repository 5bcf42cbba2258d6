"""A budget is a peak in bytes: the plan keeps it, the run keeps the plan, and no bit of the result changes."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ftrain import tree
from ftrain.analysis.cuda_allocator import CUBLAS_WORKSPACE
from ftrain.analysis.meter import measure_peak
from ftrain.plan.jit import jit
from ftrain.remat import planner as remat_budget
from ftrain.remat.fit import ImpossibleBudget, decisions
from ftrain.remat.planner import budget_bytes
from ftrain.remat.policy import Remat, parse_budget
from ftrain.trace.accumulate import accumulate
from ftrain.trace.grad import value_and_grad
from tests.helpers.momentum_steps import (
    assert_same_bits,
    momentum_state,
    momentum_step,
    stack_batch,
    wide_loss,
    wide_params,
)
from tests.helpers.planners import scripted_loss

STATE, BATCH = momentum_state(wide_params()), stack_batch(256)


def lowered(remat, *, loss=wide_loss, batch=BATCH):
    return jit(momentum_step(loss), donate="state", remat=remat).lower(STATE, batch)


@pytest.fixture(scope="module")
def plans():
    return {policy: lowered(policy).memory() for policy in ("none", "layer")}


@pytest.mark.parametrize("share", [0.9, 0.5, 0.25])
def test_the_peak_is_within_the_budget_and_measured_so(plans, share):
    inputs, most = plans["none"].inputs, plans["none"].peak
    remat = Remat(budget=int(inputs + share * most))
    plan = lowered(remat).memory()
    assert plan.total <= remat.budget
    step = jit(momentum_step(wide_loss), donate="state", remat=remat)
    state, _ = step(momentum_state(wide_params()), BATCH)
    measured = measure_peak(lambda: step(state, BATCH)).peak
    assert abs(measured - plan.peak) <= 0.02 * plan.peak


def test_at_the_peak_of_whole_layers_less_is_computed_again(plans):
    budget = lowered(Remat(budget=plans["layer"].total))
    assert budget.memory().peak <= plans["layer"].peak
    assert budget.cost().flops < lowered("layer").cost().flops


def test_a_larger_budget_never_costs_more(plans):
    inputs, most = plans["none"].inputs, plans["none"].peak
    flops = [lowered(Remat(budget=int(inputs + share * most))).cost().flops for share in (0.25, 0.5, 1.0)]
    assert flops == sorted(flops, reverse=True)
    assert flops[-1] == lowered("none").cost().flops


def test_an_impossible_budget_names_the_smallest_one_and_what_stands_in_the_way():
    with pytest.raises(ValueError, match=r"arguments take .* a budget of \d+ bytes fits") as refusal:
        lowered(Remat(budget="1KB"))
    smallest = int(str(refusal.value).split("a budget of ")[1].split()[0])
    assert lowered(Remat(budget=smallest)).memory().total <= smallest


def test_the_smallest_budget_is_that_of_the_whole_step_also_where_a_loop_stands_in_the_way():
    loss, batch = accumulate(wide_loss, 4, stacked=True), tuple(x.reshape(4, 64, 16) for x in BATCH)
    with pytest.raises(ImpossibleBudget) as refusal:
        lowered(Remat(budget="1KB"), loss=loss, batch=batch)
    smallest = refusal.value.smallest
    assert lowered(Remat(budget=str(smallest)), loss=loss, batch=batch).memory().total <= smallest


def test_an_exchange_rate_instead_of_a_budget(plans):
    peaks = [lowered(Remat(us_per_mb=rate)).memory().peak for rate in (1e-3, 1e6)]
    assert peaks[0] == plans["none"].peak
    assert peaks[1] < 0.5 * peaks[0]


def test_paths_are_kept_or_computed_again():
    computed = lowered(Remat(paths={"layers.3.*": "recompute"}))
    copies = [n.meta["path"] for n in computed.graph.graph.nodes if n.meta.get("recomputed")]
    assert copies
    assert all(".layers.3." in path for path in copies)
    kept = lowered(Remat("layer", paths={"state.params.layers.3.w_in": "keep"}))
    copies = [n.meta["path"] for n in kept.graph.graph.nodes if n.meta.get("recomputed")]
    assert copies
    assert not any("layers.3.w_in" in path for path in copies)


def test_micro_batches_fit_too():
    batch = tuple(x.reshape(4, 64, 16) for x in stack_batch(256))
    loss = accumulate(wide_loss, 4, stacked=True)
    none = lowered("none", loss=loss, batch=batch).memory()
    remat = Remat(budget=int(none.inputs + 0.6 * none.peak))
    assert lowered(remat, loss=loss, batch=batch).memory().total <= remat.budget
    plain = jit(momentum_step(loss))(STATE, batch)
    assert_same_bits(plain, jit(momentum_step(loss), remat=remat)(STATE, batch))


def test_the_book_tells_what_was_decided(plans):
    inputs, most = plans["none"].inputs, plans["none"].peak
    compiled = lowered(Remat(budget=int(inputs + 0.4 * most)))
    made = {row.decision for row in decisions(compiled.graph)}
    assert made == {"keep", "recompute"}
    table = compiled.remat_table()
    assert "us/MB" in table
    assert "state.params.layers.0.w_in" in table
    assert "recompute: " in table


@settings(max_examples=8, deadline=None)
@given(
    ops=st.lists(st.lists(st.sampled_from(["tanh", "square", "sin", "soft"]), max_size=3), min_size=1, max_size=3),
    depth=st.integers(1, 4),
    share=st.floats(0.1, 1.0),
)
def test_random_steps_under_random_budgets_keep_every_bit(ops, depth, share):
    loss = scripted_loss(ops)
    params, batch = wide_params(depth), stack_batch(32)
    step = lambda params, batch: value_and_grad(loss)(params, batch)  # noqa: E731
    plan = jit(step).lower(params, batch).memory()
    try:
        small = jit(step, remat=Remat(budget=int(plan.inputs + share * plan.peak)))(params, batch)
    except ValueError as refusal:
        if "bytes fits" not in str(refusal):
            raise
        return
    for a, b in zip(tree.leaves(jit(step)(params, batch)), tree.leaves(small), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize(("text", "bytes_"), [
    ("60GiB", 60 << 30), ("1.5 MB", 1_500_000), ("70%", 0.7), ("fit", "fit"), (123, 123), ("7B", 7), ("123", 123),
])  # fmt: skip
def test_budgets_as_people_write_them(text, bytes_):
    assert parse_budget(text) == bytes_


@pytest.mark.parametrize(("arguments", "message"), [
    ({"budget": "60 apples"}, "give bytes, '60GiB', '70%' or 'fit'"),
    ({"policy": "layer", "budget": "1GB"}, "not several of them"),
    ({"paths": {"layers.*": "drop"}}, "'keep' or to 'recompute'"),
])  # fmt: skip
def test_options_are_checked(arguments, message):
    with pytest.raises(ValueError, match=message):
        Remat(**arguments)


def test_fit_leaves_a_margin_of_what_is_free(monkeypatch):
    """Of a CPU a twentieth; on a card what the allocator reserves beyond a plan is less than that only with expandable
    segments."""
    free = 80 << 30
    monkeypatch.setattr(remat_budget, "free_bytes", lambda device: free)
    remat = Remat(budget="fit")
    assert budget_bytes(remat, torch.device("cpu"), 1000) == 1000 + int(0.95 * free)
    card = torch.device("cuda", 0)
    monkeypatch.setenv("PYTORCH_ALLOC_CONF", "expandable_segments:True")
    assert budget_bytes(remat, card, 1000) == 1000 + int(0.95 * (free - CUBLAS_WORKSPACE))
    monkeypatch.setenv("PYTORCH_ALLOC_CONF", "")
    assert budget_bytes(remat, card, 1000) == 1000 + int((free - CUBLAS_WORKSPACE) / 1.25)
    assert budget_bytes(Remat(budget="60GiB"), card, 1000) == 60 << 30
