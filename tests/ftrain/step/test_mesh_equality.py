"""Every legal mesh of up to 16 ranks computes what one device computes: the loss and every gradient."""

import functools
import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ftrain.sharding import CapacityFactor, Dropless, Hybrid, Layout, Mesh, Ring, Ulysses, collectives
from tests.helpers.mesh_models import compare, dense, diffusion, mixture, omni, plan_for

MODELS = {
    "dense": functools.cache(lambda: dense(layers=1)),
    "mixture": functools.cache(lambda: mixture(layers=1)),
    "diffusion": functools.cache(diffusion),
    "diffusion of ids": functools.cache(lambda: diffusion(told=False)),
}
OMNI = functools.cache(omni)


def meshes(experts: bool):
    """All meshes of replicate 1, 2 x shard 1, 2, 4 x sequence 1, 2, 4 (x expert 1, 2, 4), each with its ways to share
    a sequence.
    """
    for replicate, shard, sequence in itertools.product((1, 2), (1, 2, 4), (1, 2, 4)):
        if replicate * shard * sequence > 16:
            continue
        ways = {1: [Ulysses()], 2: [Ulysses(), Ring()], 4: [Ulysses(), Ring(), Hybrid(2)]}[sequence]
        for how, expert in itertools.product(ways, (1, 2, 4) if experts else (1,)):
            if (shard * sequence) % expert == 0:
                yield Mesh(replicate, shard, sequence, expert, "virtual"), how


def case(*values, mesh, how, number, every):
    """One in `every` is part of the suite, all are part of `make test-exhaustive`."""
    name = "-".join([*values, f"{mesh.replicate}x{mesh.shard}x{mesh.sequence}e{mesh.expert}-{how}"])
    marks = [] if number % every == 0 else [pytest.mark.exhaustive]
    return pytest.param(*values, mesh, how, id=name, marks=marks)


# Of these, one in so many still has each size of each axis and, but for the ids, each way to share a sequence.
EVERY = {"dense": 5, "mixture": 14, "diffusion": 5, "diffusion of ids": 11}
CASES = [
    case(name, mesh=mesh, how=how, number=i, every=EVERY[name])
    for name in MODELS
    for i, (mesh, how) in enumerate(meshes(experts=name == "mixture"))
]


@pytest.mark.parametrize(("name", "mesh", "how"), CASES)
def test_loss_and_gradients_equal_those_of_one_device(name, mesh, how):
    model = MODELS[name]()
    loss, gradients = compare(model, plan_for(model, mesh, Layout(sequence=how)), dtype=torch.float64)
    assert loss < 1e-12
    assert gradients < 1e-12


OMNI_CASES = [
    case(mesh=mesh, how=how, number=i if mesh.size > 1 else 1, every=31)  # the other models have the mesh of one rank
    for i, (mesh, how) in enumerate(meshes(experts=True))
    if not (mesh.sequence == 4 and how == Ulysses())  # its foundation has two heads
]


@pytest.mark.parametrize(("mesh", "how"), OMNI_CASES)
def test_the_omni_model_with_every_modality(mesh, how):
    """Encoders and decoders hold whole items and are divided by FSDP alone; the foundation by everything."""
    model, whole = OMNI(), Layout(sequence=None)
    plan = plan_for(model, mesh, Layout(sequence=how), components={"encoders": whole, "decoders": whole})
    loss, gradients = compare(model, plan)
    assert loss < 1e-6
    assert gradients < 1e-5


@pytest.mark.parametrize("how", [Dropless(), CapacityFactor(8.0)], ids=str)
@pytest.mark.parametrize("chunks", [1, 2])
def test_ways_to_reach_experts(how, chunks):
    model = MODELS["mixture"]()
    plan = plan_for(model, Mesh(1, 2, 2, 4, "virtual"), Layout(experts=how, expert_chunks=chunks))
    loss, gradients = compare(model, plan, dtype=torch.float64)
    assert loss < 1e-12
    assert gradients < 1e-12


IN_FLOAT32 = {"dense": Hybrid(2), "mixture": Ring(), "diffusion": Ulysses(), "diffusion of ids": Ring()}
"""The way that is part of the suite."""


@pytest.mark.parametrize(
    ("name", "how"),
    [
        pytest.param(name, how, id=f"{name}-{how}", marks=[] if how == IN_FLOAT32[name] else pytest.mark.exhaustive)
        for name in MODELS
        for how in (Ulysses(), Ring(), Hybrid(2))
    ],
)
def test_in_single_precision_to_its_rounding(name, how):
    model = MODELS[name]()
    loss, gradients = compare(model, plan_for(model, Mesh(1, 2, 4, kind="virtual"), Layout(sequence=how)))
    assert loss < 1e-6
    assert gradients < 1e-5


@st.composite
def plans(draw):
    shard, sequence = draw(st.sampled_from([1, 2, 3])), draw(st.sampled_from([1, 2, 4]))
    mesh = Mesh(draw(st.sampled_from([1, 2])), shard, sequence, kind="virtual")
    how = draw(st.sampled_from([Ulysses(), Ring(), Ring(zigzag=False), Hybrid(min(2, sequence))]))
    heads = draw(st.sampled_from([(4, 1), (8, 2), (4, 4), (12, 3)]))
    parameters = st.sampled_from([(), ("shard",), ("shard", "sequence")])
    return mesh, how, heads, draw(parameters), draw(parameters)


@settings(max_examples=10, deadline=None)
@given(plans())
def test_random_plans(case):
    mesh, how, (heads, kv_heads), parameters, of_attention = case
    model = dense(heads=heads, kv_heads=kv_heads, layers=1, tied=False)
    inner = Layout(parameters=of_attention, sequence=how)
    plan = plan_for(model, mesh, Layout(parameters=parameters, sequence=how), components={"layers.*.attention": inner})
    loss, gradients = compare(model, plan, dtype=torch.float64)
    assert loss < 1e-12
    assert gradients < 1e-12


def test_heads_that_do_not_divide_name_the_ways_out():
    model = dense(heads=2, kv_heads=2, layers=1)
    with pytest.raises(ValueError, match=r"layers.0.attention.*2 .*heads.*4.*(Hybrid|Ring)"):
        compare(model, plan_for(model, Mesh(1, 1, 4, kind="virtual")))


def own_piece(x, group, dim, reduce, why):
    """A reduce-scatter that forgets the sum: the transpose of no gather."""
    return collectives.gather_pieces(x, group, dim, why).chunk(group.size, dim)[0].chunk(group.size, dim)[0]


def unsummed(ctx, grad):
    """A copy to ranks whose gradient is not summed."""
    return grad, None, None, None


def test_a_planted_bug_is_noticed(monkeypatch):
    """With one transpose replaced by a wrong one the same comparison fails by far."""
    model, mesh = MODELS["dense"](), Mesh(2, 2, kind="virtual")
    monkeypatch.setattr(collectives, "scatter_sum", own_piece)
    _, gradients = compare(model, plan_for(model, mesh), dtype=torch.float64)
    assert gradients > 1e-2


def test_a_sum_over_copies_that_is_forgotten_is_noticed_by_the_copies(monkeypatch):
    model, mesh = MODELS["dense"](), Mesh(2, 2, kind="virtual")
    monkeypatch.setattr(collectives._CopyToRanks, "backward", staticmethod(unsummed))
    with pytest.raises(ValueError, match="must be the same on ranks 0 and 2 and differs"):
        compare(model, plan_for(model, mesh), dtype=torch.float64)
