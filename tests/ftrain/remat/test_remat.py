"""Recompute changes what is kept, and no bit of the result."""

import pytest

from ftrain.analysis.meter import measure_peak
from ftrain.plan.jit import jit
from ftrain.remat.policy import Remat
from ftrain.trace.accumulate import accumulate
from tests.helpers.momentum_steps import (
    assert_same_bits,
    momentum_state,
    momentum_step,
    stack_batch,
    stack_loss,
    stack_params,
    wide_loss,
    wide_params,
)

POLICIES = ["none", "layer", "all"]


@pytest.mark.parametrize("loss", [stack_loss, wide_loss])
@pytest.mark.parametrize("micro_batches", [None, 2])
def test_results_are_equal_to_the_bit(loss, micro_batches):
    params = stack_params() if loss is stack_loss else wide_params()
    batch = stack_batch()
    if micro_batches:
        loss, batch = accumulate(loss, 2, stacked=True), tuple(x.reshape(2, 4, 16) for x in batch)
    results = [jit(momentum_step(loss), donate="state", remat=p)(momentum_state(params), batch) for p in POLICIES]
    assert_same_bits(results[0], results[1])
    assert_same_bits(results[0], results[2])


def test_layers_are_computed_again_and_the_peak_falls():
    state, batch = momentum_state(wide_params()), stack_batch(256)
    plans = {p: jit(momentum_step(wide_loss), donate="state", remat=p).lower(state, batch) for p in POLICIES}
    peaks = {p: plan.memory().peak for p, plan in plans.items()}
    flops = {p: plan.cost().flops for p, plan in plans.items()}
    assert peaks["layer"] < 0.4 * peaks["none"]
    assert peaks["all"] <= peaks["layer"]
    assert flops["none"] < flops["layer"] <= flops["all"] <= 4 / 3 * flops["none"]


def test_the_peak_really_falls():
    batch = stack_batch(256)
    peaks = []
    for policy in ("none", "layer"):
        step = jit(momentum_step(wide_loss), donate="state", remat=policy)
        state, _ = step(momentum_state(wide_params()), batch)
        peaks.append(measure_peak(lambda step=step, state=state: step(state, batch)).peak)
    assert peaks[1] < 0.4 * peaks[0]


def test_copies_stand_where_the_backward_needs_them():
    compiled = jit(momentum_step(wide_loss), remat="layer").lower(momentum_state(wide_params()), stack_batch())
    copies = [n for n in compiled.graph.graph.nodes if n.meta.get("recomputed")]
    assert {n.meta["phase"] for n in copies} == {"backward"}
    layers = [int(n.meta["path"].split(".layers.")[1][0]) for n in copies if ".layers." in n.meta["path"]]
    assert layers == sorted(layers, reverse=True)


def test_policies_by_name():
    assert Remat.of("layer") == Remat("layer")
    assert Remat.of(Remat("all")) == Remat("all")
    with pytest.raises(ValueError, match=r"Remat\('some'\): the policy is 'none', 'layer' or 'all'"):
        Remat.of("some")


def test_a_glob_that_matches_nothing_is_named():
    step = jit(momentum_step(stack_loss), remat=Remat(paths={"layers.*.w": "recompute", "layer.*": "keep"}))
    with pytest.raises(ValueError, match=r"'layer.\*'.* matches no parameter that the forward pass uses"):
        step(momentum_state(stack_params()), stack_batch())
