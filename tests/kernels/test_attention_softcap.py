"""Attention with capped scores, next to its definition, and next to the eager attention of transformers' Gemma 2.

T tokens, H query heads, G key/value heads, K head dim.
"""

import math
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.autograd import gradcheck, gradgradcheck

from ftrain.kernels.attention import attention, attention_reference
from ftrain.kernels.attention_cpu import Rule, blocks
from ftrain.kernels.documents import Documents
from tests.helpers.attention_cases import ANY_PACK, assert_close, gradients, inputs, segments_of

CAP = 0.7


@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_is_what_it_says(backend):
    q, k, v = inputs(7)
    out = attention(q, k, v, softcap=CAP, backend=backend)
    for t in range(7):
        for h in range(4):
            scores = k[: t + 1, h // 2] @ q[t, h] / math.sqrt(4)
            torch.testing.assert_close(out[t, h], (CAP * torch.tanh(scores / CAP)).softmax(0) @ v[: t + 1, h // 2])


@pytest.mark.parametrize("V", [4, 3])
@given(cap=st.floats(0.1, 50), **ANY_PACK)
@settings(max_examples=25, deadline=None)
def test_any_pack_is_like_the_reference(V, lengths, heads, causal, window, cap, seed):
    tensors = inputs(sum(lengths), H=heads[0], G=heads[1], V=V, seed=seed)
    rule = {"causal": causal, "window": window, "softcap": cap}
    wanted = gradients(attention_reference, tensors, segments_T=segments_of(lengths), **rule)
    for segments in (segments_of(lengths), Documents.of(segments_of(lengths))):
        assert_close(gradients(attention, tensors, segments_T=segments, **rule), wanted, 1e-11)


@pytest.mark.parametrize("window", [None, 20, 150, 400])
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("lengths", [(300,), (300, 40, 300), (700, 1)])
def test_documents_longer_than_a_block(lengths, causal, window):
    tensors = inputs(sum(lengths), H=2, G=1)
    rule = {"segments_T": segments_of(lengths), "causal": causal, "window": window, "softcap": CAP}
    assert_close(gradients(attention, tensors, **rule), gradients(attention_reference, tensors, **rule), 1e-9)


@pytest.mark.parametrize("causal", [True, False])
def test_keys_of_another_pack(causal):
    """Document 1 has no keys."""
    tensors, rule = inputs(6, S=3), {"kv_segments_S": torch.tensor([0, 0, 2]), "causal": causal, "softcap": CAP}
    rule["segments_T"] = segments_of((2, 2, 2))
    assert_close(gradients(attention, tensors, **rule), gradients(attention_reference, tensors, **rule), 1e-12)


def test_a_cap_far_above_the_scores_is_none():
    tensors = inputs(9)
    assert_close(gradients(attention, tensors, softcap=1e9), gradients(attention, tensors), 1e-11)


@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_gradient_is_the_derivative(backend):
    segments = segments_of((2, 3))
    call = lambda q, k, v: attention(q, k, v, segments_T=segments, softcap=CAP, backend=backend)  # noqa: E731
    assert gradcheck(call, inputs(5, H=2, G=1, K=2))


def test_the_reference_has_a_second_derivative():
    assert gradgradcheck(lambda *x: attention_reference(*x, softcap=CAP), inputs(4, H=2, G=1, K=2))


def test_half_precision_is_close():
    half = inputs(380, K=16, dtype=torch.bfloat16)
    exact = [x.detach().double().requires_grad_() for x in half]
    rule = {"segments_T": segments_of((40, 300, 40)), "softcap": CAP}
    for a, b in zip(gradients(attention, half, **rule), gradients(attention_reference, exact, **rule), strict=True):
        assert a.dtype == torch.bfloat16
        assert (a.double() - b).norm() < 0.02 * b.norm()


@pytest.mark.parametrize("window", [None, 64])
def test_there_is_no_dense_square_of_scores(window, measure_memory):
    T = 2048
    tensors = [x.detach() for x in inputs(T, H=1, G=1, K=8, dtype=torch.float32)]
    measured = measure_memory(lambda: attention(*tensors, softcap=CAP, window=window))
    assert measured.largest <= 4 * T * 128


@given(
    L=st.integers(1, 700), M=st.integers(1, 700), causal=st.booleans(), window=st.none() | st.integers(1, 900),
    fused=st.booleans(),
)  # fmt: skip
@settings(max_examples=100, deadline=None)
def test_blocks_cover_each_visible_pair_once(L, M, causal, window, fused):
    rule = Rule(causal, window, 1.0).trimmed(L, M)
    covered = torch.zeros(L, M, dtype=torch.int64)
    for block in blocks(L, M, rule, fused=fused):
        assert fused or block.L <= 128
        covered[block.i : block.i + block.L, block.j : block.j + block.M] += 1
    ahead = torch.arange(M) - (torch.arange(L)[:, None] + M - L)
    seen = torch.ones(L, M, dtype=torch.bool) if not causal else ahead <= 0
    if window is not None:
        seen &= ahead.abs() < window
    assert covered.max() <= 1
    assert covered[seen].all()


@pytest.mark.parametrize("window", [None, 5])
def test_equals_gemma_2(window):
    pytest.importorskip("transformers")
    from transformers.models.gemma2.modeling_gemma2 import eager_attention_forward

    tensors = inputs(12, H=4, G=2, K=8, dtype=torch.float32)

    def theirs(q, k, v):
        behind = torch.arange(12)[:, None] - torch.arange(12)
        hidden = (behind < 0) | (behind >= (window or 12))
        mask = torch.zeros(12, 12, dtype=q.dtype).masked_fill(hidden, torch.finfo(q.dtype).min)
        module = SimpleNamespace(num_key_value_groups=2, training=False)
        folded = (x.transpose(0, 1)[None] for x in (q, k, v))
        return eager_attention_forward(module, *folded, mask, scaling=0.3, softcap=CAP)[0][0]

    ours = gradients(attention, tensors, window=window, softcap=CAP, scale=0.3)
    assert_close(ours, gradients(theirs, tensors), 2e-6)


@pytest.mark.parametrize("softcap", [0.0, -30.0, math.inf, math.nan])
def test_a_cap_that_does_not_fit_is_named(softcap):
    with pytest.raises(ValueError, match=f"attention: softcap={softcap} must be positive and finite"):
        attention(*inputs(5), softcap=softcap)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("window", [None, 50])
def test_cuda_is_like_the_reference(dtype, window):
    lengths = (40, 300, 1, 171)
    half = [x.detach().cuda().requires_grad_() for x in inputs(sum(lengths), H=8, G=2, K=64, dtype=dtype)]
    exact = [x.detach().double().requires_grad_() for x in half]
    rule = {"segments_T": segments_of(lengths).cuda(), "window": window, "softcap": CAP}
    results = []
    for f, tensors in ((attention, half), (attention_reference, exact)):
        out = f(*tensors, **rule)
        results.append((out, *torch.autograd.grad(out.sin().sum(), tensors)))
    for a, b in zip(*results, strict=True):
        assert (a.double() - b).norm() < 0.02 * b.norm()
