"""Gradients are summed over ranks as soon as they exist: fewer whole ones are alive, and no value changes."""

import math

import pytest
import torch
from mesh_models import accumulated, dense, mixture

import ftrain
from ftrain.compiled import copy_graph
from ftrain.liveness import plan_memory
from ftrain.lockstep import lockstep_program
from ftrain.passes.sum_early import sum_chains, sum_early
from sharding import Mesh, Plan
from sharding.link import Link
from sharding.spmd import coordinates

MESH = Mesh(2, 2, kind="virtual")


def lowered(model, mesh=MESH):
    """No message is joined with another: a joined sum has to wait for the last of its gradients."""
    plan = Plan(mesh, batch=model.rules, link=Link(latency=0.0))
    step = ftrain.jit(model.step, plan=plan, specs=model.specs, overlap=False)
    params, batch = model.params(torch.float32), model.batch(mesh.replicate * mesh.shard)
    return step.lower(params, batch)


def example(aval):
    numbers = torch.arange(math.prod(aval.shape)).view(aval.shape)
    return torch.sin(numbers).to(aval.dtype) if aval.dtype.is_floating_point else numbers % 3


@pytest.mark.parametrize("model", [dense(layers=2), mixture(layers=2)], ids=["dense", "mixture"])
def test_values_stay_and_the_peak_does_not_rise(model):
    compiled = lowered(model)
    early = copy_graph(compiled.graph)
    sum_early(early)
    assert sum_chains(early)
    assert plan_memory(early).peak <= plan_memory(compiled.graph).peak
    inputs = [[*map(example, compiled.traced.input_avals[:-1]), coordinates(MESH, rank)] for rank in range(MESH.size)]
    results = [lockstep_program(graph, MESH)(inputs) for graph in (compiled.graph, early)]
    for before, after in zip(*results, strict=True):
        assert all(map(torch.equal, before, after))


@pytest.mark.parametrize("ranks", [4, 64], ids=["even", "padded"])
def test_sums_come_between_the_layers_of_the_backward(ranks):
    """The trace sums all gradients after the last layer's; moved, each layer's are summed before the next begins."""
    graph = lowered(dense(layers=4), Mesh(1, ranks, kind="fake")).graph

    def backwards_after_the_first_sum():
        names = [str(n.target) for n in graph.graph.nodes]
        first = next(i for i, name in enumerate(names) if "reduce_scatter" in name)
        return sum("attention_backward" in name for name in names[first:])

    assert backwards_after_the_first_sum() == 0
    sum_early(graph)
    assert backwards_after_the_first_sum() == 4


def test_bodies_of_loops():
    compiled = lowered(accumulated(dense(), 2))
    before = plan_memory(compiled.graph).peak
    sum_early(compiled.graph)
    assert plan_memory(compiled.graph).peak <= before
