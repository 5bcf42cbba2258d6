"""Losses that read other rows of the batch: on any mesh the numbers of one device, or refused."""

import pytest
import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

import ftrain
from ftrain import Mean, tree
from ftrain.kernels.mean import sum_over_batch
from ftrain.modules import spec
from ftrain.sharding import Layout, Mesh, Plan, Ring, Tokens

MESHES = [Mesh(shard=2, kind="virtual"), Mesh(2, 2, kind="virtual"), Mesh(sequence=2, kind="virtual")]


def numbers(seed, *shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


PARAMS = {"w": numbers(0, 6, 4), "v": numbers(1, 4, 4)}
BATCH = {"x": numbers(2, 8, 6), "y": numbers(3, 8, 4)}


F64 = torch.float64


def hidden(p, b):
    return torch.tanh(b["x"] @ p["w"]) @ p["v"]


def eager(loss, batch):
    """Value and gradients by torch alone."""
    params = {name: p.clone().requires_grad_() for name, p in PARAMS.items()}
    value = loss(params, batch).value()
    if not value.requires_grad:
        return value, {name: torch.zeros_like(p) for name, p in PARAMS.items()}
    grads = torch.autograd.grad(value, tuple(params.values()), materialize_grads=True)
    return value.detach(), dict(zip(params, grads, strict=True))


def both(loss, mesh, batch=BATCH):
    """Value and gradients on one device, by torch alone, and on the mesh."""

    def step(p, batch):
        return ftrain.value_and_grad(loss)(p, batch)

    plan = Plan(mesh, Layout())
    return eager(loss, batch), ftrain.jit(step, plan=plan, specs=spec.of(PARAMS))(PARAMS, batch)


def on_meshes(names, of_the_suite):
    """Each name on each mesh; `of_the_suite(i, j)` says whether the i-th one is tried on the j-th in the suite."""
    return pytest.mark.parametrize(
        ("name", "mesh"),
        [
            pytest.param(name, mesh, marks=[] if of_the_suite(i, j) else pytest.mark.exhaustive)
            for i, name in enumerate(names)
            for j, mesh in enumerate(MESHES)
        ],
        ids=str,
    )


def in_turn(i, j):
    return i % len(MESHES) == j


def assert_equal_on(mesh, loss, batch=BATCH):
    one, many = both(loss, mesh, batch)
    for path, a, b in zip(tree.paths(one), tree.leaves(one), tree.leaves(many), strict=True):
        torch.testing.assert_close(b, a, rtol=1e-12, atol=1e-12, msg=lambda m, p=path: f"{p}: {m}")


@pytest.mark.parametrize("mesh", MESHES, ids=str)
def test_a_sum_over_the_batch_that_each_row_uses(mesh):
    def loss(p, b):
        h = hidden(p, b)
        rows = sum_over_batch(torch.full((), float(len(h)), dtype=F64))
        middle = sum_over_batch(h.sum(0)) / rows
        return Mean.of((h - middle).pow(3) * b["y"])

    assert_equal_on(mesh, loss)


@pytest.mark.parametrize("mesh", MESHES, ids=str)
def test_a_mean_of_what_is_summed_over_the_batch(mesh):
    def loss(p, b):
        size = sum_over_batch(hidden(p, b).square().sum()).sqrt()
        return Mean(size, torch.ones((), dtype=size.dtype))

    assert_equal_on(mesh, loss)


def written_in_parts(h):
    out = torch.zeros_like(h)
    out[:, :2] = h[:, 2:]
    return out.softmax(0)


def sum_into_a_part(h, b):
    out = torch.zeros(4, dtype=F64)
    out[0] = h.sum()
    return h * out.sin()


class StraightThrough(torch.autograd.Function):
    """Rounds; its gradient is cut at each number alone."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x.round()

    @staticmethod
    def backward(ctx, gradient):
        (x,) = ctx.saved_tensors
        return gradient * (x.abs() < 1).to(gradient.dtype) / (1 + x.norm(dim=-1, keepdim=True))


class OfOtherRows(torch.autograd.Function):
    """Its gradient at a row depends on other rows, as `how` says."""

    @staticmethod
    def forward(ctx, x, how):
        ctx.how = how
        return x * 2

    @staticmethod
    def backward(ctx, gradient):
        return ctx.how(gradient), None


@torch.library.custom_op("test_batch_rows::doubled", mutates_args=())
def doubled(x: torch.Tensor) -> torch.Tensor:
    """Twice `x`, of which the trace knows nothing."""
    return 2 * x


@doubled.register_fake
def _(x):
    return torch.empty_like(x)


doubled.register_autograd(lambda ctx, gradient: 2 * gradient)


CELL = {}
exec(compile("def standardised(h): return (h - h.mean(0)) / h.std(0)", "<cell 1>", "exec"), CELL)  # code of no file


def experts_by_places(h):
    out = torch.zeros_like(h)
    for e, factor in enumerate((2.0, 3.0)):
        t, k = torch.where(h.detach().topk(2, 1).indices == e)
        out = out.index_add(0, t, h[t].sin() * factor * (k + 1.0)[:, None])
    return out


def experts_by_masks(h):
    out = torch.zeros_like(h)
    for column in range(2):
        chosen = h[:, column] > 0
        out[chosen] += h[chosen].pow(3)
    return out


def rows_at_places(h):
    t = (h[:, 0] > 0).nonzero().squeeze(1)
    return h.index_copy(0, t, h.index_select(0, t).exp())


def attention_of_padded_rows(h):
    x = h.view(-1, 2, 2).transpose(0, 1)
    w = torch.arange(12, dtype=F64).view(6, 2).sin()
    y, weights = F.multi_head_attention_forward(
        x, x, x, 2, 1, w, torch.zeros(6, dtype=F64), None, None, False, 0.0, w[:2], torch.zeros(2, dtype=F64),
        key_padding_mask=h[:, :2].detach() > 1,
    )  # fmt: skip
    return (y.transpose(0, 1) + weights).flatten(1)


RIGHT = {
    "experts by places": experts_by_places,
    "experts by masks": experts_by_masks,
    "rows at places": rows_at_places,
    "attention of padded rows": attention_of_padded_rows,
    "bags of embeddings": lambda h: F.embedding_bag((h.detach() > 0).long(), h.new_ones(2, 4).cumsum(0), mode="mean"),
    "mean": lambda h: h - h.mean(0),
    "mean of all": lambda h: h * h.mean(),
    "running mean": lambda h: h - (0.9 * torch.ones_like(h[..., 0:1]) + 0.1 * h.mean(0, keepdim=True)),
    "mean in a root": lambda h: h.square().mean(0).sqrt(),
    "batch norm": lambda h: (h - h.mean(0)) / (h.var(0, unbiased=False) + 1e-5).sqrt(),
    "standardised": lambda h: (h - h.mean(0, keepdim=True)) / h.std(0, keepdim=True),
    "in place": lambda h: h.clone().sub_(h.mean(0)),
    "deviation of all": lambda h: h / torch.std(h),
    "softmax": lambda h: h.softmax(0),
    "log softmax": lambda h: torch.log_softmax(h, dim=0),
    "logsumexp": lambda h: h - h.logsumexp(0),
    "extremes": lambda h: (h - h.amin(0)) / (h.max(0).values - h.min(0)[0]),
    "median": lambda h: h - h.median(0).values,
    "norm": lambda h: h / h.norm(dim=0) + h / torch.linalg.vector_norm(h, dim=0),
    "normalize": lambda h: F.normalize(h, dim=0),
    "scans": lambda h: h.cumsum(0) + torch.cumprod(h, 0) + h.logcumsumexp(0),
    "order": lambda h: h * h.flip(0) * h.roll(1, 0),
    "transposed": lambda h: (h.T.softmax(-1) * h.T).T,
    "blocks": lambda h: h.unflatten(1, (2, 2)).softmax(0).flatten(1),
    "of two rows": lambda h: h * h[:, None].expand(-1, 3, -1).mean((0, 1)),
    "largest": lambda h: h * h.topk(2, 0).values.sum(0),
    "gathered": lambda h: h * (ftrain.whole_rows(h).T @ ftrain.whole_rows(h)).sum(0),
    "written in parts": written_in_parts,
    "columns as a map": lambda h: h - torch.vmap(lambda c: c.mean(), in_dims=1)(h),
    "rows as a map": lambda h: torch.vmap(lambda r: (r - r.mean()).cumsum(0))(h),
    "gradients of a row": lambda h: torch.vmap(torch.func.grad(lambda r: r.pow(3).mean()))(h),
    "gradients of a sum": lambda h: torch.func.grad(lambda z: z.pow(3).sum())(h),
    "second derivatives": lambda h: torch.func.jvp(torch.func.grad(lambda z: z.pow(4).sum()), (h,), (h,))[1],
    "gradient of its own": lambda h: torch.autograd.grad(h.pow(3).sum(), h, create_graph=True)[0],
    "straight through": lambda h: StraightThrough.apply(h),
    "in front of the rows": lambda h: (h.expand(3, *h.shape) @ h.new_ones(4, 4)).sum(0),
    "ops of images": lambda h: F.interpolate(F.pad(h[:, None], (1, 1), mode="reflect"), scale_factor=2.0)[:, 0, :4],
    "other pointwise ops": lambda h: F.logsigmoid(h) + F.hardswish(h) + torch.rsub(h, h.sin()),
    "places in a table": lambda h: h * torch.bucketize(h.detach(), torch.tensor([-0.5, 0.0, 0.5], dtype=F64)),
    "conjugates": lambda h: torch.view_as_real(
        torch.view_as_complex(h.reshape(-1, 2, 2)).conj().resolve_conj()
    ).flatten(1),
    "pooled": lambda h: h - F.adaptive_avg_pool1d(h[:, None], 1)[:, 0],
    "masked in place": lambda h: h.clone().masked_fill_(h < 0, 0.0),
    "gradients of rows through weights": lambda h: torch.vmap(
        torch.func.jacrev(lambda r: torch.tanh(r @ torch.arange(16.0, dtype=F64).view(4, 4)))
    )(h).sum(2),
    "the largest of each row": lambda h: torch.zeros_like(h).scatter(1, *reversed(h.topk(2, 1))),
    "diagonals": lambda h: torch.diag_embed(h).cumsum(1).diagonal(dim1=1, dim2=2),
    "a density": lambda h: torch.distributions.Normal(h.mean(0), h.std(0), validate_args=False).log_prob(h * h),
    "a density of vectors": lambda h: torch.distributions.MultivariateNormal(
        torch.zeros(4, dtype=F64), scale_tril=torch.eye(4, dtype=F64) + 0.1, validate_args=False
    ).log_prob(h * h)[:, None],
    "run again in its rows": lambda h: checkpoint(lambda h: h.softmax(1) * h, h, use_reentrant=False),
    "in a cell of a notebook": lambda h: CELL["standardised"](h),
    "row by row": lambda h: h.softmax(1) + h.cumsum(1) + F.layer_norm(h, (4,)) + h.max(1, keepdim=True).values,
}


@on_meshes(RIGHT, lambda i, j: j > 0)  # the second divides the batch as the first does
def test_ops_that_mix_rows(mesh, name):
    assert_equal_on(mesh, lambda p, b: Mean.of(RIGHT[name](hidden(p, b)) * b["y"]))


REFUSED = {
    "a mean of places": lambda h, b: h * (h[:, 0] > 0).nonzero().double().mean(),
    "places that are counted on": lambda h, b: h.index_select(0, (h[:, 0] > 0).nonzero()[:, 0] // 2),
    "a table by places": lambda h, b: torch.arange(8.0, dtype=F64)[torch.where(h[:, 0] > 0)[0]],
    "written at other places": lambda h, b: torch.zeros_like(h).index_add(
        0, torch.where(h[:, 0] > 0)[0], h[torch.where(h[:, 0] > 0)[0]].flip(0)
    ),
    "a bag of all rows": lambda h, b: F.embedding_bag(
        (h.detach() > 0).long().flatten(), h.new_ones(2, 4), torch.tensor([0, 3])
    ),
    "two parts": lambda h, b: h.chunk(2)[0] - h.chunk(2)[1],
    "pairs of chosen and rejected": lambda h, b: (lambda chosen, rejected: chosen - rejected)(*h.chunk(2)),
    "neighbours": lambda h, b: h.diff(dim=0),
    "the first rows": lambda h, b: h[:1],
    "windows": lambda h, b: h.unfold(0, 2, 1).prod(-1),
    "prototypes": lambda h, b: torch.zeros(3, 4, dtype=F64).index_add(0, torch.arange(len(h)) % 3, h).square(),
    "batch norm": lambda h, b: F.batch_norm(h, torch.zeros(4, dtype=F64), torch.ones(4, dtype=F64), training=True),
    "a spectrum of the rows": lambda h, b: torch.fft.fft(h, dim=0).abs(),
    "copies": lambda h, b: h - h.repeat(2, 1).std(0),
    "pairs": lambda h, b: h @ h.T @ h,
    "pairs by einsum": lambda h, b: torch.einsum("td,sd->ts", h, h).softmax(1) @ h,
    "differences": lambda h, b: (h[:, None] - h[None]).square().sum(1),
    "distances": lambda h, b: torch.cdist(h, h) @ h,
    "permuted": lambda h, b: h[torch.arange(len(h)).flip(0)],
    "drawn": lambda h, b: h.index_select(0, ftrain.permutation(ftrain.key(0), len(h))),
    "sorted": lambda h, b: h.sort(0).values,
    "argsorted": lambda h, b: h[h[:, 0].argsort()],
    "the first row": lambda h, b: h - h[0],
    "root of a sum": lambda h, b: h.square().sum().sqrt() * h,
    "mean by hand": lambda h, b: h - h.sum(0) / len(h),
    "covariance": lambda h, b: (h.T @ h).square(),
    "share of a sum": lambda h, b: h / h.abs().sum(),
    "decorrelated": lambda h, b: torch.linalg.inv(h.T @ h + torch.eye(4, dtype=F64)),
    "scalar products": lambda h, b: h * F.cosine_similarity(h, h.square(), dim=0),
    "two views": lambda h, b: torch.cat([h, 2 * h]).softmax(0),
    "convolution": lambda h, b: F.conv1d(h.T[None], torch.ones(4, 4, 3, dtype=F64), padding=1)[0].T,
    "mapped": lambda h, b: torch.vmap(lambda c: c.softmax(0), in_dims=1, out_dims=1)(h),
    "differentiated": lambda h, b: torch.func.grad(lambda z: (z - z.mean(0)).pow(3).sum())(h),
    "by an op's name": lambda h, b: torch.ops.aten._softmax(h, 0, False).sort(0).values,
    "a sum into a part": sum_into_a_part,
    "groups of columns": lambda h, b: h.T.reshape(-1).view(-1, 4).softmax(1),
    "run again in the backward": lambda h, b: checkpoint(lambda h: (h - h.mean(0)).pow(3), h, use_reentrant=False),
    "chosen by themselves": lambda h, b: h[(h[:, 0] > 0).long()],
    "other rows' places": lambda h, b: h.scatter(1, torch.zeros(2, 1, dtype=torch.int64), 0.0),
    "pool": lambda h, b: F.avg_pool1d(h.T[None], 3, stride=1, padding=1)[0].T,
    "attention": lambda h, b: F.scaled_dot_product_attention(h[None], h[None], h[None])[0],
}


@on_meshes(REFUSED, in_turn)
def test_ops_that_are_refused(mesh, name):
    with pytest.raises(
        ValueError,
        match=r"test_batch_rows.py:\d+ .*(mixes rows of the batch|reads a sum over rows|is not known to keep)",
    ):
        both(lambda p, b: Mean.of(REFUSED[name](hidden(p, b), b)), mesh)


BACKWARDS = {
    "means": lambda g: g - g.mean(0),
    "norms": lambda g: g / (1 + g.norm()),
    "order": lambda g: g.flip(0),
    "spread": lambda g: g.mean(0).expand_as(g),
}


@on_meshes(BACKWARDS, in_turn)
@pytest.mark.parametrize("plain", [False, True], ids=["of a square", "of a plain sum"])
def test_backwards_of_the_users_own_are_refused(mesh, name, plain):
    def loss(p, b):
        h = OfOtherRows.apply(hidden(p, b), BACKWARDS[name])
        return Mean.of(h if plain else h.square())

    with pytest.raises(ValueError, match=r"the backward of OfOtherRows mixes rows .*test_batch_rows.py"):
        both(loss, mesh)


INNER = {
    "of a mean": lambda h: torch.autograd.grad(h.pow(3).mean(), h, create_graph=True)[0],
    "of the whole batch": lambda h: torch.autograd.grad(h.std(), h, create_graph=True)[0],
    "of a function's mean": lambda h: torch.func.grad(lambda z: z.pow(3).mean())(h),
}


@on_meshes(INNER, in_turn)
def test_gradients_inside_a_loss_are_of_sums(mesh, name):
    with pytest.raises(ValueError, match=r"test_batch_rows.py:\d+ .*a gradient inside of a loss differentiates"):
        both(lambda p, b: Mean.of(INNER[name](hidden(p, b)) * b["y"]), mesh)


def test_an_op_of_which_nothing_is_known_is_refused_unless_the_user_knows():
    with pytest.raises(ValueError, match=r"doubled at .*test_batch_rows.py:\d+ .*is not known to keep rows"):
        both(lambda p, b: Mean.of(doubled(hidden(p, b))), MESHES[0])

    def known(p, b):
        with ftrain.within_documents():
            return Mean.of(doubled(hidden(p, b)) * b["y"])

    assert_equal_on(MESHES[0], known)


def test_a_refusal_that_the_loss_catches_comes_out():
    def loss(p, b):
        h = hidden(p, b)
        try:
            h = h @ h.T @ h
        except ValueError:
            h = h * 2
        return Mean.of(h)

    with pytest.raises(ValueError, match="mixes rows of the batch"):
        both(loss, MESHES[0])


def test_groups_of_rows_whose_number_is_given_are_refused():
    """A rank would form as many groups, of fewer rows."""
    for grouped in (lambda h: h.view(2, -1).softmax(-1), lambda h: h.unflatten(0, (2, -1)).softmax(1)):
        with pytest.raises(ValueError, match=r"at .*test_batch_rows.py:\d+ .*mixes rows of the batch"):
            both(lambda p, b, grouped=grouped: Mean.of(grouped(hidden(p, b))), MESHES[0])


def in_documents(h, b):
    with ftrain.within_documents():
        alike = b["ids"][:, None] == b["ids"][None]
        return (h @ h.T).masked_fill(~alike, -torch.inf).softmax(1) @ h


def neighbours(h, b):
    with ftrain.within_documents():
        return (h[1:] - h[:-1]) * (b["ids"][1:] == b["ids"][:-1])[:, None]


LEFT_ALONE = {
    "within documents": in_documents,
    "a score for each label": lambda h, b: h.log_softmax(-1)[torch.arange(len(h)), b["t"]],
    "looked up": lambda h, b: h + torch.eye(4, dtype=F64)[b["t"]],
    "gathered by label": lambda h, b: h.gather(1, b["t"][:, None]),
    "some rows": lambda h, b: torch.where((b["t"] > 1)[:, None], h, 0.0),
    "neighbours of one document": neighbours,
}


@pytest.mark.parametrize("mesh", MESHES[:2], ids=str)
@pytest.mark.parametrize("name", LEFT_ALONE)
def test_what_stays_on_a_rank_is_left_alone(mesh, name):
    batch = {**BATCH, "t": torch.arange(8) % 4, "ids": torch.arange(8) // 2}

    def loss(p, b):
        return Mean(LEFT_ALONE[name](hidden(p, b), b).square().sum(), torch.full((), float(len(b["x"])), dtype=F64))

    assert_equal_on(mesh, loss, batch)


@pytest.mark.parametrize("name", ["within documents", "neighbours of one document"])
def test_documents_that_ranks_share_are_refused(name):
    batch = {**BATCH, "ids": torch.arange(8) // 2}
    with pytest.raises(ValueError, match=r"within_documents on a sequence axis of 2|mixes rows of the batch"):
        both(lambda p, b: Mean.of(LEFT_ALONE[name](hidden(p, b), b)), MESHES[2], batch)


def test_rows_of_a_zigzag():
    mesh = Mesh(shard=2, sequence=2, kind="virtual")

    def step(p, batch):
        return ftrain.value_and_grad(lambda p, b: Mean.of(hidden(p, b).cumsum(0) * b["y"]))(p, batch)

    plan = Plan(mesh, Layout(sequence=Ring(zigzag=True)))
    one, many = ftrain.jit(step)(PARAMS, BATCH), ftrain.jit(step, plan=plan, specs=spec.of(PARAMS))(PARAMS, BATCH)
    for a, b in zip(tree.leaves(one), tree.leaves(many), strict=True):
        torch.testing.assert_close(b, a, rtol=1e-12, atol=1e-12)


def test_all_rows_are_not_to_be_had_in_micro_batches():
    def loss(p, b):
        return Mean.of(ftrain.whole_rows(hidden(p, b)))

    with pytest.raises(ValueError, match=r"whole_rows in a loss of ftrain\.accumulate"):
        ftrain.jit(ftrain.value_and_grad(ftrain.accumulate(loss, micro_batches=2)))(PARAMS, BATCH)


def softmax_over_rows(p, b):
    return Mean.of(hidden(p, b).softmax(0) * b["y"])


def around_the_mean(p, b):
    h = hidden(p, b)
    return Mean.of((h - h.mean(0)).pow(3) * b["y"])


def pairs_of_rows(p, b):
    return Mean.of((hidden(p, b) @ b["y"].T).logsumexp(1))


@pytest.mark.parametrize("loss", [softmax_over_rows, around_the_mean, pairs_of_rows])
@pytest.mark.parametrize("stacked", [False, True])
def test_rows_of_a_micro_batch_are_not_those_of_one_device(loss, stacked):
    mesh = Mesh(shard=2, kind="virtual")
    batch = {name: x.unflatten(0, (2, -1)) for name, x in BATCH.items()} if stacked else BATCH
    rules = {"*": Tokens(1)} if stacked else {}

    def step(p, batch):
        return ftrain.value_and_grad(ftrain.accumulate(loss, micro_batches=2, stacked=stacked))(p, batch)

    with pytest.raises(ValueError, match=r"test_batch_rows.py:\d+ (mixes rows of|reads a sum over rows of) the batch"):
        ftrain.jit(step, plan=Plan(mesh, Layout(), batch=rules), specs=spec.of(PARAMS))(PARAMS, batch)


def groups_of_rows(p, b):
    rewards = hidden(p, b).sum(1).view(-1, 4)
    return Mean.of((rewards - rewards.mean(1, keepdim=True)) / (rewards.std(1, keepdim=True) + 1e-4))


def labels_that_are_ignored(p, b):
    return Mean.of(F.cross_entropy(hidden(p, b), b["t"]))


def times_their_count(p, b):
    count = (b["t"] != -100).sum()
    return Mean(F.cross_entropy(hidden(p, b), b["t"]) * count, count)


def weighted_labels(p, b):
    return Mean.of(F.cross_entropy(hidden(p, b), b["t"], weight=torch.arange(1.0, 5.0, dtype=F64)))


@pytest.mark.parametrize("loss", [groups_of_rows, labels_that_are_ignored, times_their_count, weighted_labels])
def test_means_within_groups_and_over_labels(loss):
    assert_equal_on(MESHES[0], loss, {**BATCH, "t": torch.tensor([0, -100, -100, 3, 1, 2, -100, 0])})
