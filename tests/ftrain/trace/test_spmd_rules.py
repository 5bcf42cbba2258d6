"""The primitives' sharded forms in compiled steps on meshes: loss and every gradient are those of one device.

T tokens, D model, H query heads, G key/value heads, K head dim, V vocabulary.
"""

from functools import partial

import pytest
import torch

import ftrain
from ftrain import Mean, tree
from ftrain.kernels.attention import attention
from ftrain.kernels.embedding import embedding
from ftrain.modules.spec import Normal, ParamSpec
from ftrain.sharding import Hybrid, Layout, Mesh, Ring, Ulysses
from tests.helpers.mesh_models import Model, compare, plan_for, text_batch

V, D, H, G, K = 31, 8, 4, 2, 4
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


@pytest.mark.parametrize("how", HOWS, ids=str)
@pytest.mark.parametrize("model", [SINKS, CAPPED], ids=["sinks", "sinks and a cap"])
def test_sinks_are_trained_on_a_mesh(model, how):
    mesh = Mesh(shard=2, sequence=4, kind="virtual")
    assert max(compare(model, plan_for(model, mesh, Layout(sequence=how)), dtype=torch.float64)) < 1e-11


@pytest.mark.parametrize("options", [{"remat": "layer"}, {"remat": "all"}], ids=str)
@pytest.mark.parametrize("model", [SINKS, CAPPED], ids=["sinks", "sinks and a cap"])
def test_sinks_are_trained_with_recompute(model, options):
    params, batch = model.params(torch.float32), model.batch(1)
    plain, again = (ftrain.jit(model.step, **given)(params, batch) for given in ({}, options))
    assert all(map(torch.equal, tree.leaves(plain), tree.leaves(again)))
    assert any(leaf.abs().max() > 0 for leaf in (layer["sinks"] for layer in plain[2]["layers"]))
