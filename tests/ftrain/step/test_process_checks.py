"""A mesh of processes refuses on its first step what a virtual one refuses, and what only processes can do wrong."""

import resource
import time
import warnings
from pathlib import Path

import pytest
import torch

import ftrain
from ftrain import Mean
from ftrain.modules.spec import ParamSpec, ones
from ftrain.sharding import Layout, Mesh, Plan
from tests.helpers.rank_processes import run

SPECS = {"w": ParamSpec((4, 3), ("embed", "mlp"), ones())}


def loss(params, batch):
    e = (batch["x"] @ params["w"]).square()
    return Mean(e.sum(), torch.full((), float(e.numel())))


def descend(state, batch):
    return {"w": state["w"] - 0.1 * ftrain.grad(loss)(state, batch)["w"]}


def tried(function):
    """What a call raises or warns of, or that it runs."""
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        try:
            function()
        except ValueError as error:
            return f"ValueError: {error}"
    return " ".join(str(w.message) for w in said if "same batch" in str(w.message)) or "runs"


def mistakes(rank, found):
    plan = Plan(Mesh(replicate=2), Layout())
    whole = {"x": torch.arange(32.0).view(8, 4)}

    def made(step=descend, specs=SPECS):
        return ftrain.jit(step, plan=plan, specs=specs)

    own = torch.full((4, 3), float(rank + 1))
    equal = torch.ones(4, 3)
    right, unshared, apart = made(), made(), made()
    results = {
        "right": tried(lambda: right({"w": equal}, right.share(whole))),
        "no specs": tried(lambda: made(specs=None)({"w": equal}, right.share(whole))),
        "other names": tried(lambda: made(specs={"layer": SPECS})({"w": equal}, right.share(whole))),
        "not shared": tried(lambda: unshared({"w": equal}, whole)),
        "two models": tried(lambda: apart({"w": own}, right.share(whole))),
    }
    rates = made(lambda state, batch: {"w": descend(state, batch)["w"] * (1 + rank)})
    results["numbers of a rank"] = tried(lambda: rates({"w": equal}, right.share(whole)))
    branch = made(lambda state, batch: descend(state, batch) if rank else {"w": state["w"].neg()})
    results["branches of a rank"] = tried(lambda: branch({"w": equal}, right.share(whole)))
    options = ftrain.jit(descend, plan=plan, specs=SPECS, remat="all" if rank else "none")
    results["options of a rank"] = tried(lambda: options({"w": equal}, right.share(whole)))
    metric = made(lambda state, batch: (state, {"share": (batch["x"] > 3).float().mean()}))
    results["a rank's metric"] = tried(lambda: metric({"w": equal}, right.share(whole)))
    divided = ftrain.jit(descend, plan=Plan(Mesh(shard=2), Layout()), specs=SPECS)
    state = divided.init(lambda: {"w": torch.ones(4, 3)})
    results["made without a spec"] = tried(lambda: divided(state, divided.share(whole)))
    found[rank] = results


def test_mistakes_are_named_on_the_first_step():
    found = run(mistakes, 2)
    assert found[0] == found[1]
    said = found[0]
    assert said["right"] == said["made without a spec"] == "runs"
    assert "'state.w' is differentiated, and the plan knows no parameter" in said["no specs"]
    assert "the nearest it knows is 'layer.w'" in said["other names"]
    assert "every rank was given the same batch" in said["not shared"]
    assert (
        "leaf 'state.w' must be the same on ranks 0 and 1, and is not: make the state with step.init"
        in said["two models"]
    )
    for name in ("numbers", "branches", "options"):
        assert "ranks 0 and 1 trace different steps" in said[f"{name} of a rank"]
    assert "aten.neg" in said["branches of a rank"]
    assert "aten.mul.Tensor(sub, 1)" in said["numbers of a rank"]
    assert "policy='none'" in said["options of a rank"]
    assert (
        "result '1.share' must be the same on all ranks, and was computed from one rank's data"
        in said["a rank's metric"]
    )


@pytest.mark.parametrize(
    ("started", "words"),
    [(None, "run under torchrun, or take Mesh"), ("2", "torchrun started 2, but torch.distributed is not initialised")],
)
def test_processes_that_are_not_there_are_named(started, words, monkeypatch):
    if started is None:
        monkeypatch.delenv("WORLD_SIZE", raising=False)
    else:
        monkeypatch.setenv("WORLD_SIZE", started)
    with pytest.raises(ValueError, match=words):
        ftrain.jit(descend, plan=Plan(Mesh(shard=2)), specs=SPECS)({"w": torch.ones(4, 3)}, {"x": torch.ones(2, 4)})


def exhausted(rank, found):
    """One rank runs out of memory: it explains itself at once, and the other hears that it is lost."""
    specs = {"w": ParamSpec((64, 64), ("embed", "mlp"), ones())}

    def deep(params, batch):
        x = batch["x"]
        for _ in range(12):
            x = x + torch.tanh(x @ params["w"]).sin()
        return Mean(x.square().sum(), torch.full((), float(x.numel())))

    step = ftrain.jit(lambda state, batch: ftrain.grad(deep)(state, batch), plan=Plan(Mesh(replicate=2)), specs=specs)
    state, batch = {"w": torch.eye(64)}, {"x": torch.ones(1 << 17, 64)}
    step(state, {"x": torch.ones(64, 64) + rank})
    peak = step.lower(state, batch).memory().peak
    if rank == 0:
        pages = int(Path("/proc/self/statm").read_text().split()[0])
        room = pages * resource.getpagesize() + int(0.6 * peak)
        resource.setrlimit(resource.RLIMIT_AS, (room, resource.RLIM_INFINITY))
    began = time.monotonic()
    try:
        step(state, {"x": batch["x"] + rank})
    except RuntimeError as error:
        found[rank] = (type(error).__name__, str(error), time.monotonic() - began)


def test_a_rank_without_memory_does_not_wait_for_the_others():
    found = run(exhausted, 2, timeout=20)
    name, said, seconds = found[0]
    assert name == "OutOfMemory"
    assert "step" in said or "<lambda>" in said
    assert "recompute more: jit(remat=ftrain.Remat(budget=...))" in said
    assert seconds < 15
