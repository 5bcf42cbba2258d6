"""Gradients are summed over ranks as soon as they exist, so that few whole ones are alive."""

import pytest
import torch

import ftrain
from ftrain.graph.loop import is_loop, loop_body
from ftrain.passes.early_reductions import sum_chains
from ftrain.sharding import Mesh, Plan
from ftrain.sharding.link import Link
from tests.helpers.mesh_models import accumulated, dense, mixture


def lowered(model, mesh):
    """The graph of a rank. No message is joined with another: a joined sum waits for the last of its gradients."""
    plan = Plan(mesh, batch=model.rules, link=Link(latency=0.0))
    step = ftrain.jit(model.step, plan=plan, specs=model.specs, overlap=False)
    params, batch = model.params(torch.float32), model.batch(mesh.replicate * mesh.shard)
    return step.lower(params, batch).graph


def backwards_after_the_first_sum(graph):
    names = [str(n.target) for n in graph.graph.nodes]
    first = next(i for i, name in enumerate(names) if "reduce_scatter" in name)
    return sum("attention_backward" in name for name in names[first:])


@pytest.mark.parametrize("ranks", [4, 64], ids=["even", "padded"])
@pytest.mark.parametrize("model", [dense(layers=4), mixture(layers=4)], ids=["dense", "mixture"])
def test_sums_come_between_the_layers_of_the_backward(model, ranks):
    """The trace sums all gradients after the last layer's; each layer's are summed before the next begins."""
    graph = lowered(model, Mesh(1, ranks, kind="fake"))
    assert sum_chains(graph)
    assert backwards_after_the_first_sum(graph) == 4


def test_bodies_of_loops():
    graph = lowered(accumulated(dense(layers=4), 2), Mesh(1, 4, kind="fake"))
    bodies = [loop_body(n) for n in graph.graph.nodes if is_loop(n)]
    summing = [b for b in bodies if any("reduce_scatter" in str(n.target) for n in b.graph.nodes)]
    assert [backwards_after_the_first_sum(body) for body in summing] == [4]
