"""A batch for the loss is a batch for the accumulated loss: on one device, on meshes, with documents, media, keys."""

import functools

import pytest
import torch

import ftrain
from ftrain import Layout, Mean, Mesh, Plan, tree
from ftrain.kernels.documents import Documents
from ftrain.kernels.pack import draw_over_batch
from ftrain.modules import spec
from ftrain.sharding import BatchRows, Hybrid, Replicated, Ring, TokenIndices, Tokens
from ftrain.trace.micro_batches import divide
from tests.helpers.mesh_models import dense, diffusion, mixture, omni, plan_for
from tests.helpers.rank_processes import run as run_processes

either_way = pytest.mark.parametrize("run", [lambda f: f, ftrain.jit], ids=["eager", "jit"])
MODELS = {"dense": dense(layers=1), "mixture": mixture(layers=1), "omni": omni(), "diffusion": diffusion()}


def gradients(model, loss=None):
    """A pure step that returns the loss and all gradients."""

    def step(params, batch):
        (value, _), grads = ftrain.value_and_grad(loss or model.loss, has_aux=True)(params, batch)
        return value, grads

    return step


@functools.cache
def whole(name, packs):
    """The un-accumulated step on one device, op by op."""
    model = MODELS[name]
    params, batch = model.params(torch.float64), model.batch(packs)
    return params, batch, gradients(model)(params, batch)


def assert_equal(found, expected, *, within=1e-12):
    largest = max(float(leaf.abs().max()) for leaf in tree.leaves(expected[1]))
    for path, a, b in zip(tree.paths(expected), tree.leaves(expected), tree.leaves(found), strict=True):
        assert float((a - b).abs().max()) <= within * max(1.0, largest), path


LONG = pytest.mark.exhaustive


@pytest.mark.parametrize("name", ["dense", "mixture", "diffusion", pytest.param("omni", marks=LONG)])
def test_the_accumulated_step_is_the_step_on_one_device(name):
    model, (params, batch, expected) = MODELS[name], whole(name, 4)
    loss = ftrain.accumulate(model.loss, 4, has_aux=True, batch=model.rules)
    assert_equal(ftrain.jit(gradients(model, loss))(params, batch), expected)


FSDP, COPIES = Mesh(shard=2, kind="virtual"), Mesh(replicate=2, sequence=2, expert=2, kind="virtual")
ULYSSES, RING = Mesh(shard=2, sequence=2, kind="virtual"), Mesh(sequence=4, kind="virtual")


@pytest.mark.parametrize(
    ("name", "mesh", "layout"),
    [
        pytest.param("dense", FSDP, Layout(), marks=LONG),  # other models' meshes are of this axis too
        ("mixture", COPIES, Layout()),
        ("mixture", RING, Layout(sequence=Hybrid(ulysses=2))),
        ("diffusion", ULYSSES, Layout()),
        pytest.param("omni", FSDP, Layout(), marks=LONG),
        ("omni", ULYSSES, Layout()),
        pytest.param("dense", RING, Layout(sequence=Ring()), marks=LONG),  # a part of the hybrid one
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


def test_a_random_key_is_the_same_everywhere_and_rows_draw_what_they_draw_in_the_whole_batch():
    """On one device and on a mesh of both kinds of axes: noise that is drawn for rows is that of the whole batch."""

    def loss(params, batch):
        noise = draw_over_batch(ftrain.normal, batch["key"], tuple(batch["x"].shape)).to(torch.float64)
        return Mean.of(((batch["x"] + noise) @ params["w"]).square())

    random = torch.Generator().manual_seed(0)
    params = {"w": torch.randn(6, 3, dtype=torch.float64, generator=random)}
    batch = {"x": torch.randn(16, 6, dtype=torch.float64, generator=random), "key": ftrain.key(7)}
    expected = ftrain.value_and_grad(loss)(params, batch)
    step = ftrain.value_and_grad(ftrain.accumulate(loss, 2))
    found = [step(params, batch), ftrain.jit(step)(params, batch)]
    for mesh in (Mesh(shard=2, kind="virtual"), Mesh(shard=2, sequence=2, kind="virtual")):
        plan = Plan(mesh, Layout(sequence=Ring()) if mesh.sequence > 1 else Layout())
        specs = {"params": spec.of(params)}
        found.append(ftrain.jit(lambda params, batch: step(params, batch), plan=plan, specs=specs)(params, batch))
    for result in found:
        torch.testing.assert_close(result, expected, rtol=1e-12, atol=1e-12)


def tokens_of(lengths):
    ids = torch.arange(len(lengths)).repeat_interleave(torch.tensor(lengths))
    return {"x": torch.arange(float(len(ids))), "segments": ids}


@either_way
def test_a_division_that_would_cut_a_document_is_refused_with_the_way_out(run):
    step = run(ftrain.value_and_grad(ftrain.accumulate(lambda p, b: Mean.of(b["x"] * p * b["segments"]), 2)))
    w = torch.ones(())
    step(w, tokens_of([3, 5, 4, 4]))
    words = (
        r"batch leaf 'segments', divided in 2: a document goes on over token 8, where another part begins: .*join_packs"
    )
    with pytest.raises(ValueError, match=words):
        step(w, tokens_of([3, 9, 4]))


def test_documents_made_without_their_packs_are_divided_too():
    """Offsets need no places of their own for each micro-batch: those of other documents have length zero."""
    ids = torch.arange(4).repeat_interleave(torch.tensor([3, 5, 6, 2]))
    parts = divide({"segments": Documents.of(ids)}, 2)
    first, second = (parts.put([leaf[i] for leaf in parts.leaves])["segments"] for i in range(2))
    assert first.offsets_N.tolist() == [0, 3, 8, 8, 8, 8, 8, 8, 8]
    assert second.offsets_N.tolist() == [0, 0, 0, 6, 8, 8, 8, 8, 8]
    assert (first.longest, first.offsets_N.dtype) == (8, torch.int32)
    with pytest.raises(ValueError, match=r"batch leaf 'segments.*', divided in 2: a document goes on over token 8"):
        divide({"segments": Documents.of(torch.zeros(16, dtype=torch.int64))}, 2)


def test_a_cut_is_found_by_offsets_where_nobody_reads_the_ids():
    def loss(params, batch):
        return Mean.of(batch["x"] * params * batch["segments"].offsets_N.sum())

    step = ftrain.jit(ftrain.value_and_grad(ftrain.accumulate(loss, 2)))
    batch = {"x": torch.ones(8), "segments": Documents.of(torch.arange(8) // 5)}
    with pytest.raises(ValueError, match=r"batch leaf 'segments\..*', divided in 2: a document goes on over"):
        step(torch.ones(()), batch)


def test_rows_of_media_go_with_the_tokens_of_their_documents():
    batch = {"x": torch.arange(8), "media": {"rows": torch.arange(4), "index_n": torch.tensor([1, 8, 8, 7])}}
    rules = {"media.rows": BatchRows(), "media.index_n": TokenIndices()}
    parts = divide(batch, 2, rules)
    first, second = (parts.put([leaf[i] for leaf in parts.leaves]) for i in range(2))
    assert (first["media"]["index_n"].tolist(), second["media"]["index_n"].tolist()) == ([1, 4], [4, 3])
    assert second["media"]["rows"].tolist() == [2, 3]
    batch["media"]["index_n"] = torch.tensor([1, 6, 8, 7])
    with pytest.raises(ValueError, match=r"'media.index_n': a row is at a token of another micro-batch"):
        divide(batch, 2, rules)


def test_rules_of_the_loss_come_before_the_default_and_must_match():
    batch = {"table": torch.arange(3), "x": torch.arange(8).reshape(2, 4)}
    parts = divide(batch, 2, {"table": Replicated(), "x": Tokens(1)})
    assert parts.put([leaf[1] for leaf in parts.leaves])["x"].tolist() == [[2, 3], [6, 7]]
    with pytest.raises(ValueError, match=r"batch leaf 'table' of shape \[3\] does not divide: dim 0 .* multiple of 2"):
        divide({"table": batch["table"]}, 2)
    with pytest.raises(ValueError, match=r"accumulate\(batch=...\): 'tabel' matches nothing"):
        divide(batch, 2, {"tabel": Replicated()})
    with pytest.raises(ValueError, match="no leaf of the batch is divided"):
        divide({"key": ftrain.key(0)}, 2)


def on_processes(rank, found):
    """Training and evaluation take one share of one batch, by one plan."""
    model, micro = dense(layers=1), 2
    params, batch = model.params(torch.float64), model.batch(2 * micro)
    loss = ftrain.accumulate(model.loss, micro, has_aux=True)
    for mesh in (Mesh(shard=2), Mesh(sequence=2)):
        plan = plan_for(model, mesh)
        train = ftrain.jit(gradients(model, loss), plan=plan, specs=model.specs)
        evaluate = ftrain.jit(
            lambda params, batch: ftrain.forward(model.loss)(params, batch)[0], plan=plan, specs=model.specs
        )
        own, held = train.share(batch), train.shard(params, name="params")
        value, grads = train(held, own)
        result = (value, train.whole(grads)), evaluate(held, own).value()
        if rank == 0:
            found[str(mesh)] = result


def test_processes_train_and_evaluate_on_one_share_of_a_batch():
    model = dense(layers=1)
    params, batch = model.params(torch.float64), model.batch(4)
    expected = gradients(model)(params, batch)
    for (value, grads), evaluated in run_processes(on_processes, 2).values():
        assert_equal((value, grads), expected)
        torch.testing.assert_close(evaluated, expected[0], rtol=1e-12, atol=1e-12)
