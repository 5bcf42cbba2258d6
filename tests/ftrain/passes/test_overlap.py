"""Passes on the collectives of a step: what they move, and that no bit of a result changes."""

import pytest
import torch

import ftrain
from ftrain import tree
from ftrain.analysis.communication import bytes_moved
from ftrain.analysis.liveness import plan_memory
from ftrain.analysis.op_times import OpTimes
from ftrain.analysis.pieces import Pieces
from ftrain.analysis.simulate import Costs, OneLink, simulate
from ftrain.graph.collectives import COLLECTIVES
from ftrain.graph.loop import copy_graph
from ftrain.graph.order import reorder
from ftrain.passes.bucket import bucket
from ftrain.passes.overlap import _Scheduler, overlap, simulate_schedule
from ftrain.passes.sink_gathers import gather_chains
from ftrain.sharding import Layout, Mesh, Ring
from ftrain.sharding.link import Link, sent_bytes
from tests.helpers.mesh_models import dense, mixture, omni, plan_for
from tests.helpers.mesh_steps import MESH, SLOW, SMALL, lowered, step_of


def collectives(compiled, purpose):
    return [n for n in compiled.graph.graph.nodes if n.target in COLLECTIVES and n.meta.get("purpose") == purpose]


@pytest.mark.parametrize(
    ("layout", "remat"),
    [(Layout(expert_chunks=2), "layer"), (Layout(sequence=Ring()), "none")],
    ids=["chunks, recompute", "ring"],
)
def test_no_bit_changes_on_any_link(layout, remat):
    """A link on which all is hidden, one on which half is, and one on which nothing can be."""
    model = mixture(layers=1)
    params, batch = model.params(torch.float32), model.batch(4)
    plain = step_of(model, overlap=False, layout=layout, remat=remat)(params, batch)
    for link in (Link(0.0, 1e12), Link(5.0, 1e8), Link(500.0, 1e6)):
        found = step_of(model, link=link, layout=layout, remat=remat)(params, batch)
        assert all(map(torch.equal, tree.leaves(plain), tree.leaves(found))), link


@pytest.mark.parametrize("model", [dense(), mixture()], ids=["dense", "mixture"])
def test_communication_hides_behind_compute(model):
    without, with_ = (lowered(model, overlap=o, link=Link(5.0, 2e9)).schedule() for o in (False, True))
    assert without.exposed == pytest.approx(without.communication)
    assert with_.exposed < 0.8 * without.exposed
    assert with_.communication == pytest.approx(without.communication)
    table = with_.table()
    assert "fsdp_gather" in table
    assert f"exposed {with_.exposed:.0f} us" in table


def test_memory_stays_within_its_bound():
    model = dense()
    peaks = [lowered(model, overlap=o, link=SMALL).memory().peak for o in (False, True)]
    assert peaks[1] <= 1.5 * peaks[0]


@pytest.mark.parametrize("bandwidth", [1e8, 2e8, 4e8])
def test_memory_that_a_step_leaves_free_never_makes_it_slower(bandwidth):
    """On a mesh of shapes: what is free is what messages may be ahead by, and no more is used than helps."""
    mesh, link = Mesh(1, 8, 2, kind="fake"), Link(5.0, bandwidth)
    plain = lowered(dense(layers=4), overlap=False, link=link, mesh=mesh)
    times, peak = OpTimes.on(torch.device("cpu"), mesh), plain.memory().peak
    took, peaks, frees = [], [], (0, peak // 4, peak, 4 * peak, 16 * peak)
    for free in frees:
        module = copy_graph(plain.graph)
        overlap(module, mesh, times=times, link=link, within=peak + free)
        found = simulate_schedule(module, mesh, times=times, link=link)
        took.append(found.compute + found.exposed)
        peaks.append(plan_memory(module).peak)
    assert took == sorted(took, reverse=True)
    assert all(p <= peak + free for p, free in zip(peaks[1:], frees[1:], strict=True))


def test_the_memory_that_bounds_messages_is_that_of_the_plan():
    """The order is made node by node, the plan is of the whole: results and workspaces count in both."""
    mesh, link = Mesh(1, 8, 2, kind="fake"), Link(5.0, 2e8)
    module = lowered(mixture(), overlap=False, link=link, mesh=mesh).graph
    costs = Costs.of(module, OpTimes.on(torch.device("cpu"), mesh), OneLink(mesh, link))
    pieces = Pieces.of(module)
    scheduler = _Scheduler(module, pieces, costs, 2 * pieces.peak)
    reorder(scheduler.run())
    assert scheduler._memory.peak == plan_memory(module).peak != pieces.peak
    assert scheduler._streams.clock == pytest.approx(simulate(module, costs).tally.step)


def test_parameters_are_gathered_where_they_are_needed_and_again_for_the_backward():
    """Without reordering the gather of a layer stands behind the compute of the one before."""
    compiled = lowered(dense(), overlap=False, link=SMALL, mesh=Mesh(1, 4, kind="virtual"))
    order = {n: i for i, n in enumerate(compiled.graph.graph.nodes)}
    gathers = [n for n in collectives(compiled, "fsdp_gather") if n.meta["path"].endswith("layers.1.mlp.w_up_DF")]
    assert [n.meta["phase"] for n in gathers] == ["forward", "backward"]
    before = [n for n in order if "layers.0" in (n.meta.get("path") or "") and n.meta.get("phase") == "forward"]
    assert order[gathers[0]] > max(order[n] for n in before if n.target not in COLLECTIVES)


def test_whole_parameters_may_be_kept():
    model = dense()
    again, kept = (lowered(model, remat=ftrain.Remat(gathered=g)) for g in ("again", "keep"))
    assert sum(again.bytes_moved().values()) > sum(kept.bytes_moved().values())


@pytest.mark.parametrize("model", [dense(), mixture()], ids=["dense", "mixture"])
def test_layers_that_are_computed_again_share_the_gathers_of_their_backward(model):
    none, layer, kept = (
        lowered(model, mesh=Mesh(1, 4, kind="virtual"), link=SMALL, remat=remat)
        for remat in ("none", "layer", ftrain.Remat("layer", gathered="keep"))
    )
    moved, wanted = layer.bytes_moved()["fsdp_gather"], none.bytes_moved()["fsdp_gather"]
    assert moved <= 1.02 * wanted, "but for scales that only the forward reads"
    once = {n.meta["path"] for n in collectives(none, "fsdp_gather")}
    assert sorted(n.meta["path"] for n in collectives(kept, "fsdp_gather")) == sorted(once)
    assert layer.memory().peak < none.memory().peak
    assert layer.cost().flops > 1.1 * none.cost().flops


def test_small_messages_are_joined_and_bytes_are_the_same():
    joined, single = (lowered(dense(), link=link) for link in (SLOW, SMALL))
    assert len(collectives(joined, "fsdp_gather")) * 4 < len(collectives(single, "fsdp_gather"))
    assert joined.bytes_moved() == single.bytes_moved()


def test_joining_keeps_what_depends_on_one_another_apart():
    compiled = lowered(mixture(), link=SMALL, overlap=False)
    before = bytes_moved(compiled.graph, MESH)
    bucket(compiled.graph, limit=1 << 30)
    assert bytes_moved(compiled.graph, MESH) == before


def test_purposes_of_every_collective_are_known():
    model = omni()
    whole = Layout(sequence=None)
    plan = plan_for(model, Mesh(1, 2, 2, 2, "virtual"), Layout(), components={"encoders": whole, "decoders": whole})
    step = ftrain.jit(model.step, plan=plan, specs=model.specs)
    found = set(step.lower(model.params(torch.float32), model.batch(2)).bytes_moved())
    assert {"fsdp_gather", "fsdp_gather.T", "ulysses", "expert_dispatch", "merge", "take.T"} <= found
    assert "" not in found


def test_chains_of_gathers_hold_nothing_of_the_loss():
    compiled = lowered(dense(), overlap=False, link=SMALL, remat=ftrain.Remat(gathered="keep"))
    for node in gather_chains(compiled.graph):
        assert len(node.all_input_nodes) == 1
        assert node.meta["phase"] == "forward"


@pytest.mark.parametrize(("kind", "sent"), [
    ("all_gather", 300), ("reduce_scatter", 75), ("all_reduce", 150), ("all_to_all", 75), ("shift_ranks", 100),
])  # fmt: skip
def test_bytes_that_a_rank_sends(kind, sent):
    assert sent_bytes(kind, 100, 4) == sent
    assert Link(10.0, 1e6).microseconds(sent) == pytest.approx(10 + sent)
