"""Sizes that an update of one's own reads on a mesh are those of the whole array; views of a piece are the array's."""

import copy
import math

import pytest
import torch
from torch import Tensor

import ftrain
from ftrain import tree
from ftrain.sharding.placement import Placement, Split
from ftrain.trace.divided_size import DividedSize, shape_of, whole
from ftrain.trace.piece_views import cut_dim, reshaped
from tests.helpers.divided_updates import MESHES, both, updated

HALVES = Placement((8, 3), (Split(0, ("shard",), 2),))


def matrices(update):
    return lambda w, g: update(w, g) if w.dim() == 2 else w


def vectors(update):
    return lambda w, g: update(w, g) if w.dim() == 1 else w


def decayed(w, g):
    for _ in range(w.shape[0]):
        g = g * 0.9
    return w - g


SAME_AS_ONE_DEVICE = {
    "a mean by hand": lambda w, g: w - g.sum() / g.shape[0],
    "size": lambda w, g: w - g * g.size(0) - g.size(-1),
    "product": lambda w, g: w - g.sum() / math.prod(g.shape) - g.shape.numel(),
    "numel": lambda w, g: w - g.sum() / g.numel() - torch.numel(2 * g) / len(w) - g.nbytes,
    "fan in": lambda w, g: w - 0.1 / math.sqrt(g.shape[0]) * g * max(1, g.shape[0] / g.shape[-1]) ** 0.5,
    "a branch": lambda w, g: w - (g if g.shape[0] > 3 else 2 * g),
    "a shape of its own": lambda w, g: w - (g if g.shape == w.shape and tuple(g.shape) in ((4, 8), (8,)) else 2 * g),
    "what has all numbers": lambda w, g: w - g * torch.arange(g.shape[0]).sum() * torch.eye(g.shape[0]).sum(),
    "rounds of a loop": decayed,
    "numbers for each row": lambda w, g: w - g * sum(1.0 / (1 + i) for i in range(g.shape[0])),
    "a tensor of it": lambda w, g: w - g / torch.tensor(g.shape[0]) + torch.full((), g.shape[0]),
    "constants": lambda w, g: w - torch.zeros(g.shape) - g * torch.ones(*g.shape, dtype=g.dtype).sum(),
    "constants like it": lambda w, g: w - g * g.new_full(g.shape, 0.5).sum() * torch.ones(g.shape[0]).sum(),
    "a square": lambda w, g: w - g * torch.ones(g.shape[0], g.shape[0]).sum(),
    "expanded": matrices(lambda w, g: w - g * g.mean(0).expand(g.shape).sum() * g.mean(0).expand_as(g).mean()),
    "broadcast": matrices(lambda w, g: w - g * torch.broadcast_to(g.mean(0), g.shape).sum()),
    "broadcast together": matrices(lambda w, g: w - g * torch.broadcast_tensors(g.mean(0), g)[0].sum()),
    "a part of another": lambda w, g: w - g * torch.ones(10)[: g.shape[0]].sum(),
    "all of it": lambda w, g: w - g[: w.shape[0]] - g[0 : w.shape[0], ...] - g.narrow(0, 0, g.shape[0]),
    "viewed as it is": lambda w, g: w - g.view(*g.shape) - g.view(1, *g.shape)[0] - g.reshape_as(w),
    "in full": matrices(lambda w, g: w - g.reshape(4, 8) - g.reshape(-1, 8) - g.view((4, -1))),
    "flat as it is": vectors(lambda w, g: w - g.reshape(-1) - g.view(g.numel())),
    "a new dim": lambda w, g: w - g[None][0] - g[..., None].squeeze(-1),
    "row by row": matrices(lambda w, g: w - torch.func.vmap(lambda r: r * r.shape[0])(g)),
    "column by column": matrices(lambda w, g: w - torch.func.vmap(lambda c: c * c.shape[0], 1, 1)(g)),
}  # fmt: skip
ON_ROWS = {
    "blocks of columns": matrices(lambda w, g: w - g.view(4, 2, 4).sum((1, 2))[:, None]),
    "unknown rows": matrices(lambda w, g: w - g.view(-1, 2, 4).amax((1, 2))[:, None]),
    "columns unflattened": matrices(lambda w, g: w - g.unflatten(1, (2, -1)).amax((1, 2))[:, None]),
    "some columns": matrices(lambda w, g: w - g[:, :4].sum(-1, keepdim=True) - g[..., -1:] - g.narrow(1, 0, 1)),
}


def doubled(g, index):
    g = g.clone()
    g[index].mul_(2.0)
    return g


def read_later(g):
    g = g.clone()
    first = g[:3]
    g.mul_(2.0)
    return g + first.sum()


def written(g, index):
    g = g.clone()
    g[index] = 1.0
    return g


def each_row(w, g):
    for i in range(g.shape[0]):
        w = w + 0.1 * g[i].sum()
    return w


PARTS = {
    "numbers doubled": lambda w, g: w - (g * 2)[..., :4].sum(),
    "half of it": lambda w, g: w - g[: w.shape[0] // 2].sum(),
    "as many as a piece": lambda w, g: w - g[: 4 // g.dim()].sum(),
    "the last": lambda w, g: w - g[-4 // g.dim() :].sum(),
    "all but one": lambda w, g: w - g[1:].sum(),
    "every other": lambda w, g: w - g[::2].sum(),
    "a row": lambda w, g: w - g[0].sum(),
    "a row set": lambda w, g: w - written(g, 0),
    "the last set": lambda w, g: w - written(g, -1),
    "row after row": each_row,
    "narrow": lambda w, g: w - g.narrow(0, 0, 2).sum(),
    "select": lambda w, g: w - g.select(0, index=0).sum(),
    "blocks": lambda w, g: w - g.view(-1, 4).norm(dim=1).max(),
    "as many blocks as a piece has rows": lambda w, g: w - g.view(2, -1).norm(dim=1).sum(),
    "blocks by keyword": lambda w, g: w - torch.reshape(g, shape=(-1, 4)).norm(dim=1).sum(),
    "unflatten": lambda w, g: w - g.unflatten(0, (-1, 2)).norm(dim=1).sum(),
    "a mask of places": matrices(lambda w, g: w - g * torch.eye(g.shape[0], 8)),
}


def of_each(updates, w, g):
    return {name: update(w, g) for name, update in updates.items()}


@pytest.mark.parametrize("mesh", MESHES, ids=str)
def test_sizes_that_an_update_reads_are_those_of_one_device(mesh):
    one, many = both(updated(lambda w, g: of_each(SAME_AS_ONE_DEVICE, w, g)), mesh)
    for path, a, b in zip(tree.paths(one), tree.leaves(one), tree.leaves(many), strict=True):
        torch.testing.assert_close(b, a, rtol=1e-9, atol=1e-9, msg=lambda m, path=path: f"{path}: {m}")


def test_views_that_keep_the_divided_rows():
    one, many = both(updated(lambda w, g: of_each(ON_ROWS, w, g)), MESHES[0])
    for path, a, b in zip(tree.paths(one), tree.leaves(one), tree.leaves(many), strict=True):
        torch.testing.assert_close(b, a, rtol=1e-9, atol=1e-9, msg=lambda m, path=path: f"{path}: {m}")


@pytest.mark.parametrize("mesh", MESHES, ids=str)
def test_parts_of_a_divided_dim_are_those_of_the_array(mesh):
    one, many = both(updated(lambda w, g: of_each(PARTS, w, g)), mesh)
    torch.testing.assert_close(many, one, rtol=1e-9, atol=1e-9)


LOST = {
    "a view of a copy": lambda w, g: w - doubled(g, (..., slice(0, 4))),
    "a view before the write": lambda w, g: w - read_later(g),
}


@pytest.mark.parametrize("name", LOST)
def test_writes_that_a_view_of_a_gathered_array_would_miss_are_refused(name):
    with pytest.raises(ValueError, match=r"test_piece_sizes.py:\d+ .*writes into a tensor of which .*py:\d+ .*a view"):
        both(updated(vectors(LOST[name])), MESHES[0])


@pytest.mark.parametrize("mesh", MESHES, ids=str)
def test_writes_into_parts_that_nothing_else_looks_at(mesh):
    def added(g):
        g = g.clone()
        g[1:] += g[:-1].clone()
        g[0] *= 3.0
        return g

    assert_close = torch.testing.assert_close
    one, many = both(updated(lambda w, g: w - added(g)), mesh)
    assert_close(many, one, rtol=1e-12, atol=1e-12)


def test_a_constant_of_a_leafs_shape_is_a_piece_and_comes_back_whole():
    def step(state, batch):
        return {"own": torch.ones(state["w"].shape), "row": torch.zeros(state["w"].shape[0])}

    one, many = both(step, MESHES[0])
    assert {k: v.shape for k, v in many.items()} == {k: v.shape for k, v in one.items()} == {"own": (4, 8), "row": (4,)}


def test_sizes_of_the_batch_are_a_ranks_share():
    def step(state, batch):
        rows = batch["x"].shape[0]
        return ftrain.Mean(batch["x"].sum(), torch.full((), float(rows), dtype=batch["x"].dtype))

    one, many = both(step, MESHES[0])
    torch.testing.assert_close(one.count, many.count)


def test_a_divided_size_is_the_arrays_and_knows_the_pieces():
    rows, columns = shape_of(HALVES)
    assert isinstance(rows, DividedSize)
    assert (rows, rows.piece, columns) == (8, 4, 3)
    assert (math.sqrt(rows * 2), len(range(rows)), hash(rows)) == (4.0, 8, hash(8))
    assert copy.deepcopy(rows).piece == 4
    assert [type(n) for n in whole((rows, [rows], slice(rows)))[0:2]] == [int, list]
    assert type(whole(torch.Size([rows]))[0]) is int


def test_a_divided_dim_stays_where_one_of_its_size_begins_at_the_same_number():
    assert reshaped(HALVES, (1, 8, 3)) == (Placement((1, 8, 3), (Split(1, ("shard",), 2),)), ())
    assert reshaped(HALVES, (8, -1, 1))[0].local_shape == (4, 3, 1)
    for sizes in ((-1,), (4, 6), (2, 4, 3), (3, 8)):
        assert reshaped(HALVES, sizes)[1] == HALVES.splits


@pytest.mark.parametrize(
    ("index", "dim"),
    [
        (slice(None), None), (slice(0, 8), None), (slice(-8, 99), None), (..., None), (None, None),
        ((slice(None), 1), None), ((..., 1), None), ((None, slice(None)), None), (torch.tensor([1]), None),
        (torch.ones(8, 3, dtype=torch.bool), None), (0, 0), (slice(4), 0), (slice(None, None, 2), 0),
        ((None, 1), 0), ((slice(1, None), ...), 0), ((..., -1, slice(None)), 0), (slice(0, 8, -1), 0),
    ],
)  # fmt: skip
def test_which_indices_take_a_part_of_a_divided_dim(index, dim):
    assert cut_dim(HALVES, index) == dim
    if dim is None and not isinstance(index, Tensor):
        rows = torch.arange(24).view(8, 3)
        torch.testing.assert_close(torch.cat([rows[:4], rows[4:]])[index], rows[index])
