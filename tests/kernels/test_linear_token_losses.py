"""T tokens, D model, V vocabulary."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.autograd import gradcheck

import ftrain
from ftrain.kernels.linear_cross_entropy import linear_cross_entropy
from ftrain.kernels.linear_token_losses import linear_token_losses, linear_token_losses_reference


def inputs(T=7, D=4, V=9, *, ignored=2, transposed=False, dtype=torch.float64, seed=0):
    random = torch.Generator().manual_seed(seed)
    x = torch.randn(T, D, generator=random, dtype=torch.float64).to(dtype)
    w = torch.randn(*((V, D) if transposed else (D, V)), generator=random, dtype=torch.float64).to(dtype)
    labels = torch.randint(0, V, (T,), generator=random)
    labels[torch.randperm(T, generator=random)[:ignored]] = -100
    return x.requires_grad_(), w.requires_grad_(), labels


@given(
    T=st.integers(0, 12),
    V=st.integers(1, 8),
    ignored=st.integers(0, 12),
    chunk=st.none() | st.integers(1, 14),
    softcap=st.none() | st.floats(0.5, 5),
    transposed=st.booleans(),
    seed=st.integers(0, 99),
)
@settings(max_examples=60, deadline=None)
def test_is_its_definition_and_adds_up_to_the_sum(T, V, ignored, chunk, softcap, transposed, seed):
    x, w, labels = inputs(T, 3, V, ignored=ignored, transposed=transposed, seed=seed)
    options = {"softcap": softcap, "transposed": transposed}
    found_T = linear_token_losses(x, w, labels, chunk_tokens=chunk, backend="chunked", **options)
    torch.testing.assert_close(found_T, linear_token_losses_reference(x, w, labels, **options))
    torch.testing.assert_close(found_T.sum(), linear_cross_entropy(x, w, labels, **options))


@pytest.mark.parametrize("softcap", [None, 1.5])
@pytest.mark.parametrize("transposed", [False, True])
def test_gradient_is_the_derivative(transposed, softcap):
    x, w, labels = inputs(T=4, D=3, V=5, transposed=transposed, ignored=1)

    def squares(x, w):
        losses_T = linear_token_losses(
            x, w, labels, softcap=softcap, transposed=transposed, chunk_tokens=3, backend="chunked"
        )
        return losses_T.square()

    assert gradcheck(squares, (x, w))


@pytest.mark.parametrize("frozen", ["x", "w"])
def test_what_is_frozen_has_no_gradient(frozen):
    x, w, labels = inputs()
    x, w = (x.detach(), w) if frozen == "x" else (x, w.detach())
    linear_token_losses(x, w, labels).square().sum().backward()
    assert (x.grad is None) == (frozen == "x")
    assert (w.grad is None) == (frozen == "w")


def test_a_jitted_loss_that_is_no_sum_over_tokens_has_the_same_gradient():
    x, w, labels = inputs()

    def loss(w, x):
        return linear_token_losses(x, w, labels).square().sum()

    value, grad = ftrain.jit(lambda w, x: ftrain.value_and_grad(loss)(w, x))(w.detach(), x.detach())
    expected = torch.autograd.grad(linear_token_losses_reference(x, w, labels).square().sum(), w)[0]
    torch.testing.assert_close(grad, expected)
    torch.testing.assert_close(value, linear_token_losses_reference(x, w, labels).square().sum())


def test_a_label_out_of_range_is_named():
    x, w, labels = inputs()
    with pytest.raises(ValueError, match="label 9 at token 0"):
        linear_token_losses(x, w, labels.masked_fill(torch.arange(7) == 0, 9))
