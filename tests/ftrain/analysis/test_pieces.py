"""One table of pieces of memory, and all that is asked of it: the ways to ask agree on every graph."""

import random

import pytest
import torch
from torch import fx

from ftrain.analysis.liveness import plan_memory
from ftrain.analysis.pieces import Pieces, Walk, op_workspace
from ftrain.passes.early_updates import update_early
from ftrain.plan.jit import jit
from ftrain.plan.liveness_by_region import peak_by_region
from ftrain.remat.peak import PeakModel
from ftrain.remat.planner import write_choice
from ftrain.remat.policy import Remat
from ftrain.trace.accumulate import accumulate
from ftrain.trace.grad import value_and_grad
from tests.helpers.mesh_models import dense, mixture
from tests.helpers.mesh_steps import SLOW
from tests.helpers.mesh_steps import lowered as lowered_on_mesh
from tests.helpers.momentum_steps import momentum_state, momentum_step, stack_batch, wide_loss, wide_params
from tests.helpers.planners import BLOCKS, linked_planner, planner_of, random_planner

STATE, BATCH = momentum_state(wide_params(3)), stack_batch(64)
ALL = Remat(paths={"layers.*": "offload"})
MICRO = tuple(x.reshape(4, 16, 16) for x in BATCH)


def offloaded(seed):
    """A random graph of which a random part waits on the host."""
    planner, rng = linked_planner(seed, 1e9), random.Random(seed)
    write_choice(planner, planner._priced(frozenset(t for t, _, _ in planner._offload_choices if rng.random() < 0.7)))
    return planner.module


GRAPHS = {
    **{f"random {seed}": (lambda seed=seed: random_planner(seed).module) for seed in range(6)},
    **{f"offloaded {seed}": (lambda seed=seed: offloaded(seed)) for seed in range(3)},
    **{f"block {name}": (lambda name=name: planner_of(BLOCKS[name]).module) for name in BLOCKS},
    "loop": lambda: jit(value_and_grad(accumulate(wide_loss, 4, stacked=True))).lower(STATE["params"], MICRO).graph,
    "offload in place": lambda: jit(momentum_step(wide_loss), donate="state", remat=ALL).lower(STATE, BATCH).executed,
    "dense on a mesh": lambda: lowered_on_mesh(dense(), link=SLOW).graph,
    "mixture on a mesh": lambda: lowered_on_mesh(mixture(), link=SLOW).graph,
}


@pytest.fixture(scope="module", params=GRAPHS)
def module(request):
    return GRAPHS[request.param]()


def shuffled(module, seed):
    """The numbers of the graph's nodes in a random order in which each comes after what it reads."""
    rng = random.Random(seed)
    nodes = [n for n in module.graph.nodes if n.op != "output"]
    index = {n: i for i, n in enumerate(nodes)}
    missing = [len(n.all_input_nodes) for n in nodes]
    ready, order = [i for i, count in enumerate(missing) if not count], []
    while ready:
        i = ready.pop(rng.randrange(len(ready)))
        order.append(i)
        for user in (index[u] for u in nodes[i].users if u in index):
            missing[user] -= 1
            if not missing[user]:
                ready.append(user)
    return order


def in_order(module, order):
    """A copy of the graph with its nodes in the order of these numbers."""
    nodes = [n for n in module.graph.nodes if n.op != "output"]
    graph, copies = fx.Graph(), {}
    for i in order:
        copies[nodes[i]] = graph.node_copy(nodes[i], copies.__getitem__)
    graph.output(fx.node.map_arg(module.graph.output_node().args[0], copies.__getitem__))
    return fx.GraphModule(module, graph)


@pytest.mark.parametrize("seed", [None, 0, 1])
def test_an_order_made_node_by_node_has_the_peak_of_its_memory_plan(module, seed):
    order = range(len(module.graph.nodes) - 1) if seed is None else shuffled(module, seed)
    pieces, walk = Pieces.of(module), Walk(Pieces.of(module))
    expected = Pieces.of(in_order(module, order))
    for at, i in enumerate(order):
        most, alive = walk.peak_of(i), expected.live[at] + pieces.workspace[i]
        assert alive == most
        assert walk.peak_of(*order[at : at + 5]) == expected.total[at : at + 5].max()
        walk.run(i)
    assert walk.peak == plan_memory(in_order(module, order)).peak
    assert walk.live == sum(pieces.device[list(pieces.results)])


def test_nothing_recomputed_has_the_peak_of_the_graph(module):
    assert PeakModel(module, {}).peak(frozenset())[0] == plan_memory(module).peak


@pytest.mark.parametrize("family", BLOCKS)
@pytest.mark.parametrize("share", [0.2, 0.7])
def test_the_peak_with_tensors_recomputed_is_that_of_the_rewritten_graph(family, share):
    planner, rng = planner_of(BLOCKS[family]), random.Random(family)
    choice = planner._priced(frozenset(v for v, _, _ in planner.choices.candidates if rng.random() < share))
    assert choice.recomputed
    write_choice(planner, choice)
    assert plan_memory(planner.module).peak == choice.peak


def test_the_moments_of_a_search_have_the_peak_of_the_graph(module):
    """Tensors on the host and bodies of loops included."""
    found = peak_by_region(module, workspace=op_workspace)
    assert max(found.values()) == plan_memory(module, round_to=512).peak


def test_what_will_be_written_over_donated_leaves_is_not_counted():
    step = momentum_step(wide_loss)
    donated = jit(step, donate="state").lower(STATE, BATCH)
    module = jit(step, donate=None).lower(STATE, BATCH).graph
    outputs = donated.donation.by_name(module)
    update_early(module, outputs)
    pieces = Pieces.of(module, donated=outputs)
    assert pieces.peak == donated.memory().peak < plan_memory(module).peak
    assert PeakModel(module, outputs).peak(frozenset())[0] == pieces.peak


def test_a_view_whose_size_depends_on_data_does_not_change_the_size_of_its_memory():
    """`expect_sizes` gives such a view a stand-in with memory of its own."""
    graph = fx.Graph()
    x = graph.placeholder("x")
    y = graph.call_function(torch.ops.aten.sin.default, (x,))
    view = graph.call_function(torch.ops.aten.narrow.default, (y, 0, 0, 2))
    x.meta["val"], y.meta["val"] = torch.empty(8, device="meta"), torch.empty(8, device="meta")
    view.meta.update(val=y.meta["val"][:2], sized=torch.empty(2, device="meta"))
    graph.output([view])
    module = fx.GraphModule({}, graph)
    assert plan_memory(module).peak == PeakModel(module, {}).peak(frozenset())[0] == 8 * 4
