"""A mesh of processes refuses on its first step what a virtual one refuses, and what only processes can do wrong."""

import warnings

import pytest
import torch
from rank_processes import run

import ftrain
from ftrain import Mean
from modules.spec import ParamSpec, ones
from sharding import Layout, Mesh, Plan

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
    metric = made(lambda state, batch: (state, {"share": (batch["x"] > 3).float().mean()}))
    results["a rank's metric"] = tried(lambda: metric({"w": equal}, right.share(whole)))
    found[rank] = results


def test_mistakes_are_named_on_the_first_step():
    found = run(mistakes, 2)
    assert found[0] == found[1]
    said = found[0]
    assert said["right"] == "runs"
    assert "'state.w' is differentiated, and the plan knows no parameter" in said["no specs"]
    assert "the nearest it knows is 'layer.w'" in said["other names"]
    assert "every rank was given the same batch" in said["not shared"]
    assert (
        "leaf 'state.w' must be the same on ranks 0 and 1, and is not: make the state with step.init"
        in said["two models"]
    )
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
