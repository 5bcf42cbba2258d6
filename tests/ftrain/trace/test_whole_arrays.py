"""Ops of a user's own update that read across a divided dim: on any mesh the numbers of one device."""

import pytest
import torch
import torch.nn.functional as F

import ftrain
from ftrain import tree
from ftrain.sharding import Layout, Mesh, Plan
from ftrain.trace import whole_arrays
from tests.helpers.divided_updates import SPECS, arguments, both, updated

MESHES = [Mesh(shard=2, kind="virtual"), Mesh(2, 2, kind="virtual"), Mesh(shard=3, kind="virtual")]  # one is padded
# Two replicas of two pieces show what two pieces would.
OF_THE_SUITE = [pytest.param(MESHES[0], marks=pytest.mark.exhaustive), *MESHES[1:]]


def written(x, change):
    x = x.clone()
    change(x)
    return x


def listed(x, change):
    values = [x.clone(), 2 * x]
    found = change(values)
    return values if found is None else list(found)


OPS = {
    "std": lambda x: [x.std(), x.std(0), x.std(-1, keepdim=True), torch.std(x, dim=0, correction=0), x.std(False)],
    "var": lambda x: [x.var(), x.var(0, unbiased=False), x.var((0, 1)), torch.var(x, -1), x.var(0, correction=2)],
    "var_mean": lambda x: [*torch.var_mean(x), *torch.std_mean(x, 0), *torch.std_mean(x, dim=-1, keepdim=True)],
    "count_nonzero": lambda x: [x.relu().count_nonzero(), torch.count_nonzero(x.relu(), 0), x.relu().count_nonzero(1)],
    "aminmax": lambda x: [*torch.aminmax(x), *x.aminmax(dim=0), *x.aminmax(dim=1, keepdim=True)],
    "extremes": lambda x: [x.max(0).values, x.max(0).indices, x.min(-1)[0], x.max(), x.argmax(), x.argmin(0)],
    "products": lambda x: [torch.dot(x[:, 0], x[:, 1]), torch.vdot(x[0], x[1]), x @ x.mT, x.mT @ x, x @ x[0]],
    "outer": lambda x: [torch.outer(x[:, 0], x[0]), torch.einsum("ab,ac->bc", x, x), torch.einsum("ab,cb->ac", x, x)],
    "losses": lambda x: [
        loss(x, x.abs(), reduction=how)
        for how in ("none", "sum", "mean")
        for loss in (F.mse_loss, F.l1_loss, F.huber_loss)
    ],
    "smooth_l1": lambda x: [
        F.smooth_l1_loss(x, 2 * x, beta=b, reduction=r) for b in (0.0, 0.5) for r in ("sum", "none")
    ],
    "kl_div": lambda x: [
        F.kl_div(x.log_softmax(1), (2 * x).softmax(1), reduction=r) for r in ("batchmean", "sum", "none")
    ],
    "cross_entropy": lambda x: [F.cross_entropy(x, torch.arange(x.shape[0]) % 4), F.cross_entropy(x, x.softmax(1))],
    "lists": lambda x: [
        *listed(x, lambda xs: torch._foreach_mul(xs, 2.0)),
        *listed(x, lambda xs: torch._foreach_add(xs, xs, alpha=3)),
        *listed(x, lambda xs: torch._foreach_norm(xs)),
        *listed(x, lambda xs: torch._foreach_norm(xs, 1)),
        *listed(x, lambda xs: torch._foreach_mul_(xs, [2.0, 3.0])),
        *listed(x, lambda xs: torch._foreach_lerp_(xs, [x, x], 0.1)),
        *listed(x, lambda xs: torch._foreach_addcdiv_(xs, xs, [x.abs() + 1, x.abs() + 2], 0.5)),
        *listed(x, lambda xs: torch._foreach_addcmul(xs, xs, xs, [0.5, 1.5])),
        *listed(x, lambda xs: torch._foreach_sqrt_(torch._foreach_abs(xs))),
        *listed(x, lambda xs: torch._foreach_div(xs, torch._foreach_norm(xs))),
        *listed(x, lambda xs: torch._foreach_copy_(xs, [x + 1, x])),
        *listed(x, lambda xs: torch._foreach_zero_(xs)),
        *listed(x, lambda xs: torch._foreach_clamp_max_(xs, 0.1)),
    ],
    "expanded": lambda x: [
        x.mean(0).expand_as(x),
        x.mean(0).expand(x.shape),
        x.mean(1, keepdim=True).expand_as(x),
        x.mean().expand(x.shape),
    ],
    "normalize": lambda x: [F.normalize(x, dim=0), F.normalize(x, dim=1), F.normalize(x, p=1, dim=0)],
    "logsumexp": lambda x: [
        x.logsumexp(0),
        x.logsumexp((0, 1)),
        torch.logsumexp(x, 1, keepdim=True),
        (x - torch.inf).logsumexp(0),
    ],
    "softmax": lambda x: [x.softmax(0), F.softmax(x, dim=0), x.softmax(1), x.log_softmax(0), F.log_softmax(x, -1)],
    "scans": lambda x: [x.cumsum(0), x.cumprod(0), x.cumsum(1), x.logcumsumexp(0), x.cummax(0).values, x.diff(dim=0)],
    "checks": lambda x: [torch.isfinite(x).all(), x.isnan().any(0), torch.isclose(x, x + 1e-9).all(), (x > 0).sum(0)],
    "norms": lambda x: [
        torch.linalg.vector_norm(x, o, d) for o in (1, 2, float("inf"), 0, 3, -float("inf")) for d in (None, 0)
    ],
    "more norms": lambda x: [
        x.norm(),
        x.norm(p=1, dim=0),
        x.norm(dim=0, keepdim=True),
        torch.linalg.norm(x),
        torch.linalg.matrix_norm(x),
        x.dist(2 * x),
    ],
    "trace": lambda x: [torch.trace(x), x.trace(), x.diagonal().sum(), x.tril(), x.triu(1)],
    "where": lambda x: [
        torch.where(x > 0, x, 0.0),
        torch.where(x > 0, 1.0, 2.0),
        x.masked_fill(x > 0, 3.0),
        x.where(x > 0, x.mean(0)),
    ],
    "clamps": lambda x: [
        written(x, lambda y: y.clamp_(max=y.mean(0))),
        written(x, lambda y: y.clamp_(max=torch.ones(tuple(y.shape)))),
        x.clamp(min=x.cumsum(0)),
    ],
    "writes of what is whole": lambda x: [
        written(x, lambda y: y.add_(y.cumsum(0))),
        written(x, lambda y: y.copy_(y.flip(0))),
        written(x, lambda y: y.mul_(y.sort(0).values[:1])),
    ],
    "parts": lambda x: [
        x[0],
        x[-1],
        x[1:],
        x[::2],
        x[..., 0],
        x[None, 1],
        x.narrow(0, 1, 2),
        x.select(0, 1),
        x[x.shape[0] // 2 :],
        x.chunk(2)[0],
        x.split(1)[-1],
        x.tensor_split(2)[1],
    ],
    "parts by tensors": lambda x: [
        x[torch.tensor([1, 0])],
        x[:, torch.tensor([1])],
        x.index_select(0, torch.tensor([2])),
        x.take(torch.tensor([5])),
        x.gather(0, torch.zeros(1, 3, dtype=torch.int64)),
        x.take_along_dim(x.argsort(0), 0),
    ],
    "parts written": lambda x: [
        written(x, lambda y: y.__setitem__(0, 1.0)),
        written(x, lambda y: y.__setitem__(slice(1, None), 2 * y[:-1])),
        written(x, lambda y: y.__setitem__((slice(None), 0), y[:, 1])),
        written(x, lambda y: y.__setitem__((slice(0, 2), 1), y.mean())),
    ],
    "views": lambda x: [
        x.view(-1),
        x.reshape(-1, 4),
        x.flatten(),
        x.ravel(),
        x.view(2, -1).norm(dim=1),
        x.unflatten(0, (2, -1)),
        x.unflatten(1, (-1, 2)),
        x.T.reshape(-1),
        x.view(-1).view(x.shape),
    ],
    "joined": lambda x: [
        torch.cat([x, x]),
        torch.cat([x[:1], 2 * x[1:]]),
        torch.stack([x.view(-1), x.view(-1)]),
        torch.cat([x, x], 1),
        torch.hstack([x, x]),
        torch.vstack([x, x[0]]),
    ],
    "repeated": lambda x: [
        x.repeat(2, 1),
        x.tile(2),
        x.repeat_interleave(2, 0),
        x.roll(1, 0),
        x.flip(0),
        x.rot90(),
        F.pad(x, (0, 0, 1, 1)),
        x.unfold(0, 2, 1),
    ],
    "order": lambda x: [
        x.sort(0).values,
        x.argsort(0),
        x.topk(2, 0).values,
        x.kthvalue(2, 0).values,
        x.median(0).values,
        x.median(),
        x.abs().view(-1).topk(5).values.min(),
    ],
    "matrices": lambda x: [
        torch.linalg.svdvals(x),
        torch.linalg.matrix_norm(x, 2),
        torch.linalg.norm(x, "nuc"),
        torch.cdist(x, x),
    ],
    "statistics": lambda x: [
        x.nanmean(0),
        x.nansum(0),
        torch.histc(x, 4, -2, 2),
        x.prod(0),
        x.prod(),
        x.renorm(2, 0, 0.1),
        x.renorm(2, 1, 0.1),
        F.layer_norm(x, (int(x.shape[-1]),)),
        F.cosine_similarity(x, 2 * x + 1, dim=0),
    ],
    "numbers for each place": lambda x: [
        x * torch.arange(int(x.shape[0]))[:, None],
        x + torch.eye(x.shape[0], x.shape[1]),
        x - torch.arange(x.shape[1]),
        torch.linspace(0, 1, x.shape[0])[:, None] * x,
    ],
    "rows": lambda x: [
        sum(row.sum() * i for i, row in enumerate(x)),
        torch.stack([r * 2 for r in x]),
        torch.stack(x.unbind(0)),
        max(1, len(x)) * x,
    ],
}


def of_piece(change):
    """On a leaf divided on dim 0, and on one divided on dim 1; results as they are, and where they meet a leaf."""

    def update(w, g):
        if w.dim() != 2:
            return w
        found = change(g) + list(change(g.mT.contiguous()))
        meets = [g * y for y in found if y.dim() == 0 or tuple(y.shape) in ((1,), (8,), (4, 1), (1, 8), (4, 8))]
        return {"found": found, "met": meets}

    return update


@pytest.mark.parametrize("mesh", OF_THE_SUITE, ids=str)
@pytest.mark.parametrize("name", OPS)
def test_ops_that_read_across_a_divided_dim(name, mesh):
    one, many = both(updated(of_piece(OPS[name])), mesh)
    for path, a, b in zip(tree.paths(one), tree.leaves(one), tree.leaves(many), strict=True):
        torch.testing.assert_close(b, a, rtol=1e-12, atol=1e-12, equal_nan=True, msg=lambda m, p=path: f"{p}: {m}")


def test_a_whole_result_comes_back_as_the_piece_that_its_leaf_is():
    """So the state of the next step lies as that of this one."""
    state, batch = arguments()
    step = ftrain.jit(updated(lambda w, g: (w - g).sort(0).values), plan=Plan(MESHES[0], Layout()), specs=SPECS)
    compiled = step.lower(state, batch)
    assert [p.local_shape for p in compiled.placements] == [(4,), (2, 8)]


def test_gathers_are_counted_by_purpose():
    state, batch = arguments()
    step = ftrain.jit(updated(lambda w, g: w - g.sort(0).values), plan=Plan(MESHES[0], Layout()), specs=SPECS)
    assert whole_arrays.PURPOSE in str(step.lower(state, batch).bytes_moved())


def test_reductions_gather_nothing():
    state, batch = arguments()
    of_all = lambda g: g.std() + g.var(0).sum() + g.logsumexp(0).sum() + F.mse_loss(g, 2 * g)  # noqa: E731
    lists = lambda w, g: torch._foreach_sub([w], torch._foreach_mul([g], torch._foreach_norm([g])))[0]  # noqa: E731
    step = updated(lambda w, g: lists(w, g) * of_all(g) + g.softmax(0))
    compiled = ftrain.jit(step, plan=Plan(MESHES[0], Layout()), specs=SPECS).lower(state, batch)
    assert whole_arrays.PURPOSE not in str(compiled.bytes_moved())


def test_a_large_gather_is_said_with_its_line(monkeypatch):
    monkeypatch.setattr(whole_arrays, "LARGE", 8)
    with pytest.warns(UserWarning, match=r"test_whole_arrays.py:\d+ .*gathers an array of \[4, 8\] .*'whole_array'"):
        both(updated(lambda w, g: w - g.sort(0).values if w.dim() == 2 else w), MESHES[0])


def test_what_a_node_is_noted_as_is_not_said_of_views_that_are_taken_again():
    """A write makes the views beneath it anew, in front of the next op that reads them."""

    def step(state, batch):
        g = state["w"].flip(0).clone()
        part = g[:, :4]
        g.mul_(2.0)
        return {"w": state["w"] - g, "part": part.sum(), "rows": g[:2].clone()}

    one, many = both(step, MESHES[0])
    torch.testing.assert_close(many, one, rtol=1e-12, atol=1e-12)


def test_padding_changes_no_dtype():
    one, many = both(updated(lambda w, g: ((g > 0).sum(0), (100 * g).long().amax(0), (g > 0).all(0))), MESHES[2])
    torch.testing.assert_close(many, one)
