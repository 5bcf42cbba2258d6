"""The omni MoE is searched on paper, at its real size, and runs with what was found."""

from dataclasses import replace
from pathlib import Path

import pytest

from experiments.omni import planning, training
from experiments.omni.planning import OmniWorkload, laid_out, mesh_flags
from experiments.omni_moe import Options, main
from ftrain import AutoPlan, SavedPlan, tree
from ftrain.analysis.cluster import cluster
from ftrain.analysis.meter import measure_peak
from ftrain.cli.plan import default_packs, load_workload
from ftrain.modules import omni
from ftrain.plan.cost import count, price
from ftrain.plan.file import PlanFile, load_plan
from ftrain.plan.lowering import draft
from ftrain.plan.space import Candidate
from ftrain.run.ranks import MeshFlags
from ftrain.sharding import Layout, Mesh, Ulysses

ROOT = Path(__file__).resolve().parents[2]
H100 = cluster("h100")
CANDIDATE = Candidate(1, 2, 2, 2, Ulysses(), 1, "layer")


def test_the_experiment_offers_its_workload_in_every_size():
    workload = load_workload(ROOT / "experiments/omni_moe.py", 160 * 1024, 16, "30b-a3b")
    assert (workload.name, workload.model_shape.experts, workload.stacks["foundation"]) == ("omni MoE 30b-a3b", 128, 48)
    assert load_workload(ROOT / "experiments/omni_moe.py", 1024, 4, "tiny").model_shape.layers == 3
    with pytest.raises(ValueError, match="takes no size"):
        load_workload(ROOT / "experiments/decoder_plan.py", 1024, 4, "tiny")


def test_a_layout_is_priced_and_nothing_is_allocated():
    workload = OmniWorkload("medium", tokens=64 * 1024, packs=4)
    found = []
    few = {"foundation": 1, "encoders": 1}

    def counted():
        found.append(count(draft(workload.make(few, CANDIDATE), CANDIDATE, H100), spare=None))

    peak = measure_peak(counted).peak
    assert found[0].inputs > 1e8
    assert max(found[0].peaks.values()) > 1e9
    assert peak < 1e6


def test_encoders_and_decoders_have_a_layout_of_their_own():
    copies = Layout(parameters=(), sequence=None)
    workload = replace(OmniWorkload("tiny", tokens=1024, packs=2), parts=copies)
    plan = workload.make({"foundation": 1, "encoders": 1}, CANDIDATE).plan(CANDIDATE)
    placements = plan.placements(omni.specs(workload.model))
    for path, placement in placements.items():
        assert bool(placement.splits) == path.startswith("foundation"), path


def test_every_layer_of_the_model_is_counted():
    workload = OmniWorkload("tiny", tokens=1024, packs=2)
    whole = omni.specs(workload.model)
    assert len(whole["foundation"]["layers"]) == 3
    assert len(omni.specs(workload.shallow({"foundation": 1, "encoders": 1}))["foundation"]["layers"]) == 1
    work = workload.make(workload.stacks, CANDIDATE)
    assert tree.paths(work.specs) == tree.paths(whole)


@pytest.mark.parametrize(("gpus", "tokens", "packs"), [(128, 8192, 128), (128, 160 * 1024, 16), (8, 1 << 20, 1)])
def test_packs_of_a_step_by_default(gpus, tokens, packs):
    assert default_packs(gpus, tokens) == packs


def test_batches_for_any_layout_have_a_pack_and_a_part_for_each_rank():
    mesh = Mesh(1, 2, 2, kind="virtual")
    assert laid_out(None, None) == (None, 1, 1)
    assert laid_out(None, mesh)[1:] == (2, 2)
    auto, packs, parts = laid_out("auto", mesh)
    assert isinstance(auto, AutoPlan)
    assert (auto.ranks, auto.kind, packs, parts) == (4, "virtual", 4, 4)
    assert dict(auto.components) == training.plan(mesh).components
    assert laid_out("plan.json", mesh) == (SavedPlan("plan.json", "virtual"), 2, 2)


def test_a_plan_file_gives_the_sizes_of_the_mesh(tmp_path, monkeypatch):
    found = PlanFile("omni", "h100", 1024, 2, CANDIDATE)
    file = str(found.save(tmp_path / "plan.json"))
    assert mesh_flags(None, MeshFlags(shard=3)) == mesh_flags("auto", MeshFlags(shard=3)) == MeshFlags(shard=3)
    assert mesh_flags(file, MeshFlags(timeout=9.0)) == MeshFlags(1, 2, 2, 2, timeout=9.0)
    monkeypatch.setenv("RANK", "0")
    with pytest.raises(ValueError, match="is a plan for 4 ranks"):
        mesh_flags(file, MeshFlags())
    replace(found, candidate=replace(CANDIDATE, micro_batches=2)).save(file)
    with pytest.raises(ValueError, match="has 2 micro-batches"):
        mesh_flags(file, MeshFlags())


@pytest.mark.exhaustive
def test_the_experiment_runs_with_a_plan_that_was_found(tmp_path):
    workload = OmniWorkload("tiny", tokens=1024, packs=2)
    file = tmp_path / "plan.json"
    made = PlanFile.of(price(workload, replace(CANDIDATE, sequence=1, expert=1, attention=None), H100), workload, H100)
    made.save(file)
    assert load_plan(file).components == {"encoders": planning.WHOLE, "decoders": planning.WHOLE}
    short = {"steps": 2, "tokenizer_steps": 2, "held_out": 1, "checkpoint_every": 0}
    assert main(Options(out=tmp_path / "run", plan=str(file), **short)) == 0
