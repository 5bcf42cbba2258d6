"""T tokens, D model, V vocabulary."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.autograd import gradcheck, gradgradcheck
from torch.fx.experimental.proxy_tensor import make_fx

from ftrain.kernels.linear_cross_entropy import linear_cross_entropy, linear_cross_entropy_reference


def inputs(T=7, D=4, V=9, *, ignored=2, transposed=False, dtype=torch.float64, seed=0, grad=True):
    random = torch.Generator().manual_seed(seed)
    x = torch.randn(T, D, generator=random, dtype=torch.float64).to(dtype).requires_grad_(grad)
    w = torch.randn(*((V, D) if transposed else (D, V)), generator=random, dtype=torch.float64).to(dtype)
    labels = torch.randint(0, V, (T,), generator=random)
    labels[torch.randperm(T, generator=random)[:ignored]] = -100
    weights = torch.rand(T, generator=random, dtype=torch.float64).requires_grad_(grad)
    return x, w.requires_grad_(grad), labels, weights


def one_by_one(x, w_DV, labels, weights, softcap):
    total = torch.zeros((), dtype=torch.float64)
    for t, label in enumerate(labels.tolist()):
        if label != -100:
            z = x[t] @ w_DV
            z = z if softcap is None else softcap * torch.tanh(z / softcap)
            total = total - weights[t] * torch.log(z[label].exp() / z.exp().sum())
    return total


@pytest.mark.parametrize("softcap", [None, 1.5])
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("f", [linear_cross_entropy, linear_cross_entropy_reference])
def test_is_what_it_says(f, transposed, softcap):
    x, w, labels, weights = inputs(transposed=transposed, grad=False)
    got = f(x, w, labels, weights_T=weights, transposed=transposed, softcap=softcap)
    torch.testing.assert_close(got, one_by_one(x, w.t() if transposed else w, labels, weights, softcap))


@pytest.mark.parametrize("chunk", [1, 3, None])
@pytest.mark.parametrize("softcap", [None, 1.5])
@pytest.mark.parametrize("transposed", [False, True])
def test_gradient_is_the_derivative(transposed, softcap, chunk):
    x, w, labels, weights = inputs(T=4, D=3, V=5, transposed=transposed, ignored=1)

    def loss(x, w, weights):
        options = {"transposed": transposed, "softcap": softcap, "chunk_tokens": chunk}
        return 3 * linear_cross_entropy(x, w, labels, weights_T=weights, **options, backend="chunked")

    assert gradcheck(loss, (x, w, weights))


@given(
    T=st.integers(0, 12),
    V=st.integers(1, 8),
    ignored=st.integers(0, 12),
    chunk=st.none() | st.integers(1, 14),
    weighted=st.booleans(),
    transposed=st.booleans(),
    seed=st.integers(0, 99),
)
@settings(max_examples=50, deadline=None)
def test_any_size_is_like_the_reference(T, V, ignored, chunk, weighted, transposed, seed):
    x, w, labels, weights = inputs(T, 3, V, ignored=min(ignored, T), transposed=transposed, seed=seed)
    options = {"weights_T": weights if weighted else None, "transposed": transposed}
    wanted = [x, w, weights] if weighted else [x, w]
    got = linear_cross_entropy(x, w, labels, chunk_tokens=chunk, **options)
    want = linear_cross_entropy_reference(x, w, labels, **options)
    torch.testing.assert_close(got, want)
    for a, b in zip(torch.autograd.grad(got, wanted), torch.autograd.grad(want, wanted), strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("needed", [("x",), ("w",), ("weights",), ("x", "w")])
def test_only_what_is_needed(needed):
    tensors = dict(zip(("x", "w", "weights"), (lambda x, w, _, s: (x, w, s))(*inputs(grad=False)), strict=True))
    labels = inputs()[2]
    for name in needed:
        tensors[name].requires_grad_()
    wanted = [tensors[name] for name in needed]

    def grads(f):
        return torch.autograd.grad(f(tensors["x"], tensors["w"], labels, weights_T=tensors["weights"]), wanted)

    torch.testing.assert_close(grads(linear_cross_entropy), grads(linear_cross_entropy_reference))


def test_every_label_ignored_is_zero_with_zero_gradients():
    x, w, labels, _ = inputs(ignored=7)
    loss = linear_cross_entropy(x, w, labels)
    assert loss.item() == 0
    assert all(torch.equal(g, torch.zeros_like(g)) for g in torch.autograd.grad(loss, (x, w)))


def test_ignored_tokens_may_hold_anything():
    x, w, labels, _ = inputs()
    broken = torch.where((labels == -100)[:, None], torch.nan, x.detach()).requires_grad_()
    loss = linear_cross_entropy(broken, w, labels)
    assert torch.equal(loss, linear_cross_entropy(x, w, labels))
    assert all(g.isfinite().all() for g in torch.autograd.grad(loss, (broken, w)))


def test_another_ignore_index():
    x, w, labels, _ = inputs(ignored=0)
    kept = labels != 3
    got = linear_cross_entropy(x, w, labels, ignore_index=3)
    torch.testing.assert_close(got, linear_cross_entropy(x[kept], w, labels[kept]))


def test_large_logits_do_not_overflow():
    x, w, labels, _ = inputs(dtype=torch.float32)
    loss = linear_cross_entropy(x * 1e4, w, labels)
    torch.testing.assert_close(loss, linear_cross_entropy_reference(x * 1e4, w, labels))
    assert loss.isfinite()


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("D", [16, 48])
def test_half_precision_is_close(transposed, D):
    x, w, labels, weights = inputs(60, D, 50, dtype=torch.bfloat16, transposed=transposed)
    options = {"weights_T": weights.detach(), "transposed": transposed}
    got = linear_cross_entropy(x, w, labels, chunk_tokens=20, **options)
    assert got.dtype == torch.float32
    exact = [t.detach().double().requires_grad_() for t in (x, w)]
    want = linear_cross_entropy_reference(*exact, labels, **options)
    torch.testing.assert_close(got.double(), want, rtol=5e-3, atol=0)
    for a, b in zip(torch.autograd.grad(got, (x, w)), torch.autograd.grad(want, exact), strict=True):
        assert a.dtype == torch.bfloat16
        assert (a.double() - b).norm() < 0.02 * b.norm()


def test_inside_torch_func():
    x, w, labels, weights = inputs(grad=False)

    def loss(f):
        return lambda x, w, weights: f(x, w, labels, weights_T=weights) * 2

    everything = (0, 1, 2)
    got = torch.func.grad(loss(linear_cross_entropy), everything)(x, w, weights)
    torch.testing.assert_close(got, torch.func.grad(loss(linear_cross_entropy_reference), everything)(x, w, weights))


@pytest.mark.parametrize(
    "transformed",
    [
        lambda f, x: torch.func.hessian(f)(x),
        lambda f, x: torch.func.vmap(torch.func.grad(f))(torch.stack([x, 2 * x])),
        lambda f, x: torch.func.jvp(f, (x,), (x.cos(),)),
    ],
    ids=["hessian", "gradients per sample", "jvp"],
)
def test_composes_with_transforms(transformed):
    x, w, labels, _ = inputs(grad=False)
    got, want = (
        transformed(lambda x, f=f: f(x, w, labels), x) for f in (linear_cross_entropy, linear_cross_entropy_reference)
    )
    torch.testing.assert_close(got, want)


def test_the_reference_has_a_second_derivative():
    x, w, labels, weights = inputs(3, 2, 4, ignored=1)
    assert gradgradcheck(lambda x, w, s: linear_cross_entropy_reference(x, w, labels, weights_T=s), (x, w, weights))


@pytest.mark.parametrize("by", [0, 1])
def test_a_second_derivative_of_the_fast_path_is_an_error(by):
    x, w, labels, _ = inputs()
    (gradient,) = torch.autograd.grad(linear_cross_entropy(x, w, labels), (x, w)[by], create_graph=True)
    with pytest.raises(NotImplementedError, match="linear_cross_entropy has no second derivative"):
        torch.autograd.grad(gradient.square().sum(), (x, w)[1 - by])


def test_one_node_in_a_trace():
    x, w, labels, _ = inputs(grad=False)

    def step(x, w, labels):
        return torch.func.grad_and_value(lambda x, w: linear_cross_entropy(x, w, labels), (0, 1))(x, w)

    graph = make_fx(step, tracing_mode="fake")(x, w, labels)
    names = [str(n.target) for n in graph.graph.nodes if "ftrain" in str(n.target)]
    assert names == ["ftrain.linear_cross_entropy_grads.default"]
    torch.testing.assert_close(graph(x, w, labels), step(x, w, labels), rtol=0, atol=0)


def test_one_node_that_makes_no_gradients_where_none_are_needed():
    x, w, labels, _ = inputs(grad=False)
    graph = make_fx(lambda *a: linear_cross_entropy(*a), tracing_mode="fake")(x, w, labels)
    names = [str(n.target) for n in graph.graph.nodes if "ftrain" in str(n.target)]
    assert names == ["ftrain.linear_cross_entropy_loss.default"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("need", [(True, True), (False, True), (True, False)])
def test_shape_rules_are_right(need, transposed, dtype):
    x, w, labels, weights = inputs(transposed=transposed, dtype=dtype, grad=False)
    arguments = (x, w, labels, weights, -100, None, transposed, 3)
    tests = ("test_schema", "test_faketensor")
    torch.library.opcheck(torch.ops.ftrain.linear_cross_entropy_loss.default, arguments, test_utils=tests)
    torch.library.opcheck(torch.ops.ftrain.linear_cross_entropy_grads.default, (*arguments, *need), test_utils=tests)


@pytest.mark.parametrize("transposed", [False, True])
def test_never_holds_all_logits(transposed, measure_memory):
    T, D, V = 8000, 16, 4096
    x, w, labels, _ = inputs(T, D, V, ignored=9, transposed=transposed, dtype=torch.float32)

    def gradients():
        return torch.autograd.grad(linear_cross_entropy(x, w, labels, transposed=transposed), (x, w))

    measured = measure_memory(gradients)
    assert measured.largest <= 48 * 2**20 < T * V * 4 / 2
    assert measured.workspace < 1.1 * 48 * 2**20


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.zeros(7, 5)}, r"x \(7, 5\), w \(4, 9\)"),
        ({"transposed": True}, r"w \[V, D\] \(transposed=True\)"),
        ({"x": torch.zeros(7, 4, dtype=torch.bfloat16)}, "x is torch.bfloat16, w torch.float32"),
        ({"labels": torch.zeros(6, dtype=torch.int64)}, r"labels must be int64 \[7\], not torch.int64 \[6\]"),
        ({"labels": torch.zeros(7)}, "labels must be int64"),
        ({"labels": torch.tensor([0, 1, 2, 9, 0, 0, 0])}, r"in \[0, 9\) nor ignore_index=-100: label 9 at token 3"),
        ({"labels": torch.tensor([0, -1, 2, 0, 0, 0, 0])}, "label -1 at token 1"),
        ({"weights_T": torch.zeros(6)}, r"weights must be floating \[7\]"),
        ({"softcap": 0.0}, "softcap=0.0 must be positive"),
        ({"chunk_tokens": 0}, "chunk_tokens=0 must be at least 1"),
        ({"backend": "flash"}, "backend='flash' is not one of"),
    ],
)
def test_what_does_not_fit_is_named(change, message):
    labels = torch.zeros(7, dtype=torch.int64)
    arguments = {"x": torch.zeros(7, 4), "w": torch.zeros(4, 9), "labels": labels} | change
    tensors = [arguments.pop(name) for name in ("x", "w", "labels")]
    with pytest.raises(ValueError, match=message):
        linear_cross_entropy(*tensors, **arguments)


@pytest.mark.gpu
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_cuda_is_like_the_reference_and_does_not_wait(dtype, transposed):
    x, w, labels, _ = (t.detach().cuda() for t in inputs(300, 64, 500, ignored=40, dtype=dtype, transposed=transposed))
    x.requires_grad_()
    w.requires_grad_()
    linear_cross_entropy(x, w, labels, transposed=transposed, chunk_tokens=100)
    torch.cuda.set_sync_debug_mode("error")
    try:
        loss = linear_cross_entropy(x, w, labels, transposed=transposed, chunk_tokens=100)
        got = torch.autograd.grad(loss, (x, w))
    finally:
        torch.cuda.set_sync_debug_mode("default")
    exact = [t.detach().double().requires_grad_() for t in (x, w)]
    want = torch.autograd.grad(linear_cross_entropy_reference(*exact, labels, transposed=transposed), exact)
    for a, b in zip(got, want, strict=True):
        assert (a.double() - b).norm() < 0.02 * b.norm()


@pytest.mark.parametrize("backend", ["chunked", "reference"])
def test_ignored_rows_may_hold_nan(backend):
    """They reach neither the loss nor a gradient: 0 * NaN is NaN, so they are selected away."""
    x, w, labels, weights = inputs(ignored=3)
    poisoned = torch.where((labels == -100)[:, None], torch.nan, x.detach()).requires_grad_()
    heavy = torch.where(labels == -100, torch.nan, weights.detach())
    found = [
        torch.autograd.grad(linear_cross_entropy(x, w, labels, weights_T=weights, backend=backend), (x, w)),
        torch.autograd.grad(linear_cross_entropy(poisoned, w, labels, weights_T=heavy, backend=backend), (poisoned, w)),
    ]
    for clean, dirty in zip(*found, strict=True):
        torch.testing.assert_close(dirty, clean)
    with torch.no_grad():
        value = linear_cross_entropy(poisoned, w, labels, weights_T=heavy, backend=backend)
        torch.testing.assert_close(value, linear_cross_entropy(x, w, labels, weights_T=weights, backend=backend))
