"""Steps that draw random numbers and move statistics: the jitted step does what the eager one does from the same seed,
whatever is recomputed, donated or accumulated.
"""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

import ftrain
from ftrain import Remat, tree
from ftrain.kernels.mean import sum_over_batch

WIDTH, ROWS = 4, 6


def dense(x, p, s):
    return torch.tanh(x @ p["w"] + p["b"])


def residual(x, p, s):
    return x + F.gelu(x @ p["w"])


def dropout(x, p, s):
    return F.dropout(x * p["b"], 0.4)


def noise(x, p, s):
    return x + torch.randn_like(x) * p["b"]


def leaky(x, p, s):
    return F.rrelu(x @ p["w"], training=True)


def norm(x, p, s):
    return F.batch_norm(x, s["mean"], s["var"], p["b"], training=True, momentum=0.3)


def norm_without_statistics(x, p, s):
    return F.batch_norm(x, None, None, p["b"], training=True)


def attention(x, p, s):
    q, k = x @ p["w"], x
    return F.scaled_dot_product_attention(q[None], k[None], x[None], dropout_p=0.3)[0]


def sampled(x, p, s):
    rows = torch.multinomial(torch.ones(ROWS, dtype=x.dtype), ROWS, replacement=True)
    return x[rows] @ p["w"]


LAYERS = [dense, residual, dropout, noise, leaky, norm, norm_without_statistics, attention, sampled]


def step_of(layers):
    """A step over `{"params", "statistics"}`: gradient, update, noise on the update, statistics in the state."""

    def step(state, batch):
        statistics = tree.map(torch.clone, state["statistics"])

        def loss(params):
            x = batch
            for layer, p, s in zip(layers, params["layers"], statistics, strict=True):
                x = layer(x, p, s)
            return x.square().mean()

        value, grads = ftrain.value_and_grad(loss)(state["params"])
        params = tree.map(lambda p, g: p - 0.1 * g + 0.01 * torch.rand_like(p), state["params"], grads)
        return {"params": params, "statistics": statistics}, {"loss": value, "grads": grads}

    return step


def state_of(depth):
    draw = torch.Generator().manual_seed(depth)
    new = lambda *shape: torch.randn(*shape, generator=draw, dtype=torch.float64)  # noqa: E731
    params = {"layers": [{"w": new(WIDTH, WIDTH), "b": new(WIDTH)} for _ in range(depth)]}
    moving = [{"mean": new(WIDTH), "var": new(WIDTH).square()} for _ in range(depth)]
    return {"params": params, "statistics": moving}, new(ROWS, WIDTH)


def three_steps(step, depth):
    state, batch = state_of(depth)
    torch.manual_seed(7)
    results = []
    for _ in range(3):
        state, metrics = step(state, batch)
        results.append(tree.map(torch.clone, (state, metrics)))
    return results, torch.rand(2)  # and whoever draws next gets the same


def assert_equal(ours, theirs):
    for path, a, b in zip(tree.paths(theirs), tree.leaves(ours), tree.leaves(theirs), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-12, msg=lambda m, path=path: f"{path}: {m}")


remats = st.sampled_from(
    ["none", "layer", "all", Remat(us_per_mb=1e9), Remat(us_per_mb=100.0), Remat(paths={"layers.0.*": "recompute"})]
)


@settings(max_examples=8, deadline=None)
@given(st.lists(st.sampled_from(LAYERS), min_size=2, max_size=5), remats, st.sampled_from([None, "state"]))
def test_any_step_equals_eager(layers, remat, donate):
    layers = [dense, *layers]
    step = step_of(layers)
    assert_equal(three_steps(ftrain.jit(step, remat=remat, donate=donate), len(layers)), three_steps(step, len(layers)))


def test_under_the_tightest_budget():
    layers = [dense, dropout, norm, residual, noise, attention]
    step = step_of(layers)
    state, batch = state_of(len(layers))
    with pytest.raises(ValueError) as refusal:
        ftrain.jit(step, remat=Remat(budget=1), donate="state").lower(state, batch)
    tight = Remat(budget=refusal.value.smallest)
    assert_equal(three_steps(ftrain.jit(step, remat=tight, donate="state"), 6), three_steps(step, 6))


def test_inductor_draws_the_same_numbers():
    step = step_of([dense, dropout, noise, norm])
    assert_equal(three_steps(ftrain.jit(step, backend="inductor"), 4), three_steps(step, 4))


def test_random_numbers_that_nobody_reads_are_drawn():
    def step(x):
        torch.rand(5)
        return x + torch.rand(3)

    torch.manual_seed(0)
    expected = step(torch.ones(3))
    torch.manual_seed(0)
    assert torch.equal(ftrain.jit(step)(torch.ones(3)), expected)


@pytest.mark.parametrize("options", [{}, {"remat": "all"}, {"donate": "w"}], ids=str)
def test_micro_batches_draw_as_in_eager_code(options):
    def loss(w, x):
        statistics = torch.zeros(WIDTH), torch.ones(WIDTH)
        y = F.batch_norm(F.dropout(x @ w, 0.5), *statistics, training=True)
        return ftrain.Mean(y.square().sum(), torch.tensor(float(ROWS))), {"mean": statistics[0]}

    def step(w, x):
        (value, aux), grads = ftrain.value_and_grad(
            ftrain.accumulate(loss, 3, has_aux=True, stacked=True), has_aux=True
        )(w, x)
        return w - 0.1 * grads, (value, aux)

    def twice(run):
        torch.manual_seed(5)
        w, found = torch.eye(WIDTH), []
        for _ in range(2):
            w, metrics = run(w, torch.linspace(-1, 1, 3 * ROWS * WIDTH).reshape(3, ROWS, WIDTH))
            found.append((w.clone(), metrics))
        return found

    torch.testing.assert_close(twice(ftrain.jit(step, **options)), twice(step))


def noisy_loss(p, batch):
    """A loss with torch's random numbers in its totals, in dead ends and in aux, whose counts differ."""
    x, mask = batch
    h = F.dropout(torch.tanh(x @ p["w"]), 0.3) + torch.randn_like(x)
    torch.rand(3)
    h = F.scaled_dot_product_attention(h[None], h[None], h[None], dropout_p=0.2)[0] + torch.randint(0, 3, (1,))
    return ftrain.Mean((h.square().mean(-1) * mask).sum(), mask.sum()), {"noise": torch.rand(2) + h.detach().sum()}


def in_a_plain_loop(loss):
    """Value, aux and gradients as one would write them by hand."""

    def run(p, batch):
        micro_batches = list(zip(*batch, strict=True))
        count = batch[1].sum()

        def whole(p):
            found = [loss(p, b) for b in micro_batches]
            return sum(m.total for m, _ in found) / count, {"noise": sum(a["noise"] for _, a in found)}

        return ftrain.value_and_grad(whole, has_aux=True)(p)

    return run


@pytest.mark.parametrize("wrap", [lambda f: f, ftrain.jit], ids=["eager", "jit"])
def test_micro_batches_draw_as_in_a_plain_loop(wrap):
    batch = torch.randn(3, ROWS, WIDTH), (torch.arange(3.0 * ROWS).reshape(3, ROWS) % 5 > 1).float()
    p = {"w": torch.randn(WIDTH, WIDTH)}
    results = []
    for run in (
        wrap(ftrain.value_and_grad(ftrain.accumulate(noisy_loss, 3, has_aux=True, stacked=True), has_aux=True)),
        in_a_plain_loop(noisy_loss),
    ):
        torch.manual_seed(5)
        results.append((run(p, batch), torch.rand(2)))
    torch.testing.assert_close(results[0], results[1], rtol=1e-5, atol=1e-5)


def randomly_masked(p, x):
    mask = (torch.rand(ROWS) > 0.4).float()
    return ftrain.Mean(((x @ p).square().mean(-1) * mask).sum(), mask.sum())


def randomly_balanced(p, x):
    x = F.dropout(x, 0.5)
    load = sum_over_batch((x > 0).float().sum())
    return ftrain.Mean((x @ p).sum() * load, torch.tensor(float(ROWS)))


@pytest.mark.parametrize("loss", [randomly_masked, randomly_balanced])
def test_counts_that_are_random_are_refused_in_a_step(loss):
    p, x = torch.randn(WIDTH, WIDTH), torch.randn(3, ROWS, WIDTH)
    step = ftrain.value_and_grad(ftrain.accumulate(loss, 3, stacked=True))
    with pytest.raises(
        ValueError, match=r"test_random_and_writing.py:\d+.*depends on random numbers.*ftrain.bernoulli"
    ):
        ftrain.jit(step)(p, x)


def test_counts_that_are_random_are_those_of_the_loss_in_eager_code():
    p, x = torch.randn(WIDTH, WIDTH), torch.randn(3, ROWS, WIDTH)
    torch.manual_seed(5)
    value, _ = ftrain.value_and_grad(ftrain.accumulate(randomly_masked, 3, stacked=True))(p, x)
    torch.manual_seed(5)
    found = [randomly_masked(p, row) for row in x]
    torch.testing.assert_close(value, sum(m.total for m in found) / sum(m.count for m in found))


@torch.library.custom_op("random_test::count", mutates_args=())
def count(x: torch.Tensor) -> torch.Tensor:
    """An op that torch knows nothing of: it counts its calls."""
    calls.append(1)
    return x.clone()


count.register_fake(torch.empty_like)
calls: list[int] = []


def counted(x):
    return _Counted.apply(x)


class _Counted(torch.autograd.Function):
    @staticmethod
    def forward(x):
        return count(x)

    @staticmethod
    def setup_context(ctx, inputs, output):
        pass

    @staticmethod
    def backward(ctx, grad):
        return grad


def test_an_unknown_op_runs_once_per_step():
    def step(w, x):
        return ftrain.value_and_grad(lambda w: (counted(torch.tanh(x @ w)).square() + count(x).sum() * 0).sum())(w)

    for remat in ("none", "all", Remat(us_per_mb=1e9)):
        jitted = ftrain.jit(step, remat=remat)
        jitted.lower(torch.ones(3, 3), torch.ones(2, 3))
        calls.clear()
        jitted(torch.ones(3, 3), torch.ones(2, 3))
        assert len(calls) == 2
