"""What a manifest knows of the parameters, and a restore that divides a state by it."""

import json

import pytest
import torch

import ftrain
from ftrain import optim, tree
from ftrain.checkpoint import Checkpointer, restore, save
from ftrain.modules import decoder, spec
from ftrain.sharding import Layout, Mesh, Plan

CFG = decoder.preset("llama-tiny")
SPECS = decoder.specs(CFG)


def trained():
    return ftrain.TrainState.create(ftrain.init(SPECS, ftrain.key(0)), optim.adamw(1e-3))


def test_the_manifest_tells_the_logical_axes_of_every_parameter(tmp_path):
    with Checkpointer(tmp_path, specs=SPECS) as checkpoints:
        checkpoints.save(trained(), 3)
    found = json.loads((tmp_path / "global_step_3" / "manifest.json").read_text())["parameters"]
    wanted = {
        path: {"shape": list(leaf.shape), "axes": list(leaf.axes)} for path, leaf in spec.leaves_with_paths(SPECS)
    }
    assert found == wanted
    assert found["layers.0.attention.w_q_DHK"]["axes"] == ["embed", "heads"]


def test_on_a_virtual_mesh_a_plan_changes_nothing(tmp_path):
    state = trained()
    save(state, tmp_path, 1, specs=SPECS)
    restored = restore(state, tmp_path, plan=Plan(Mesh(1, 2, kind="virtual")))
    assert all(map(torch.equal, tree.leaves(restored), tree.leaves(state)))


def test_a_checkpoint_without_axes_names_the_ways_out(tmp_path):
    state = trained()
    save(state, tmp_path, 1)
    with pytest.raises(ValueError, match=r"global_step_1 does not tell the logical axes .*specs=.*step.abstract"):
        restore(state, tmp_path, plan=Plan(Mesh(1, 2)))


def test_a_plan_for_another_model_is_refused(tmp_path):
    state = trained()
    save(state, tmp_path, 1, specs=SPECS)
    plan = Plan(Mesh(1, 2, kind="virtual"), components={"layers.*.moe": Layout()})
    with pytest.raises(ValueError, match=r"'layers.\*.moe' matches nothing; nearest: 'layers.1.mlp"):
        restore(state, tmp_path, plan=plan)
