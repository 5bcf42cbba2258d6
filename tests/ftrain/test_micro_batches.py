"""A batch for the loss is a batch for the accumulated loss: on one device, on meshes, with documents, media, keys."""

import functools

import pytest
import torch
from mesh_models import dense, diffusion, language_model, mixture, omni, plan_for
from tiny_omni import MODEL as OMNI

import ftrain
from ftrain import Layout, Mean, Mesh, Plan, tree
from ftrain.kernels.documents import Documents
from ftrain.kernels.pack import draw_over_batch
from ftrain.modules import decoder
from ftrain.modules import omni as omni_model
from ftrain.modules.packs import join_packs
from ftrain.sharding import Hybrid, Places, Ring, Rows, Same, Tokens
from ftrain.trace.micro_batches import divide

either_way = pytest.mark.parametrize("run", [lambda f: f, ftrain.jit], ids=["eager", "jit"])
MODELS = {"dense": dense(), "mixture": mixture(), "omni": omni(), "diffusion": diffusion()}


def gradients(model, loss=None):
    """A pure step that returns the loss and all gradients."""

    def step(params, batch):
        (value, _), grads = ftrain.value_and_grad(loss or model.loss, has_aux=True)(params, batch)
        return value, grads

    return step


@functools.cache
def whole(name, packs):
    """The un-accumulated step on one device."""
    model = MODELS[name]
    params, batch = model.params(torch.float64), model.batch(packs)
    return params, batch, ftrain.jit(gradients(model))(params, batch)


def assert_equal(found, expected, *, within=1e-12):
    largest = max(float(leaf.abs().max()) for leaf in tree.leaves(expected[1]))
    for path, a, b in zip(tree.paths(expected), tree.leaves(expected), tree.leaves(found), strict=True):
        assert float((a - b).abs().max()) <= within * max(1.0, largest), path


@pytest.mark.parametrize("name", MODELS)
def test_the_accumulated_step_is_the_step_on_one_device(name):
    model, (params, batch, expected) = MODELS[name], whole(name, 4)
    loss = ftrain.accumulate(model.loss, 4, has_aux=True, batch=model.rules)
    assert_equal(ftrain.jit(gradients(model, loss))(params, batch), expected)


FSDP, COPIES = Mesh(shard=2, kind="virtual"), Mesh(replicate=2, sequence=2, expert=2, kind="virtual")
ULYSSES, RING = Mesh(shard=2, sequence=2, kind="virtual"), Mesh(sequence=4, kind="virtual")


@pytest.mark.parametrize(
    ("name", "mesh", "layout"),
    [
        ("dense", FSDP, Layout()),
        ("mixture", COPIES, Layout()),
        ("mixture", RING, Layout(sequence=Hybrid(ulysses=2))),
        ("diffusion", ULYSSES, Layout()),
        ("omni", FSDP, Layout()),
        ("omni", ULYSSES, Layout()),
        ("dense", RING, Layout(sequence=Ring())),
    ],
    ids=["fsdp", "copies", "hybrid", "diffusion", "media", "media-ulysses", "ring"],
)
def test_and_on_a_mesh_with_the_plan_and_the_batch_of_the_step(name, mesh, layout):
    """One plan: its rules divide the batch among ranks and micro-batches; the un-accumulated loss takes the same."""
    model, micro = MODELS[name], 4 // (mesh.replicate * mesh.shard)
    params, batch, expected = whole(name, 4)
    encoded = {"encoders": Layout(sequence=None), "decoders": Layout(sequence=None)} if name == "omni" else {}
    plan = plan_for(model, mesh, layout, components=encoded)
    loss = ftrain.accumulate(model.loss, micro, has_aux=True)
    assert_equal(ftrain.jit(gradients(model, loss), plan=plan, specs=model.specs)(params, batch), expected)


@either_way
def test_a_batch_of_images_and_labels_is_divided_along_dim_0(run):
    def loss(params, batch):
        scores = batch["images"].flatten(1) @ params["w"] * batch["scale"]
        return Mean(torch.nn.functional.cross_entropy(scores, batch["labels"], reduction="sum"), torch.tensor(12.0))

    random = torch.Generator().manual_seed(0)
    params = {"w": torch.randn(12, 5, dtype=torch.float64, generator=random)}
    batch = {
        "images": torch.randn(12, 3, 4, dtype=torch.float64, generator=random),
        "labels": torch.randint(0, 5, (12,), generator=random),
        "scale": torch.tensor(0.5, dtype=torch.float64),
    }

    def counted(params, batch):
        return Mean(loss(params, batch).total, torch.full((), batch["labels"].shape[0], dtype=torch.float64))

    expected = ftrain.value_and_grad(counted)(params, batch)
    found = run(ftrain.value_and_grad(ftrain.accumulate(counted, 4)))(params, batch)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
