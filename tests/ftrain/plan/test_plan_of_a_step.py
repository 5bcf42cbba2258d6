"""A step takes the plan of a file, or one searched at start-up, and computes what one device computes."""

import json
from dataclasses import replace

import pytest
import torch

import ftrain
from ftrain import AutoPlan, Aval, Remat, SavedPlan, tree
from ftrain.modules.mesh_packing import BATCH
from ftrain.modules.vision_media import RULES
from ftrain.plan.file import PlanFile, load_plan
from ftrain.plan.search import Options, Space
from ftrain.plan.space import Candidate
from ftrain.sharding import Layout, Ring, Ulysses
from ftrain.sharding.layout import CapacityFactor
from ftrain.sharding.link import Link
from tests.helpers.mesh_models import dense, mixture

DENSE = dense(layers=1)
FILE = PlanFile(
    workload="small",
    cluster="h100",
    tokens=32,
    packs=2,
    candidate=Candidate(1, 2, 2, 1, Ulysses(), 1, "layer"),
    components={"layers.*.mlp": Layout(parameters=("shard",))},
    link=Link(3.0, 1e9),
)
SEARCHED = Options(traced=1, processes=1, space=Space(rings=False), memory=1.0)


def equals_one_device(model, step, packs, rtol=1e-5):
    params, batch = model.params(torch.float32), model.batch(packs)
    many, one = step(params, batch), ftrain.jit(model.step)(params, batch)
    for path, a, b in zip(tree.paths(one), tree.leaves(one), tree.leaves(many), strict=True):
        torch.testing.assert_close(b, a, rtol=rtol, atol=1e-5, msg=lambda m, path=path: f"{path}: {m}")


def shapes(tree_of_tensors):
    return tree.map(Aval.of, tree_of_tensors)


def test_a_step_with_a_plan_file_computes_what_one_device_computes(tmp_path):
    plan = SavedPlan(FILE.save(tmp_path / "plan.json"), kind="virtual")
    step = ftrain.jit(DENSE.step, plan=plan, specs=DENSE.specs)
    equals_one_device(DENSE, step, packs=2)
    chosen = step.choose()
    assert (chosen.mesh, chosen.default) == (FILE.candidate.mesh("virtual"), FILE.candidate.layout)
    assert chosen.layout("layers.0.mlp.w") == Layout(parameters=("shard",))
    assert chosen.link == FILE.link


def test_the_file_says_what_is_recomputed_unless_the_step_does(tmp_path):
    plan = SavedPlan(FILE.save(tmp_path / "plan.json"), kind="virtual")
    state, batch = shapes(DENSE.params(torch.float32)), shapes(DENSE.batch(2))
    flops = [
        ftrain.jit(DENSE.step, plan=plan, specs=DENSE.specs, remat=remat).lower(state, batch).cost().flops
        for remat in (None, "layer", Remat("none"))
    ]
    assert flops[0] == flops[1] > flops[2]


def test_everything_of_a_plan_is_written_and_read(tmp_path):
    components = {
        "a.*": Layout(("shard",), Ring(zigzag=False), CapacityFactor(2.0), 3, "bfloat16"),
        "b": Layout((), None, None),
    }
    file = replace(FILE, components=components, batch=dict(BATCH))
    data = json.loads(file.save(tmp_path / "plan.json").read_text())
    plan = SavedPlan(tmp_path / "plan.json")
    assert data["components"]["a.*"]["sequence"] == {"kind": "ring", "zigzag": False}
    assert load_plan(plan.file) == file
    optional = replace(file, batch=dict(RULES))
    assert load_plan(optional.save(tmp_path / "plan.json")) == optional
    del data["batch"]["encoders.*.features.*"]["optional"]  # as older files were written
    (tmp_path / "plan.json").write_text(json.dumps(data))
    assert load_plan(tmp_path / "plan.json") == file


def test_a_plan_for_one_rank_is_no_mesh(tmp_path):
    alone = replace(FILE, candidate=Candidate(1, 1, 1, 1, None, 1, "layer"), components={})
    file = alone.save(tmp_path / "plan.json")
    step = ftrain.jit(DENSE.step, plan=str(file))
    equals_one_device(DENSE, step, packs=1)
    assert step.choose() is None


def test_a_plan_that_does_not_fit_the_run_or_the_model_is_named(tmp_path):
    file = FILE.save(tmp_path / "plan.json")
    args = DENSE.params(torch.float32), DENSE.batch(2)
    with pytest.raises(ValueError, match=r"none.json: there is no such plan"):
        ftrain.jit(DENSE.step, plan=tmp_path / "none.json")(*args)
    with pytest.raises(ValueError, match=r"plan.json is a plan for 4 ranks .*this run has 1.*--gpus 1"):
        ftrain.jit(DENSE.step, plan=str(file), specs=DENSE.specs)(*args)
    with pytest.raises(ValueError, match=r"has layouts of layers.\*.mlp: give ftrain.jit the model's specs"):
        ftrain.jit(DENSE.step, plan=SavedPlan(file, "virtual"))(*args)
    with pytest.raises(
        ValueError, match=r"plan.json, made for 'small', .*Plan\(components=...\): 'layers.\*.mlp' matches"
    ):
        ftrain.jit(mixture().step, plan=SavedPlan(file, "virtual"), specs=mixture().specs)(*args)
    with pytest.raises(ValueError, match=r"\(params, data\) has no argument 'batch', so every rank would compute all"):
        ftrain.jit(lambda params, data: params, plan=SavedPlan(file, "virtual"), specs=DENSE.specs)(*args)
    with pytest.raises(ValueError, match=r"plan=3 is not a ftrain.Plan"):
        ftrain.jit(DENSE.step, plan=3)


@pytest.mark.parametrize("model", [DENSE, mixture(layers=1)], ids=["dense", "mixture"])
def test_auto_finds_a_layout_that_computes_what_one_device_computes(model):
    auto = AutoPlan(ranks=2, kind="virtual", memory="16GiB", batch=model.rules, options=SEARCHED)
    step = ftrain.jit(model.step, plan=auto, specs=model.specs)
    equals_one_device(model, step, packs=2)
    assert step.choose().mesh.size == 2


@pytest.mark.parametrize("ranks", [1, 2])
def test_auto_fits_the_memory_that_it_is_given(ranks):
    model = dense(layers=2)
    state, batch = shapes(model.params(torch.float32)), shapes(model.batch(32))
    kind = "process" if ranks == 1 else "virtual"

    def lowered(memory, traced):
        options = replace(SEARCHED, traced=traced, space=Space(remats=("none", "layer"), rings=False))
        auto = AutoPlan(ranks=ranks, packs=32, kind=kind, memory=memory, options=options)
        return ftrain.jit(model.step, plan=auto, specs=model.specs).lower(state, batch)

    free = lowered("16GiB", 1)
    budget = int(0.9 * free.memory().total)
    tight = lowered(budget, 4)
    assert tight.memory().total <= budget
    assert tight.cost().flops > free.cost().flops


def test_auto_says_what_it_lacks():
    state, batch = DENSE.params(torch.float32), DENSE.batch(2)
    with pytest.raises(ValueError, match=r"call step\.choose"):
        ftrain.jit(DENSE.step, plan="auto", specs=DENSE.specs).init(lambda key: key, ftrain.key(0))
    with pytest.raises(ValueError, match=r"give ftrain\.jit the model's specs"):
        ftrain.jit(DENSE.step, plan="auto")(state, batch)
    with pytest.raises(ValueError, match=r"no layout of .* on 2 ranks fits into 10 KiB"):
        ftrain.jit(DENSE.step, plan=AutoPlan(ranks=2, kind="virtual", memory=10_240), specs=DENSE.specs)(state, batch)
    with pytest.raises(ValueError, match=r"does not divide into 3 packs"):
        ftrain.jit(DENSE.step, plan=AutoPlan(ranks=3, kind="virtual"), specs=DENSE.specs)(state, batch)
    with pytest.raises(ValueError, match="this run has 1 processes"):
        ftrain.jit(DENSE.step, plan=AutoPlan(ranks=3), specs=DENSE.specs)(state, batch)
    with pytest.raises(ValueError, match="searches steps of a state and a 'batch'"):
        ftrain.jit(lambda a, b, c: a, plan="auto", specs=DENSE.specs)(state, batch, batch)
