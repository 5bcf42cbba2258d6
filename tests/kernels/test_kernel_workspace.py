"""The declared workspace of an op is what the allocator sees; the declared flops are those of its matmuls."""

from functools import partial

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

import ftrain.kernels.attention  # noqa: F401  (defines the ops)
from ftrain.kernels.workspace import FLOPS, WORKSPACE


def attention_arguments(
    lengths, *, H=4, G=2, K=32, V=None, dtype=torch.float32, causal=True, window=None, softcap=None
):
    T = sum(lengths)
    segments = torch.arange(len(lengths)).repeat_interleave(torch.tensor(lengths)) if len(lengths) > 1 else None
    q, k, v = torch.randn(T, H, K), torch.randn(T, G, K), torch.randn(T, G, V or K)
    return (*(x.to(dtype) for x in (q, k, v)), segments, None, causal, window, K**-0.5, None, None, softcap)


def with_backward(arguments):
    out, lse = torch.ops.ftrain.attention_forward.default(*arguments)
    return (torch.randn_like(out), *arguments[:3], out, lse, *arguments[3:])


ONE_DOCUMENT = {
    "long": attention_arguments([1500]),
    "short": attention_arguments([90]),
    "float64": attention_arguments([300], dtype=torch.float64),
    "bfloat16": attention_arguments([700], dtype=torch.bfloat16),
    "window": attention_arguments([1500], window=64),
    "window, both sides": attention_arguments([1500], window=64, causal=False),
    "wide window": attention_arguments([1500], window=200),
    "narrow values": attention_arguments([400], V=16),
    "narrow values, long": attention_arguments([1100], V=16),
    "capped": attention_arguments([1500], softcap=30.0),
    "capped, both sides": attention_arguments([1500], softcap=30.0, causal=False),
    "capped, one key head": attention_arguments([300], H=8, G=1, K=16, softcap=30.0),
    "capped, bfloat16": attention_arguments([700], softcap=30.0, dtype=torch.bfloat16),
    "capped, window": attention_arguments([1500], softcap=30.0, window=64),
    "capped, wide window": attention_arguments([1500], softcap=30.0, window=400, causal=False),
}


@pytest.mark.parametrize("case", ONE_DOCUMENT)
def test_attention_of_one_document_needs_what_it_declares(case, measure_memory):
    arguments = ONE_DOCUMENT[case]
    for name, given in (("attention_forward", arguments), ("attention_backward", with_backward(arguments))):
        measured = measure_memory(partial(getattr(torch.ops.ftrain, name).default, *given)).workspace
        assert WORKSPACE[f"ftrain::{name}"](*given) == pytest.approx(measured, rel=0.07)


@pytest.mark.parametrize("lengths", [[512] * 3, [512, 100, 512], [1000, 300], [30] * 40, [700, 20, 20, 20]])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("softcap", [None, 30.0])
def test_attention_of_a_pack_needs_at_most_what_it_declares(lengths, dtype, softcap, measure_memory):
    arguments = attention_arguments(lengths, dtype=dtype, softcap=softcap)
    for name, given in (("attention_forward", arguments), ("attention_backward", with_backward(arguments))):
        measured = measure_memory(partial(getattr(torch.ops.ftrain, name).default, *given)).workspace
        assert measured <= 1.01 * WORKSPACE[f"ftrain::{name}"](*given)


@pytest.mark.parametrize("softcap", [None, 30.0])
@pytest.mark.parametrize("ignored", [False, True])
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_cross_entropy_needs_what_it_declares(dtype, transposed, ignored, softcap, measure_memory):
    T, D, V = 300, 64, 3000
    x, w = torch.randn(T, D, dtype=dtype), torch.randn(*((V, D) if transposed else (D, V)), dtype=dtype)
    labels = torch.randint(0, V, (T,))
    labels[::3] = -100 if ignored else 0
    arguments = (x, w, labels, None, -100, softcap, transposed, 100)
    cases = [("loss", ())] + [("grads", need) for need in ((True, True), (False, True), (True, False))]
    for name, need in cases:
        op = getattr(torch.ops.ftrain, f"linear_cross_entropy_{name}").default
        declared = WORKSPACE[f"ftrain::linear_cross_entropy_{name}"](*arguments, *need)
        assert declared == pytest.approx(measure_memory(partial(op, *arguments, *need)).workspace, rel=0.1)


@pytest.mark.parametrize("name", ["attention_forward", "attention_backward"])
def test_rules_take_fake_tensors(name):
    arguments = ONE_DOCUMENT["long"] if name == "attention_forward" else with_backward(ONE_DOCUMENT["long"])
    mode = FakeTensorMode()
    fake = [mode.from_tensor(a) if isinstance(a, torch.Tensor) else a for a in arguments]
    for rules in (WORKSPACE, FLOPS):
        assert rules[f"ftrain::{name}"](*fake) == rules[f"ftrain::{name}"](*arguments)


def test_flops_are_those_of_the_matmuls():
    T, H, K = 100, 4, 32
    dense, causal, window = (
        FLOPS["ftrain::attention_forward"](*attention_arguments([T], causal=c, window=w))
        for c, w in ((False, None), (True, None), (True, 10))
    )
    assert (dense, causal, window) == (4 * T * T * H * K, 2 * T * T * H * K, 4 * T * 10 * H * K)
    for softcap in (None, 30.0):
        whole = with_backward(attention_arguments([T], causal=False, softcap=softcap))
        assert FLOPS["ftrain::attention_backward"](*whole) == 2.5 * dense
    x, w = torch.zeros(10, 8), torch.zeros(8, 20)
    rest = (torch.zeros(10, dtype=torch.int64), None, -100, None, False, 5)
    assert FLOPS["ftrain::linear_cross_entropy_loss"](x, w, *rest) == 2 * 10 * 8 * 20
    assert FLOPS["ftrain::linear_cross_entropy_grads"](x, w, *rest, False, True) == 2 * 2 * 10 * 8 * 20
