"""T tokens, H query heads, G key/value heads, K head dim."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.autograd import gradcheck, gradgradcheck
from torch.fx.experimental.proxy_tensor import make_fx

from ftrain.kernels.attention import attention, attention_reference
from ftrain.kernels.documents import Documents, aligned_documents
from ftrain.kernels.primitive import bind
from tests.helpers.attention_cases import ANY_PACK, gradients, inputs, segments_of

DOCUMENTS = [(4,), (2, 2), (1, 3, 1), (2, 1, 1, 2)]


def one_by_one(q_THK, k_TGK, v_TGV, lengths, causal, window):
    """Attention written as loops over documents, heads and queries, from the sentence that defines it."""
    T, H, K = q_THK.shape
    R = H // k_TGK.shape[1]
    out = torch.zeros(T, H, v_TGV.shape[2], dtype=q_THK.dtype)
    start = 0
    for length in lengths:
        for h in range(H):
            for i in range(length):
                seen = [j for j in range(length) if (j <= i or not causal) and (window is None or abs(i - j) < window)]
                at = [start + j for j in seen]
                p = torch.softmax(k_TGK[at, h // R] @ q_THK[start + i, h] / math.sqrt(K), 0)
                out[start + i, h] = p @ v_TGV[at, h // R]
        start += length
    return out


def assert_like_reference(tensors, tolerance=1e-11, **options):
    expected = gradients(attention_reference, tensors, **options)
    for f, given_ in ((attention, options), (attention, told(options)), (attention_reference, told(options))):
        for name, got, want in zip(("out", "dq", "dk", "dv"), gradients(f, tensors, **given_), expected, strict=True):
            message = lambda m, name=name: f"{name}: {m}"  # noqa: E731
            torch.testing.assert_close(got, want, atol=tolerance, rtol=tolerance, msg=message)


def told(options):
    """The same documents by offsets, where they can be."""
    segments, kv_segments = options.get("segments_T"), options.get("kv_segments_S")
    if kv_segments is None:
        return {**options, "segments_T": Documents.of(segments)}
    try:
        documents = aligned_documents(segments, kv_segments)
    except ValueError:  # in two orders
        return options
    return {**options, "segments_T": documents[0], "kv_segments_S": documents[1]}


@pytest.mark.parametrize("window", [None, 1, 3])
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("lengths", DOCUMENTS)
@pytest.mark.parametrize("f", [attention, attention_reference])
def test_is_what_it_says(f, lengths, causal, window):
    q, k, v = inputs(sum(lengths), grad=False)
    got = f(q, k, v, segments_T=segments_of(lengths), causal=causal, window=window)
    torch.testing.assert_close(got, one_by_one(q, k, v, lengths, causal, window))


@pytest.mark.parametrize("heads", [(2, 2), (2, 1)])
@pytest.mark.parametrize(("causal", "window"), [(True, None), (False, None), (True, 2), (False, 2)])
@pytest.mark.parametrize("lengths", DOCUMENTS)
def test_gradient_is_the_derivative(lengths, causal, window, heads):
    q, k, v = inputs(sum(lengths), H=heads[0], G=heads[1], K=2)
    options = {"segments_T": segments_of(lengths), "causal": causal, "window": window}
    assert gradcheck(lambda *x: attention(*x, **options, backend="cpu"), (q, k, v))


@pytest.mark.parametrize("V", [4, 3])
@given(**ANY_PACK)
@settings(max_examples=25, deadline=None)
def test_any_pack_is_like_the_reference(V, lengths, heads, causal, window, seed):
    tensors = inputs(sum(lengths), H=heads[0], G=heads[1], V=V, seed=seed)
    assert_like_reference(tensors, segments_T=segments_of(lengths), causal=causal, window=window)


@pytest.mark.parametrize("window", [None, 20, 150, 400])
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("lengths", [(300,), (300, 40, 300), (700, 1)])
def test_documents_longer_than_a_block(lengths, causal, window):
    tensors = inputs(sum(lengths), H=2, G=1)
    assert_like_reference(tensors, 1e-9, segments_T=segments_of(lengths), causal=causal, window=window)


@given(
    documents=st.lists(st.tuples(st.integers(1, 9), st.integers(0, 9)), min_size=1, max_size=5),
    causal=st.booleans(),
    window=st.none() | st.integers(1, 9),
    order=st.randoms(use_true_random=False),
)
@settings(max_examples=30, deadline=None)
def test_keys_of_another_pack_by_id(documents, causal, window, order):
    ids = list(range(len(documents)))
    kv_ids = order.sample(ids, len(ids))
    kv_segments = torch.tensor([n for n in kv_ids for _ in range(documents[n][1])] or [99])
    tensors = inputs(sum(L for L, _ in documents), S=len(kv_segments))
    segments = segments_of([L for L, _ in documents])
    assert_like_reference(tensors, segments_T=segments, kv_segments_S=kv_segments, causal=causal, window=window)


def test_decoding_one_token_at_a_time_is_the_causal_pack():
    q, k, v = inputs(9, grad=False)
    whole = attention(q, k, v, window=4)
    for t in range(9):
        one, cached = torch.zeros(1, dtype=torch.int64), torch.zeros(t + 1, dtype=torch.int64)
        step = attention(q[t : t + 1], k[: t + 1], v[: t + 1], segments_T=one, kv_segments_S=cached, window=4)
        torch.testing.assert_close(step[0], whole[t])


@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_packed_is_each_document_alone(backend):
    lengths = (5, 1, 130, 5)
    q, k, v = inputs(sum(lengths), dtype=torch.float32, grad=False)
    packed = attention(q, k, v, segments_T=segments_of(lengths), backend=backend)
    alone = [attention(*x) for x in zip(q.split(lengths), k.split(lengths), v.split(lengths), strict=True)]
    torch.testing.assert_close(packed, torch.cat(alone), atol=1e-5, rtol=1e-5)


def test_an_id_that_comes_again_is_another_document():
    q, k, v = inputs(6, grad=False)
    again, fresh = torch.tensor([0, 0, 1, 1, 0, 0]), torch.tensor([0, 0, 1, 1, 2, 2])
    for backend in ("cpu", "reference"):
        a, b = (attention(q, k, v, segments_T=s, causal=False, backend=backend) for s in (again, fresh))
        assert torch.equal(a, b)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_close(dtype):
    lengths = (40, 300, 40)
    half = inputs(sum(lengths), K=16, dtype=dtype)
    exact = [x.detach().to(torch.float64).requires_grad_() for x in half]
    segments = segments_of(lengths)
    got, want = (
        gradients(attention, half, segments_T=segments),
        gradients(attention_reference, exact, segments_T=segments),
    )
    for a, b in zip(got, want, strict=True):
        assert a.dtype == dtype
        assert (a.double() - b).norm() < 0.02 * b.norm()


def test_strided_inputs_and_expanded_gradients():
    qkv = torch.randn(8, 3, 2, 4, dtype=torch.float64, requires_grad=True)
    segments = segments_of((4, 4))

    def total(f):
        q, k, v = (qkv.transpose(-1, -2).contiguous().transpose(-1, -2)[:, i] for i in range(3))
        return torch.autograd.grad(f(q, k, v, segments_T=segments).sum(), qkv)[0]

    torch.testing.assert_close(total(attention), total(attention_reference))


def test_scale():
    q, k, v = inputs(5, grad=False)
    torch.testing.assert_close(
        attention(q, k, v, scale=0.3), attention(q * 0.3 * 2, k, v)
    )  # K = 4: 1 / sqrt(K) = 1 / 2


def test_no_tokens():
    tensors = inputs(0)
    out = attention(*tensors, segments_T=torch.zeros(0, dtype=torch.int64))
    assert out.shape == (0, 4, 4)
    assert [g.shape for g in torch.autograd.grad(out.sum(), tensors)] == [x.shape for x in tensors]


def test_inside_torch_func():
    tensors = tuple(x.detach() for x in inputs(7))
    segments = segments_of((3, 4))

    def loss(f):
        return lambda *x: f(*x, segments_T=segments).square().sum()

    everything = (0, 1, 2)
    want = torch.func.grad(loss(attention_reference), everything)(*tensors)
    value, pull_back = torch.func.vjp(loss(attention), *tensors)
    for got in (torch.func.grad(loss(attention), everything)(*tensors), pull_back(torch.ones_like(value))):
        torch.testing.assert_close(got, want)


@pytest.mark.parametrize(
    "transformed",
    [
        lambda f, x: torch.func.hessian(f)(x),
        lambda f, x: torch.func.vmap(f)(torch.stack([x, 2 * x])),
        lambda f, x: torch.func.vmap(torch.func.grad(f))(torch.stack([x, 2 * x])),
        lambda f, x: torch.func.jvp(f, (x,), (x.cos(),)),
    ],
    ids=["hessian", "vmap", "gradients per sample", "jvp"],
)
def test_composes_with_transforms(transformed):
    q, k, v = inputs(5, H=2, G=1, grad=False)

    def loss(f):
        return lambda q: f(q, k, v, segments_T=segments_of((2, 3))).square().sum()

    torch.testing.assert_close(transformed(loss(attention), q), transformed(loss(attention_reference), q))


def test_the_reference_has_a_second_derivative():
    q, k, v = inputs(4, H=2, G=1, K=2)
    assert gradgradcheck(lambda *x: attention_reference(*x, segments_T=segments_of((1, 3))), (q, k, v))


def test_a_second_derivative_of_the_fast_path_is_an_error():
    q, k, v = inputs(4)
    (dq,) = torch.autograd.grad(attention(q, k, v).sum(), q, create_graph=True)
    with pytest.raises(NotImplementedError, match="attention has no second derivative"):
        torch.autograd.grad((dq * q).sum(), q)


def test_one_node_forward_and_one_backward_in_a_trace():
    q, k, v = (x.detach() for x in inputs(8, dtype=torch.bfloat16))

    def step(q, k, v, segments):
        return torch.func.grad(lambda *x: attention(*x, segments_T=segments, window=3).float().sum(), (0, 1, 2))(
            q, k, v
        )

    segments = segments_of((3, 5))
    graph = make_fx(step, tracing_mode="fake")(q, k, v, segments)
    names = [str(n.target) for n in graph.graph.nodes if "ftrain" in str(n.target)]
    assert names == ["ftrain.attention_forward.default", "ftrain.attention_backward.default"]
    for got, want in zip(graph(q, k, v, segments), step(q, k, v, segments), strict=True):
        assert torch.equal(got, want)


@pytest.mark.parametrize("V", [4, 6])
@pytest.mark.parametrize("lengths", [(8,), (4, 4), (3, 5)])
def test_shape_rules_are_right(lengths, V):
    q, k, v = inputs(8, V=V, grad=False)
    arguments = (q, k, v, segments_of(lengths), None, True, None, 0.5, None, None)
    forward, backward = torch.ops.ftrain.attention_forward.default, torch.ops.ftrain.attention_backward.default
    out, lse = forward(*arguments)
    torch.library.opcheck(forward, arguments, test_utils=("test_schema", "test_faketensor"))
    torch.library.opcheck(
        backward, (torch.ones_like(out), q, k, v, out, lse, *arguments[3:]), test_utils="test_faketensor"
    )


def test_time_and_memory_have_no_dense_mask(measure_memory):
    T = 2048
    tensors = inputs(T, H=1, G=1, K=8, dtype=torch.float32, grad=False)
    segments = segments_of([128] * 15 + [64, 64])
    measured = measure_memory(lambda: attention(*tensors, segments_T=segments))
    assert measured.largest < T * T // 8, "smaller than even a mask of one bit per pair"


def test_a_window_over_a_long_document_has_no_dense_mask(measure_memory):
    T = 4096
    tensors = inputs(T, H=1, G=1, K=8, dtype=torch.float32, grad=False)
    assert measure_memory(lambda: attention(*tensors, window=64)).largest < T * T // 8


def test_can_be_rebound():
    q, k, v = inputs(3)
    with bind({"attention": lambda q, k, v, **options: (q, options)}):
        out, options = attention(q, k, v, causal=False)
    assert out is q
    assert options == {"causal": False}


ONE = Documents.of(torch.zeros(4, dtype=torch.int64))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"q_THK": torch.zeros(4, 8)}, "wants q"),
        ({"k_SGK": torch.zeros(4, 2, 3)}, "share the head dim"),
        ({"v_SGV": torch.zeros(4, 1, 4)}, "share the head dim"),
        ({"q_THK": torch.zeros(4, 3, 4)}, "multiple of key/value heads"),
        ({"q_THK": torch.zeros(4, 4, 4, dtype=torch.bfloat16)}, "one floating dtype; got q torch.bfloat16"),
        ({"q_THK": torch.zeros(5, 4, 4)}, "need kv_segments_S"),
        ({"kv_segments_S": torch.zeros(4, dtype=torch.int64)}, "kv_segments_S needs segments_T"),
        ({"segments_T": torch.zeros(5, dtype=torch.int64)}, r"segments_T must be int64 \[4\], not torch.int64 \[5\]"),
        ({"segments_T": torch.zeros(4, dtype=torch.int32)}, "segments_T must be int64"),
        ({"window": 0}, "window=0 must be at least 1"),
        ({"segments_T": Documents.of(torch.zeros(5, dtype=torch.int64))}, "offsets end at 5, the pack has 4 tokens"),
        ({"segments_T": ONE, "kv_segments_S": ONE.ids_T}, "must both be ids or both be Documents"),
        ({"segments_T": ONE, "kv_segments_S": Documents.of(ONE.ids_T, max_documents=2)}, "8 places .* and 2 for"),
        ({"backend": "flash"}, "'flash' does not run on cpu"),
        ({"backend": "triton"}, "backend='triton' is not one of"),
    ],
)
def test_what_does_not_fit_is_named(change, message):
    arguments = {"q_THK": torch.zeros(4, 4, 4), "k_SGK": torch.zeros(4, 2, 4), "v_SGV": torch.zeros(4, 2, 4)} | change
    tensors = [arguments.pop(name) for name in ("q_THK", "k_SGK", "v_SGV")]
    with pytest.raises(ValueError, match=message):
        attention(*tensors, **arguments)


def on_cuda(documents):
    return Documents(documents.ids_T.cuda(), documents.offsets_N.cuda(), documents.longest)


@pytest.mark.gpu
@pytest.mark.parametrize("told_", [False, True])
@pytest.mark.parametrize(("causal", "window"), [(True, None), (False, None), (True, 50), (False, 50)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_cuda_is_like_the_reference(dtype, causal, window, told_):
    lengths = (40, 300, 1, 171)
    half = [x.detach().cuda().requires_grad_() for x in inputs(sum(lengths), H=8, G=2, K=64, dtype=dtype)]
    exact = [x.detach().double().requires_grad_() for x in half]
    ids = segments_of(lengths).cuda()
    rule = {"causal": causal, "window": window}
    got = gradients_cuda(attention, half, segments_T=on_cuda(Documents.of(ids.cpu())) if told_ else ids, **rule)
    for a, b in zip(got, gradients_cuda(attention_reference, exact, segments_T=ids, **rule), strict=True):
        assert (a.double() - b).norm() < 0.02 * b.norm()


@pytest.mark.gpu
@pytest.mark.parametrize("told_", [False, True])
@pytest.mark.parametrize(("causal", "window"), [(True, None), (False, None), (True, 50)])
def test_cuda_reads_the_keys_of_another_pack(causal, window, told_):
    ids, kv_ids = segments_of((40, 300, 1, 171)), torch.tensor([0] * 30 + [1] * 200 + [3] * 171)
    half = [
        x.detach().cuda().requires_grad_() for x in inputs(512, S=len(kv_ids), H=8, G=2, K=64, dtype=torch.bfloat16)
    ]
    exact = [x.detach().double().requires_grad_() for x in half]
    by_id = {"segments_T": ids.cuda(), "kv_segments_S": kv_ids.cuda()}
    documents = [on_cuda(d) for d in aligned_documents(ids, kv_ids)]
    by_number = {"segments_T": documents[0], "kv_segments_S": documents[1]}
    rule = {"causal": causal, "window": window}
    got = gradients_cuda(attention, half, **(by_number if told_ else by_id), **rule)
    for a, b in zip(got, gradients_cuda(attention_reference, exact, **by_id, **rule), strict=True):
        assert (a.double() - b).norm() < 0.02 * b.norm()


def gradients_cuda(f, tensors, **options):
    out = f(*tensors, **options)
    seed = torch.linspace(-1, 1, out.numel(), device="cuda").view_as(out).to(out.dtype)
    return out, *torch.autograd.grad(out, tensors, seed)


@pytest.mark.gpu
def test_cuda_does_not_wait_for_documents_that_are_told():
    q, k, v = (x.detach().cuda().requires_grad_() for x in inputs(512, H=8, G=2, K=64, dtype=torch.bfloat16))
    documents = on_cuda(Documents.of(segments_of((200, 312))))
    attention(q, k, v, segments_T=documents).sum().backward()
    torch.cuda.set_sync_debug_mode("error")
    try:
        attention(q, k, v, segments_T=documents).sum().backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")
