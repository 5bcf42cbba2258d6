"""Attention with sinks, next to its definition, and next to the eager attention of transformers' gpt-oss.

T tokens, H query heads, G key/value heads, K head dim.
"""

import functools
import math
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from torch.autograd import gradcheck, gradgradcheck

from ftrain.kernels.attention import attention, attention_reference
from ftrain.kernels.documents import Documents
from tests.helpers import attention_cases
from tests.helpers.attention_cases import ANY_PACK, assert_close, gradients, segments_of

inputs = functools.partial(attention_cases.inputs, sinks=True)


@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_a_sink_is_one_more_key_whose_value_is_zero(backend):
    q, k, v, sinks = inputs(7)
    out = attention(q, k, v, sinks_H=sinks, backend=backend)
    for t in range(7):
        for h in range(4):
            scores = torch.cat([k[: t + 1, h // 2] @ q[t, h] / math.sqrt(4), sinks[h : h + 1]])
            values = torch.cat([v[: t + 1, h // 2], v.new_zeros(1, 4)])
            torch.testing.assert_close(out[t, h], scores.softmax(0) @ values)


@pytest.mark.parametrize("V", [4, 3])
@given(**ANY_PACK)
@settings(max_examples=25, deadline=None)
def test_any_pack_is_like_the_reference(V, lengths, heads, causal, window, seed):
    tensors = inputs(sum(lengths), H=heads[0], G=heads[1], V=V, seed=seed)
    rule = {"causal": causal, "window": window}
    wanted = gradients(attention_reference, tensors, segments_T=segments_of(lengths), **rule)
    for segments in (segments_of(lengths), Documents.of(segments_of(lengths))):
        assert_close(gradients(attention, tensors, segments_T=segments, **rule), wanted, 1e-11)


@pytest.mark.parametrize("window", [None, 150])
@pytest.mark.parametrize("causal", [True, False])
def test_documents_longer_than_a_block(causal, window):
    tensors, rule = inputs(640, H=2, G=1), {"segments_T": segments_of((300, 40, 300)), "causal": causal}
    wanted = gradients(attention_reference, tensors, window=window, **rule)
    assert_close(gradients(attention, tensors, window=window, **rule), wanted, 1e-9)


@pytest.mark.parametrize("causal", [True, False])
def test_a_query_that_sees_no_key_gives_zero(causal):
    """Document 1 has no keys: the sink alone is left there."""
    tensors = inputs(6, S=3)
    rule = {"segments_T": segments_of((2, 2, 2)), "kv_segments_S": torch.tensor([0, 0, 2]), "causal": causal}
    got, wanted = gradients(attention, tensors, **rule), gradients(attention_reference, tensors, **rule)
    assert not got[0][2:4].any()
    assert_close(got, wanted, 1e-12)


def test_a_very_low_sink_is_none_and_a_very_high_one_is_all():
    q, k, v, _ = inputs(5)
    low, high = torch.full((4,), -1e4, dtype=torch.float64), torch.full((4,), 1e4, dtype=torch.float64)
    torch.testing.assert_close(attention(q, k, v, sinks_H=low), attention(q, k, v))
    assert not attention(q, k, v, sinks_H=high).any()


@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_gradient_is_the_derivative(backend):
    q, k, v, sinks = inputs(5, H=2, G=1, K=2)
    segments = segments_of((2, 3))
    call = lambda q, k, v, s: attention(q, k, v, sinks_H=s, segments_T=segments, backend=backend)  # noqa: E731
    assert gradcheck(call, (q, k, v, sinks))


def test_the_reference_has_a_second_derivative():
    q, k, v, sinks = inputs(4, H=2, G=1, K=2)
    assert gradgradcheck(lambda q, k, v, s: attention_reference(q, k, v, sinks_H=s), (q, k, v, sinks))


@pytest.mark.parametrize("of", [0, 3])
def test_a_second_derivative_of_the_fast_path_is_an_error(of):
    q, k, v, sinks = inputs(4)
    first = torch.autograd.grad(attention(q, k, v, sinks_H=sinks).sum(), (q, k, v, sinks), create_graph=True)
    with pytest.raises(NotImplementedError, match="attention has no second derivative"):
        torch.autograd.grad((first[of] * first[of]).sum(), q)


def test_under_torch_func():
    q, k, v, sinks = (x.detach() for x in inputs(7))

    def loss(f):
        return lambda q, sinks: f(q, k, v, sinks_H=sinks, segments_T=segments_of((3, 4))).square().sum()

    got, wanted = (torch.func.grad(loss(f), (0, 1))(q, sinks) for f in (attention, attention_reference))
    torch.testing.assert_close(got, wanted)
    got, wanted = (
        torch.func.jvp(loss(f), (q, sinks), (q.cos(), sinks.cos())) for f in (attention, attention_reference)
    )
    torch.testing.assert_close(got, wanted)


@pytest.mark.parametrize("sinks_dtype", [torch.bfloat16, torch.float32])
def test_half_precision_is_close(sinks_dtype):
    half = inputs(340, K=16, dtype=torch.bfloat16)
    half[3] = half[3].detach().to(sinks_dtype).requires_grad_()
    exact = [x.detach().double().requires_grad_() for x in half]
    rule = {"segments_T": segments_of((40, 300))}
    got, wanted = gradients(attention, half, **rule), gradients(attention_reference, exact, **rule)
    assert [x.dtype for x in got] == [torch.bfloat16] * 4 + [sinks_dtype]
    for a, b in zip(got, wanted, strict=True):
        assert (a.double() - b).norm() < 0.02 * b.norm()


@pytest.mark.parametrize("window", [None, 5])
def test_equals_gpt_oss(window):
    pytest.importorskip("transformers")
    from transformers.models.gpt_oss.modeling_gpt_oss import eager_attention_forward

    tensors = inputs(12, H=4, G=2, K=8)

    def theirs(q, k, v, *, sinks_H):
        behind = torch.arange(12)[:, None] - torch.arange(12)
        hidden = (behind < 0) | (behind >= (window or 12))
        mask = torch.zeros(12, 12, dtype=q.dtype).masked_fill(hidden, torch.finfo(q.dtype).min)
        module = SimpleNamespace(sinks=sinks_H, num_key_value_groups=2, training=False)
        folded = (x.transpose(0, 1)[None] for x in (q, k, v))
        return eager_attention_forward(module, *folded, mask, 8**-0.5)[0][0]

    assert_close(gradients(attention, tensors, window=window), gradients(theirs, tensors), 1e-12)


@pytest.mark.parametrize(
    "sinks", [torch.zeros(3), torch.zeros(4, 1), torch.zeros(4, dtype=torch.int64), torch.zeros(4, device="meta")]
)
def test_sinks_that_do_not_fit_are_named(sinks):
    q, k, v, _ = inputs(5)
    with pytest.raises(ValueError, match=r"attention: sinks_H must be floating \[4\] on cpu, one score"):
        attention(q, k, v, sinks_H=sinks)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("window", [None, 50])
def test_cuda_is_like_the_reference(dtype, window):
    lengths = (40, 300, 1, 171)
    half = [x.detach().cuda().requires_grad_() for x in inputs(sum(lengths), H=8, G=2, K=64, dtype=dtype)]
    exact = [x.detach().double().requires_grad_() for x in half]
    rule = {"segments_T": segments_of(lengths).cuda(), "window": window}
    results = []
    for f, (q, k, v, sinks) in ((attention, half), (attention_reference, exact)):
        out = f(q, k, v, sinks_H=sinks, **rule)
        results.append((out, *torch.autograd.grad(out.sin().sum(), (q, k, v, sinks))))
    for a, b in zip(*results, strict=True):
        assert (a.double() - b).norm() < 0.02 * b.norm()
