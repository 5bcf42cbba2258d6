"""The primitives' sharded forms in compiled steps on meshes: loss and every gradient are those of one device.

T tokens, D model, H query heads, G key/value heads, K head dim, V vocabulary, E experts, F hidden of an expert.
"""

import gc
import weakref
from functools import partial

import pytest
import torch

import ftrain
from ftrain import Mean, optim, tree
from ftrain.kernels.attention import attention
from ftrain.kernels.embedding import embedding
from ftrain.kernels.experts import experts
from ftrain.kernels.rms_norm import rms_norm
from ftrain.modules.spec import Normal, ParamSpec
from ftrain.sharding import CapacityFactor, Dropless, Hybrid, Layout, Mesh, Ring, Ulysses
from tests.helpers.expert_networks import biased, biased_shapes
from tests.helpers.mesh_models import Model, accumulated, compare, plan_for, text_batch

V, D, H, G, K, E, F = 31, 8, 4, 2, 4, 8, 6
NORMAL = Normal(0.5)
EMBED = ParamSpec((V, D), ("vocab", "embed"), NORMAL)
ATTENTION = {
    "q": ParamSpec((D, H * K), ("embed", "heads"), NORMAL),
    "k": ParamSpec((D, G * K), ("embed", "kv_heads"), NORMAL),
    "v": ParamSpec((D, G * K), ("embed", "kv_heads"), NORMAL),
    "out": ParamSpec((H * K, D), ("heads", "embed"), NORMAL),
    "sinks": ParamSpec((H,), ("heads",), NORMAL),
}
HOWS = [Ulysses(), Ring(), Ring(zigzag=False), Hybrid(2)]


def mix(p, x_TD, batch, **options):
    """One layer of attention with sinks."""
    q, k, v = ((x_TD @ p[name]).unflatten(1, (-1, K)) for name in ("q", "k", "v"))
    out = attention(q, k, v, segments_T=batch["segments_T"], sinks_H=p["sinks"], **options)
    return x_TD + out.flatten(1) @ p["out"]


def of_layers(specs, layer):
    """A `Model` of tokens, two layers, and the square of what they make."""

    def loss(params, batch):
        x_TD = embedding(batch["tokens_T"], params["embed"])
        for p in params["layers"]:
            x_TD = layer(p, x_TD, batch)
        weight_TD = (batch["labels_T"][:, None] + torch.arange(D) + 200).to(x_TD.dtype).sin()
        found = Mean.of(x_TD.square() * weight_TD)
        return found, {"square": found}

    return Model({"embed": EMBED, "layers": [specs, specs]}, loss, partial(text_batch, V), {})


SINKS = of_layers(ATTENTION, mix)
CAPPED = of_layers(ATTENTION, partial(mix, softcap=2.0, window=9))


LONG = pytest.mark.exhaustive


@pytest.mark.parametrize("how", HOWS, ids=str)
@pytest.mark.parametrize("model", [pytest.param(SINKS, marks=LONG), CAPPED], ids=["sinks", "sinks and a cap"])
def test_sinks_are_trained_on_a_mesh(model, how):
    mesh = Mesh(shard=2, sequence=4, kind="virtual")
    assert max(compare(model, plan_for(model, mesh, Layout(sequence=how)), dtype=torch.float64)) < 1e-11


@pytest.mark.parametrize("options", [{"remat": "layer"}, pytest.param({"remat": "all"}, marks=LONG)], ids=str)
@pytest.mark.parametrize("model", [SINKS, CAPPED], ids=["sinks", "sinks and a cap"])
def test_sinks_are_trained_with_recompute(model, options):
    params, batch = model.params(torch.float32), model.batch(1)
    plain, again = (ftrain.jit(model.step, **given)(params, batch) for given in ({}, options))
    assert all(map(torch.equal, tree.leaves(plain), tree.leaves(again)))
    assert any(leaf.abs().max() > 0 for leaf in (layer["sinks"] for layer in plain[2]["layers"]))


def expert_specs(first="expert"):
    """A router and the leaves of `biased`; `first` names the dim of the experts."""
    axes = ((first, "embed", "mlp"), (first, "mlp"), (first, "embed", "mlp"), (first, "embed"))
    leaves = [ParamSpec(shape, names, NORMAL) for shape, names in zip(biased_shapes(E, D, F), axes, strict=True)]
    return {
        "router": ParamSpec((D, E), ("embed", None), NORMAL),
        "leaves": leaves,
        "scale": ParamSpec((D,), ("embed",), NORMAL),
    }


def choose(p, x_TD):
    return (x_TD @ p["router"]).softmax(-1).topk(2, -1)


def network(p, x_TD, batch):
    """One layer of experts with biases, whose network captures a parameter."""
    x_TD = rms_norm(x_TD)
    weight_TK, expert_TK = choose(p, x_TD)
    return x_TD + experts(x_TD, expert_TK, weight_TK, p["leaves"], biased(p["scale"]))


EXPERTS, WHOLE_EXPERTS = of_layers(expert_specs(), network), of_layers(expert_specs(None), network)


LAYOUTS = {
    "dropless": Layout(experts=Dropless()),
    "chunks": Layout(experts=Dropless(), expert_chunks=2),
    "capacity": Layout(experts=CapacityFactor(16.0)),
    "not divided": Layout(experts=None),
}
MESHES = [Mesh(shard=2, expert=2, kind="virtual"), Mesh(1, 2, 2, 4, "virtual"), Mesh(2, 4, 1, 2, "virtual")]
OF_THE_SUITE = [("dropless", 1), ("dropless", 2), ("chunks", 1), ("capacity", 2), ("not divided", 0)]
"""Each layout and each mesh."""


@pytest.mark.parametrize(
    ("layout", "mesh"),
    [
        pytest.param(name, mesh, id=f"{name}-{mesh}", marks=[] if (name, i) in OF_THE_SUITE else LONG)
        for name in LAYOUTS
        for i, mesh in enumerate(MESHES)
    ],
)
def test_experts_are_trained_on_a_mesh(layout, mesh):
    assert max(compare(EXPERTS, plan_for(EXPERTS, mesh, LAYOUTS[layout]), dtype=torch.float64)) < 1e-11


def test_experts_whose_dim_has_no_name_stay_where_their_tokens_are():
    plan = plan_for(WHOLE_EXPERTS, Mesh(1, 2, 2, 4, "virtual"))
    assert max(compare(WHOLE_EXPERTS, plan, dtype=torch.float64)) < 1e-11
    step = ftrain.jit(WHOLE_EXPERTS.step, plan=plan, specs=WHOLE_EXPERTS.specs)
    text = str(step.lower(WHOLE_EXPERTS.params(torch.float32), WHOLE_EXPERTS.batch(2)).graph)
    assert "all_to_all" not in text


@pytest.mark.parametrize("model", [CAPPED, EXPERTS], ids=["attention", "experts"])
def test_micro_batches_on_a_mesh(model):
    cut = accumulated(model, 2)
    plan = plan_for(cut, Mesh(1, 2, 2, 4, "virtual"))
    assert max(compare(cut, plan, dtype=torch.float64)) < 1e-11


def test_leaves_may_be_changed_before_they_are_given():
    """Transposed twice, scaled and cast, they are still those of a rank's own experts."""

    def layer(p, x_TD, batch):
        w_in, b_in, w_out, b_out = p["leaves"]
        leaves = [(2 * w_in.transpose(1, 2).contiguous()).transpose(1, 2), b_in.to(x_TD.dtype), w_out * 0.5, b_out]
        return network({**p, "leaves": leaves}, x_TD, batch)

    model = of_layers(expert_specs(), layer)
    plan = plan_for(model, Mesh(1, 2, 1, 2, "virtual"))
    assert max(compare(model, plan, dtype=torch.float64)) < 1e-11
    text = str(
        ftrain.jit(model.step, plan=plan, specs=model.specs).lower(model.params(torch.float32), model.batch(2)).graph
    )
    assert "all_to_all" in text


@pytest.mark.parametrize("remat", ["layer", pytest.param("all", marks=LONG)])
def test_experts_are_computed_again(remat):
    params, batch = EXPERTS.params(torch.float32), EXPERTS.batch(1)
    plain, again = ftrain.jit(EXPERTS.step), ftrain.jit(EXPERTS.step, remat=remat)
    assert all(map(torch.equal, tree.leaves(plain(params, batch)), tree.leaves(again(params, batch))))
    plan = plan_for(EXPERTS, Mesh(1, 2, 1, 2, "virtual"))
    assert max(compare(EXPERTS, plan, dtype=torch.float64, remat=remat)) < 1e-11


@pytest.mark.parametrize("mesh", [None, Mesh(1, 2, 2, 4, "virtual")], ids=["one device", "a mesh"])
def test_a_run_that_donates_its_state(mesh):
    """Ten updates of AdamW in place: the state of a run of plain functions."""
    tx = optim.adamw(1e-2)

    def step(state, batch):
        (loss, _), grads = ftrain.value_and_grad(EXPERTS.loss, has_aux=True)(state.params, batch)
        return state.apply(tx, grads), {"loss": loss}

    def init(key):
        params = ftrain.init(EXPERTS.specs, key)
        return ftrain.TrainState.create(tree.map(lambda p: p.double(), params), tx)

    plan = {} if mesh is None else {"plan": plan_for(EXPERTS, mesh)}
    jitted, batch = ftrain.jit(step, donate="state", **plan), EXPERTS.batch(1 if mesh is None else 2)
    state, expected = jitted.init(init, ftrain.key(0)), init(ftrain.key(0))
    for _ in range(10):
        state, metrics = jitted(state, batch)
        expected, wanted = step(expected, batch)
    torch.testing.assert_close(metrics["loss"], wanted["loss"], rtol=1e-9, atol=1e-9)
    for a, b in zip(tree.leaves(state), tree.leaves(expected), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-7, atol=1e-9)


class Scaled:
    """A network that an object holds."""

    def __call__(self, rows_ND, offsets_E, expert_N, leaves):
        return rows_ND * embedding(expert_N, leaves[0])


@pytest.mark.parametrize("mesh", [None, Mesh(shard=2, expert=2, kind="virtual")], ids=["one device", "a mesh"])
def test_nothing_of_a_network_outlives_the_trace(mesh):
    made = []

    def layer(p, x_TD, batch):
        weight_TK, expert_TK = choose(p, x_TD)
        scaled = Scaled()
        made.append(weakref.ref(scaled))
        return experts(x_TD, expert_TK, weight_TK, [p["scale"]], scaled)

    specs = {"router": expert_specs()["router"], "scale": ParamSpec((E, D), ("expert", "embed"), NORMAL)}
    model = of_layers(specs, layer)
    plan = {} if mesh is None else {"plan": plan_for(model, mesh), "specs": model.specs}
    step = ftrain.jit(model.step, **plan)
    params, batch = model.params(torch.float32), model.batch(1 if mesh is None else 2)
    step(params, batch)
    gc.collect()
    assert made
    assert [ref() for ref in made] == [None] * len(made)


def test_leaves_of_different_numbers_of_experts_are_named():
    specs = expert_specs()
    specs["leaves"][1] = expert_specs(None)["leaves"][1]
    model, mesh = of_layers(specs, network), Mesh(shard=2, expert=2, kind="virtual")
    step = ftrain.jit(model.step, plan=plan_for(model, mesh), specs=model.specs)
    with pytest.raises(ValueError, match=r"got \[4, 8, 12\], \[8, 12\], .* must name that dim 'expert'"):
        step(model.params(torch.float32), model.batch(2))
