"""The second and later calls on a mesh of processes: as fast as on one device, and as careful as the first."""

import gc
import weakref

import torch
from torch.distributed.tensor import DTensor

import ftrain
from ftrain import Mean
from ftrain.modules.spec import Constant, ParamSpec
from ftrain.sharding import Mesh, Plan
from tests.helpers.rank_processes import run

SPECS = {"w": ParamSpec((5, 3), ("embed", "mlp"), Constant(0.5)), "b": ParamSpec((4,), ("embed",), Constant(0.25))}


def loss(params, batch):
    e = (batch["x"] @ params["w"]).square().sum(-1) * params["b"].sum()
    return Mean(e.sum(), torch.full((), float(e.numel())))


def descend(state, batch):
    grads = ftrain.grad(loss)({k: state[k] for k in SPECS}, batch)
    return {**{k: state[k] - 0.01 * grads[k] for k in SPECS}, "count": state["count"] + 1}


def started(step):
    return step.init(lambda key: {**ftrain.init(SPECS, key), "count": torch.zeros(())}, ftrain.key(0))


def refusal(function):
    try:
        function()
    except ValueError as error:
        return str(error)
    return "no refusal"


def later_calls(rank, found):
    step = ftrain.jit(descend, plan=Plan(Mesh(shard=2)), specs=SPECS, donate="state")
    one = ftrain.jit(descend, donate="state")
    batch = {"x": torch.arange(40.0).view(8, 5) / 40}
    state, alone, held, shown, off = started(step), started(one), [], [], 0.0
    for i in range(9):
        if i % 3 == 1:
            held.append(state)
        if i % 4 == 2:
            with torch.no_grad():
                shown.append(state["w"].to_local())
        state, alone = step(state, step.share(batch)), one(alone, batch)
        whole = step.whole(state)
        off = max(off, *(float((whole[k] - alone[k]).abs().max()) for k in alone))
    results = {
        "traces": step.traces,
        "off": off,
        "distinct": len({id(s[k]) for s in [*held, state] for k in SPECS}),
        "held": [refusal(lambda s=s, k=k: s[k] + 1) for s in held for k in SPECS],
        "gathered": [refusal(lambda s=s: s["w"].full_tensor()) for s in held],
        "whole leaf": [refusal(lambda s=s: s["count"] + 1) for s in held],
        "shown": [refusal(lambda x=x: x + 1) for x in shown],
        "passed again": refusal(lambda: step(held[-1], step.share(batch))),
    }
    results["types"] = {type(state[k]) is DTensor for k in SPECS}
    state["w"].note = "the user's own"
    state = step(state, step.share(batch))
    state = step(state, step.share(batch))
    results["attributes"] = hasattr(state["w"], "note")
    memory = weakref.ref(state["w"].padded_piece)
    del state
    gc.collect()
    results["memory is given back"] = memory() is None
    found[rank] = results


def test_later_calls_equal_one_device_and_what_was_donated_is_refused():
    for results in run(later_calls, 2).values():
        assert results["traces"] == 1
        assert results["off"] < 1e-6
        assert results["types"] == {True}
        assert results["distinct"] == 8
        for kind in ("held", "gathered", "whole leaf", "shown"):
            assert results[kind]
            assert all("was donated to a step" in said for said in results[kind]), (kind, results[kind])
        assert "was donated" in results["passed again"]
        assert not results["attributes"]
        assert results["memory is given back"]


def doubled(state, batch):
    return {name: leaf + leaf for name, leaf in state.items()}


def dtypes(rank, found):
    """A state in every dtype keeps it, from call to call and back from a checkpoint's shapes."""
    step = ftrain.jit(doubled, plan=Plan(Mesh(shard=2)), donate="state", specs=step_specs())
    state = step.init(lambda key: ftrain.init(step_specs(), key), ftrain.key(0))
    seen = []
    for _ in range(5):
        state = step(state, {"x": torch.full((1,), float(rank))})
        whole = step.whole(state)
        kinds = {k: (str(v.dtype)[6:], str(v.to_local().dtype)[6:]) for k, v in state.items()}
        seen.append({k: (*kind, whole[k].tolist()) for k, kind in kinds.items()})
    found[rank] = seen


DTYPES = (torch.float32, torch.bfloat16, torch.float64)


def step_specs():
    return {str(d)[6:]: ParamSpec((4,), ("embed",), Constant(1.0), d) for d in DTYPES}


def test_leaves_keep_their_dtypes():
    for seen in run(dtypes, 2).values():
        for n, leaves in enumerate(seen):
            assert leaves == {name: (name, name, [2.0 ** (n + 1)] * 4) for name in step_specs()}


def other_arguments(rank, found):
    """A state that is not as the last one was: other pieces, other shapes, no DTensors."""
    plan = Plan(Mesh(shard=2))
    step = ftrain.jit(descend, plan=plan, specs=SPECS, donate="state")
    batch = {"x": torch.arange(40.0).view(8, 5) / 40}
    state = started(step)
    for _ in range(3):
        state = step(state, step.share(batch))
    fresh = started(step)
    expected = step.whole(step(started(step), step.share(batch)))
    half = {"x": torch.arange(20.0).view(4, 5) / 20}
    results = {
        "another state": torch.equal(step.whole(step(fresh, step.share(batch)))["w"], expected["w"]),
        "another batch": float(step(started(step), step.share(half))["count"]),
        "traces": step.traces,
        "a plain tensor": refusal(lambda: step(step.whole(started(step)), step.share(batch))),
    }
    found[rank] = results


def test_arguments_that_differ_from_the_last_ones_are_looked_at():
    for results in run(other_arguments, 2).values():
        assert results["another state"]
        assert results["another batch"] == 1.0
        assert results["traces"] == 2
        assert "is a whole tensor of shape (4,); on a mesh of processes it is divided" in results["a plain tensor"]
