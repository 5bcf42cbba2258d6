"""What a step computes of pieces is what one device computes of whole arrays, or is refused with its line."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import ftrain
from ftrain import Mean, tree
from ftrain.kernels.pack import draw_over_batch
from ftrain.modules.spec import Constant, ParamSpec
from ftrain.optim.shards import whole_shape
from ftrain.sharding import Layout, Mesh, Plan
from ftrain.trace.spread import Spreads
from tests.helpers.divided_updates import MESHES, SPECS, arguments, assert_equal, both, loss, updated

RIGHT = {
    "clip by hand": lambda w, g: w - g * (0.1 / g.norm()).clamp(max=1.0),
    "norm of all numbers": lambda w, g: w - g / torch.linalg.vector_norm(g, ord=1),
    "largest": lambda w, g: w - g / g.abs().max(),
    "infinity norm": lambda w, g: w - g / torch.linalg.vector_norm(g, ord=float("inf")),
    "skipped where not finite": lambda w, g: torch.where(torch.isfinite(g).all(), w - 0.1 * g, w),
    "skipped where any is large": lambda w, g: torch.where((g > 0.3).any(), w, w - 0.1 * g),
    "rows without a negative": lambda w, g: torch.where((g > 0).all(-1, keepdim=True), w, w - 0.1 * g),
    "scale of a leaf": lambda w, g: w - 0.1 * w.abs().mean() * g / g.abs().mean(),
    "mean over a dim": lambda w, g: w - 0.1 * (g - g.mean(0, keepdim=True)),
    "sum over the other": lambda w, g: w - 0.1 * g / (1 + g.square().sum(-1, keepdim=True)),
    "a moment": lambda w, g: torch.lerp(w, torch.zeros_like(w), 0.1) - 0.1 * g.sign(),
    "transposed and back": lambda w, g: (w.t() - 0.1 * g.t().contiguous()).t(),
    "in place": lambda w, g: w.clone().sub_(g.clone().mul_(0.1)).add_(1.0),
    "a product with what is whole": lambda w, g: w - g if w.dim() < 2 else w - (g.sum() * torch.eye(8).sum()) * g,
}  # fmt: skip
ON_WHOLE_ARRAYS = {
    "products of pieces": lambda w, g: w - 0.1 * g @ (g.mT @ g) if g.dim() == 2 else w,
    "a product with itself": lambda w, g: w - 0.1 * (g @ g.mT).sum(1, keepdim=True) if g.dim() == 2 else w,
    "an outer product": lambda w, g: w - 0.1 * (g[:, None] * g[None, :]).sum(1) if g.dim() == 1 else w,
    "a sort": lambda w, g: w - 0.1 * g.sort(0).values,
    "a softmax": lambda w, g: w - 0.1 * g.softmax(0),
    "a running sum": lambda w, g: w - 0.1 * g.cumsum(0),
    "numbered rows": lambda w, g: w - 0.1 * torch.arange(w.shape[0])[(...,) + (None,) * (w.dim() - 1)],
    "half of a leaf": lambda w, g: torch.cat([w[:1] - g[:1], w[1:]]),
    "as many rows as a piece has": lambda w, g: w - 0.1 * g[: 4 // g.dim()].sum(),
    "the last of them": lambda w, g: w - 0.1 * g[-4 // g.dim() :].sum(),
}
WRONG = {"noise of torch's own": (lambda w, g: w - 0.1 * torch.rand_like(w), "rand_like")}


@pytest.mark.parametrize(
    ("name", "mesh"),
    [
        # copies and padding for each; the two other meshes for those that reduce in another way than by a sum
        pytest.param(name, mesh, marks=[] if i % 2 or name in ("largest", "a moment") else pytest.mark.exhaustive)
        for name in RIGHT
        for i, mesh in enumerate(MESHES)
    ],
    ids=str,
)
def test_updates_of_ones_own_that_look_at_whole_leaves(name, mesh):
    assert_equal(*both(updated(RIGHT[name]), mesh))


@pytest.mark.parametrize("name", ON_WHOLE_ARRAYS)
def test_updates_that_cannot_be_done_on_pieces_are_done_on_whole_arrays(name):
    for mesh in (MESHES[0], MESHES[3]):
        assert_equal(*both(updated(ON_WHOLE_ARRAYS[name]), mesh))


@pytest.mark.parametrize("name", WRONG)
def test_updates_that_cannot_be_done_on_pieces_are_refused_with_their_line(name):
    update, op = WRONG[name]
    with pytest.raises(ValueError, match=rf"({op}).*test_spread.py:\d+"):
        both(updated(update), MESHES[0])


@pytest.mark.parametrize("mesh", [*MESHES, Mesh(4, kind="virtual")], ids=str)
def test_losses_at_parameters_that_the_step_has_computed(mesh):
    """Sharpness-aware steps, two steps in one, a cast by hand, a product of leaves."""

    def step(state, batch):
        near = tree.map(lambda w, g: w + 0.05 * g / g.norm(), state, ftrain.grad(loss)(state, batch))
        once = tree.map(lambda w, g: w - 0.01 * g, state, ftrain.grad(loss)(near, batch))
        twice = tree.map(lambda w, g: w - 0.01 * g, once, ftrain.grad(loss)(once, batch))
        scale = torch.full((), 1.5, dtype=torch.float64)
        of_scale = ftrain.grad(lambda s, batch: loss(tree.map(lambda w: w * s, twice), batch))
        return twice, of_scale(scale, batch) if mesh.shard == 1 else scale

    assert_equal(*both(step, mesh))


def test_a_gradient_of_the_data_is_each_ranks_own():
    def step(state, batch):
        of_x = ftrain.grad(lambda x, params, y: loss(params, {"x": x, "y": y}))(batch["x"], state, batch["y"])
        return Mean(of_x.square().sum(), torch.full((), float(of_x.numel()), dtype=torch.float64))

    one, many = both(step, MESHES[0])
    assert_equal(one.total, many.total)


def test_a_piece_in_the_middle_of_a_loss_is_gathered():
    """A teacher that the loss closes over, and that no argument of it holds."""
    specs = {"w": ParamSpec((2,), ("embed",), Constant(0.0)), "teacher": ParamSpec((2,), ("embed",), Constant(0.0))}

    def step(state, batch):
        def distance(params, batch):
            e = (batch["x"] * params["w"] - batch["x"] * state["teacher"]).square() + state["teacher"].cumsum(0).sum()
            return Mean(e.sum(), torch.full((), float(e.numel()), dtype=e.dtype))

        return ftrain.value_and_grad(distance)({"w": state["w"]}, batch)

    state, batch = {"w": torch.ones(2), "teacher": torch.tensor([1.0, 2.0])}, {"x": torch.randn(4, 2)}
    state, batch = tree.map(torch.Tensor.double, (state, batch))
    assert_equal(ftrain.jit(step)(state, batch), ftrain.jit(step, plan=Plan(MESHES[0]), specs=specs)(state, batch))


def test_two_models_with_equal_names_in_one_state():
    specs = {"student": SPECS, "teacher": {"w": ParamSpec((8, 2), ("embed", "mlp"), Constant(0.0))}}
    state, batch = arguments()
    state = {"student": state, "teacher": {"w": torch.ones(8, 2, dtype=torch.float64)}}

    def distance(student, teacher, batch):
        e = (batch["x"] @ student["w"] + student["b"]) @ teacher["w"]
        return Mean(e.square().sum(), torch.full((), float(e.numel()), dtype=e.dtype))

    def step(state, batch):
        grads = ftrain.grad(distance)(state["student"], state["teacher"], batch)
        student = tree.map(lambda w, g: w - 0.1 * g, state["student"], grads)
        return {"student": student, "teacher": tree.map(lambda t: t * 0.9, state["teacher"])}

    plan = Plan(Mesh(shard=2, kind="virtual"), Layout())
    assert_equal(ftrain.jit(step)(state, batch), ftrain.jit(step, plan=plan, specs=specs)(state, batch))


def test_what_the_plan_does_not_know_is_not_differentiated():
    state, batch = arguments()
    step = updated(RIGHT["a moment"])
    for specs, nearest in ((None, ""), ({"layer": SPECS}, "; the nearest it knows is 'layer.[bw]'")):
        with pytest.raises(ValueError, match=rf"leaf 'state.b' is differentiated, and the plan knows no .*{nearest}"):
            ftrain.jit(step, plan=Plan(MESHES[0]), specs=specs)(state, batch)


def test_counts_of_what_is_whole_are_those_of_one_device():
    """Of a leaf that every rank holds whole, of a dim that is not divided, of the shape of the array."""
    for update, options in (
        (lambda w, g: w - g * g.sum() / g.numel(), {"parameters": ()}),
        (lambda w, g: w - g * g.sum() / math.prod(whole_shape(g)), {}),
        (lambda w, g: w - g / len(g.mT) if g.dim() == 2 else w, {}),
        (lambda w, g: w - torch.zeros_like(w) - g / 3 / torch.zeros(3).numel(), {}),
    ):
        assert_equal(*both(updated(update), MESHES[0], **options))


def test_a_step_whose_data_has_another_name_is_refused():
    with pytest.raises(ValueError, match=r"f\(state, data\) has no argument 'batch', so every rank would compute all"):

        @ftrain.jit(plan=Plan(MESHES[0]), specs=SPECS)
        def f(state, data):
            return state


def test_a_count_that_is_a_constant_is_summed_over_ranks():
    def counted(params, batch):
        e = (batch["x"] @ params["w"] + params["b"]).square()
        return Mean(e.sum(), torch.tensor(float(batch["x"].shape[0]), dtype=torch.float64))

    def step(state, batch):
        return ftrain.grad(counted)(state, batch)

    assert_equal(*both(step, MESHES[0]))


@pytest.mark.parametrize("leaves", [1, 5])
def test_the_body_of_a_loop_is_gone_through_as_often_for_many_results_as_for_one(leaves, monkeypatch):
    gone_through, of_loop = [], Spreads.of_loop

    def counted(self, node, carry=None):
        gone_through.append(node)
        return of_loop(self, node, carry)

    def of_rows(params, batch):
        return Mean.of((batch["x"] @ sum(params.values())).square())

    monkeypatch.setattr(Spreads, "of_loop", counted)
    params = {f"w{i}": torch.ones(4, 8, dtype=torch.float64) for i in range(leaves)}
    specs = {name: ParamSpec((4, 8), ("embed", "mlp"), Constant(0.0)) for name in params}
    step = ftrain.jit(ftrain.grad(ftrain.accumulate(of_rows, 2)), plan=Plan(MESHES[0]), specs=specs)
    step.lower(params, arguments()[1])
    assert 0 < len(gone_through) <= 3  # two loops, and the carry of one of them settles at the second time


def test_a_document_is_never_cut_in_two():
    step = ftrain.jit(lambda batch: Mean.of(batch["x"]), plan=Plan(MESHES[0]), specs={})
    ids = torch.tensor([0, 0, 0, 1, 1, 1, 2, 2])
    with pytest.raises(ValueError, match=r"'batch.segments': a document \(id 1\) goes on over token 4"):
        step({"x": torch.ones(8), "segments": ids})


def noisy(draw):
    def step(state, batch):
        noisy_batch = {**batch, "x": batch["x"] + draw(batch["x"].shape)}
        return ftrain.grad(loss)(state, noisy_batch)

    return step


@pytest.mark.parametrize(
    ("draw", "words"),
    [
        (lambda shape: torch.randn(shape, dtype=torch.float64), "draws with torch's own generator"),
        (lambda shape: ftrain.normal(ftrain.key(1), tuple(shape)), "ftrain.kernels.pack.draw_over_batch"),
    ],
)
def test_numbers_drawn_for_a_ranks_rows_are_refused(draw, words):
    with pytest.raises(ValueError, match=rf"is not what one device computes: .*test_spread.py.*{words}"):
        both(noisy(draw), MESHES[0])


def test_numbers_drawn_over_the_batch_are_those_of_one_device():
    assert_equal(
        *both(noisy(lambda shape: draw_over_batch(ftrain.normal, ftrain.key(1), tuple(shape)).double()), MESHES[2])
    )
    assert_equal(*both(noisy(lambda shape: ftrain.normal(ftrain.key(1), tuple(shape)[1:]).double()), MESHES[2]))


def test_results_that_are_constants():
    def step(state, batch):
        like = torch.ones_like(state["w"])
        return {"w": like, "b": torch.zeros(()), "sum": (state["w"] * like).sum()}

    assert_equal(*both(step, MESHES[0]))
    with pytest.raises(ValueError, match=r"result 'own' is a constant of shape \[2, 8\].*torch.zeros_like\(leaf\)"):
        both(lambda state, batch: {"own": torch.ones(2, 8)}, MESHES[0])


def test_sizes_that_do_not_fit_on_a_share_say_so():
    with pytest.raises(ValueError, match=r"test_spread.py:\d+ .*On a mesh of 2 ranks the batch is one rank's share"):
        both(lambda state, batch: Mean.of(batch["x"].view(12, 2, 2)), MESHES[0])
    assert_equal(*both(lambda state, batch: Mean.of(batch["x"] @ state["w"]), MESHES[0]))


OPS = {
    "add": lambda a, b: a + b,
    "scale": lambda a, b: a * b.abs().mean(),
    "norm": lambda a, b: a / (1 + b.norm()),
    "rows": lambda a, b: a + b.mean(-1, keepdim=True),
    "columns": lambda a, b: a - b.mean(0, keepdim=True),
    "turn": lambda a, b: (a.mT + b.mT).mT,
    "largest": lambda a, b: a / (1 + b.abs().amax()),
    "sort": lambda a, b: a + b.sort(0).values,
    "product": lambda a, b: a @ (b.mT @ b),
    "constant": lambda a, b: a + torch.full_like(b, 0.5),
    "where": lambda a, b: torch.where(b > 0, a, b),
}


@given(st.lists(st.sampled_from(sorted(OPS)), min_size=1, max_size=6), st.sampled_from(MESHES[:2]), st.data())
@settings(max_examples=40, deadline=None)
def test_any_update_is_equal(names, mesh, data):
    order = [data.draw(st.integers(0, i + 1)) for i in range(len(names))]

    def update(w, g):
        values = [w, g]
        for name, at in zip(names, order, strict=True):
            values.append(OPS[name](values[-1], values[at]))
        return values[-1]

    def step(state, batch):
        grads = ftrain.grad(loss)(state, batch)
        return {"w": update(state["w"], grads["w"]), "b": state["b"]}

    one, many = both(step, mesh)
    torch.testing.assert_close(many, one, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("cut", [lambda w: w.narrow(0, 0, 2), lambda w: w.narrow(0, -2, 2), lambda w: w[:2]])
def test_a_slice_that_takes_all_of_a_piece_is_not_all_of_the_array(cut):
    state, batch = arguments()
    step = ftrain.jit(lambda s, batch: {"w": cut(s["w"]) * 2}, plan=Plan(MESHES[0]), specs=SPECS)
    assert_equal({"w": cut(state["w"]) * 2}, step(state, batch))


@pytest.mark.parametrize("cut", [lambda w: w[:], lambda w: w[:4], lambda w: w[:, :3]])
def test_a_slice_of_all_rows_is_a_piece(cut):
    state, batch = arguments()
    step = ftrain.jit(lambda s, batch: {"w": cut(s["w"]) * 2}, plan=Plan(MESHES[0]), specs=SPECS)
    assert_equal({"w": cut(state["w"]) * 2}, step(state, batch))
