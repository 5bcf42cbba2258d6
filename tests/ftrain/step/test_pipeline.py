"""Passes as data: one runner, what each did, leaving one out, and that each keeps every bit."""

import functools

import pytest
import torch

import ftrain
from ftrain.debug import check_passes
from ftrain.graph.loop import copy_graph, is_loop, loop_body
from ftrain.sharding import Mesh
from ftrain.step import pipeline
from ftrain.step.pipeline import DISABLE, EXECUTED, HIDDEN, PREPARED, Pass, run_passes
from ftrain.trace.accumulate import accumulate
from tests.helpers.mesh_models import dense, diffusion, mixture, omni, plan_for
from tests.helpers.momentum_steps import momentum_state, momentum_step, stack_batch, stack_loss, stack_params


def dropout_loss(params, batch):
    return stack_loss(params, (torch.nn.functional.dropout(batch[0], 0.5), batch[1]))


def halves():
    return tuple(x.unflatten(0, (2, -1)) for x in stack_batch(8))


@functools.cache
def steps():
    state, batch = momentum_state(stack_params()), stack_batch(8)
    micro = momentum_step(accumulate(stack_loss, 2, stacked=True))
    model = mixture(layers=1)
    params, data = ftrain.init(model.specs, ftrain.key(0)), model.batch(2)
    by_price = ftrain.Remat(us_per_mb=1e6)
    mesh = {"plan": plan_for(model, Mesh(1, 2, 1, 2, kind="virtual")), "specs": model.specs}
    return {
        "a step": (momentum_step(stack_loss), {"donate": "state"}, (state, batch)),
        "layers again": (momentum_step(stack_loss), {"donate": "state", "remat": "layer"}, (state, batch)),
        "by price": (
            momentum_step(stack_loss),
            {"donate": "state", "remat": by_price},
            (state, batch),
        ),
        "a loop": (micro, {"donate": "state"}, (state, halves())),
        "dropout": (momentum_step(dropout_loss), {"donate": "state", "remat": "all"}, (state, batch)),
        "compiled": (momentum_step(stack_loss), {"donate": "state", "backend": "inductor"}, (state, stack_batch(512))),
        "a mesh": (model.step, mesh, (params, data)),
        "a mesh, all again": (model.step, {**mesh, "remat": "all"}, (params, data)),
        **{f"{name}, layers again": trained(make(), {"remat": "layer"}) for name, make in FAMILIES.items()},
        "dense, offloaded": trained(dense(layers=1), {"remat": ftrain.Remat(paths={"**": "offload"})}),
    }


FAMILIES = {"mixture": lambda: mixture(layers=1), "omni": omni, "diffusion": diffusion}
MAY_RAISE_THE_PEAK = {"bucket", "overlap", "recompute_by_policy", "update_early"}
"""Joined messages need their buffers, overlap takes free memory, a policy by layers asks for no
budget, and what `update_early` makes early is written over old state only by `donate`, after it."""


def trained(model, options):
    """A step of gradient descent on one pack."""

    def step(params, batch):
        _, _, grads = model.step(params, batch)
        return ftrain.tree.map(lambda p, g: p - 0.1 * g, params, grads)

    return step, {"donate": "params", **options}, (model.params(torch.float32), model.batch(1))


@pytest.mark.slow
@pytest.mark.parametrize("name", steps())
def test_every_pass_keeps_every_bit_and_only_some_may_raise_the_peak(name):
    fn, options, args = steps()[name]
    found = check_passes(ftrain.jit(fn, **options), *args)
    assert {check.name: check.changed for check in found if check.changed} == {}
    assert any(check.difference for check in found)
    assert "donate" in [check.name for check in found]
    raised = {check.name: check.peaks for check in found if check.peaks[1] > check.peaks[0]}
    assert raised.keys() <= MAY_RAISE_THE_PEAK, raised


def test_a_pass_that_changes_a_value_is_found(monkeypatch):
    def spoil(module):
        node = next(n for n in module.graph.nodes if n.target is torch.ops.aten.tanh.default)
        node.target = torch.ops.aten.sin.default

    broken = tuple(Pass("clean", lambda m, s: spoil(m)) if p.name == "clean" else p for p in PREPARED)
    monkeypatch.setattr("ftrain.step.compile.PREPARED", broken)
    found = {c.name: c.changed for c in check_passes(lambda x: {"y": x.tanh(), "z": x + 1}, torch.ones(3))}
    assert found["clean"] == ("y",)


def test_the_table_tells_what_each_pass_did():
    compiled = ftrain.jit(lambda x: x.detach().sin().detach() + x.cos() * 0).lower(torch.ones(3))
    rows = {run.name: run for run in compiled.passes}
    assert rows["clean"].removed == {"detach": 2}
    assert not rows["clean"].added
    assert not rows["clean"].reordered
    assert "clean" in compiled.pass_table()
    assert "-2 detach" in compiled.pass_table()
    assert "overlap" not in rows


def test_a_pass_is_left_out_by_name(monkeypatch):
    step = ftrain.jit(momentum_step(stack_loss), donate="state")
    args = momentum_state(stack_params()), stack_batch(8)
    usual = step.lower(*args)
    monkeypatch.setenv(DISABLE, "update_early, reinplace,write_in_place,reuse_memory")
    without = ftrain.jit(momentum_step(stack_loss), donate="state").lower(*args)
    assert {r.name for r in usual.passes} - {r.name for r in without.passes} == {"update_early"}
    assert without.memory().peak > usual.memory().peak
    monkeypatch.setenv(DISABLE, "assign_paths")
    with pytest.raises(ValueError, match=r"FTRAIN_DISABLE_PASSES names 'assign_paths'.*cannot be left out"):
        ftrain.jit(lambda x: x.sin()).lower(torch.ones(3))
    monkeypatch.setenv(DISABLE, "inline")
    with pytest.raises(ValueError, match=r"names 'inline', which is no pass; passes are join_waits, clean"):
        ftrain.jit(lambda x: x.sin()).lower(torch.ones(3))


def test_the_runner_goes_into_the_bodies_of_loops():
    step = ftrain.jit(momentum_step(accumulate(stack_loss, 2, stacked=True)), donate="state")
    compiled = step.lower(momentum_state(stack_params()), halves())
    module = copy_graph(compiled.graph)
    seen = []
    each = Pass("look", lambda m, s: seen.append(m), bodies=True)
    run_passes(module, [each], compiled.setting)
    bodies = [loop_body(n) for n in module.graph.nodes if is_loop(n)]
    assert bodies
    assert seen == [*bodies, module]


def test_names_are_those_of_one_pass_each():
    names = [p.name for p in (*PREPARED, *HIDDEN, *pipeline.DONATED, *pipeline.INTERPRETED)]
    assert len(set(names)) == len(names)
    assert {p.name for p in EXECUTED} < set(names)


def test_a_mesh_of_processes_is_refused():
    model = dense()
    step = ftrain.jit(model.step, plan=plan_for(model, Mesh(1, 1)), specs=model.specs)
    with pytest.raises(ValueError, match="kind='virtual'"):
        check_passes(step, ftrain.init(model.specs, ftrain.key(0)), model.batch(1))
