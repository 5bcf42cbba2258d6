"""The sorted experts against a loop over tokens, for any routing."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ftrain.kernels.experts import experts_swiglu
from ftrain.kernels.grouped_mm import FLOPS, grouped_mm
from ftrain.kernels.moe import combine, moe_dispatch


def token_by_token(x, expert, weights, w_gate, w_up, w_down):
    rows = []
    for t in range(len(x)):
        row = torch.zeros(x.shape[1], dtype=x.dtype)
        for k in range(expert.shape[1]):
            e = expert[t, k]
            hidden = torch.nn.functional.silu(x[t] @ w_gate[e]) * (x[t] @ w_up[e])
            row = row + weights[t, k] * (hidden @ w_down[e])
        rows.append(row)
    return torch.stack(rows) if rows else x


def layer(tokens, choices, experts, *, dtype=torch.float64, D=3, F=5):
    generator = torch.Generator().manual_seed(tokens + 10 * choices + 100 * experts)
    shapes = [(tokens, D), (tokens, choices), (experts, D, F), (experts, D, F), (experts, F, D)]
    return [torch.randn(s, generator=generator, dtype=dtype) for s in shapes]


@st.composite
def routings(draw):
    tokens, experts = draw(st.integers(0, 12)), draw(st.integers(1, 6))
    choices = draw(st.integers(1, experts))
    used = draw(st.lists(st.integers(0, experts - 1), min_size=1, max_size=experts))  # the others stay empty
    slots = draw(st.lists(st.sampled_from(used), min_size=tokens * choices, max_size=tokens * choices))
    return torch.tensor(slots, dtype=torch.int64).view(tokens, choices), experts


@settings(deadline=None, max_examples=60)
@given(routings())
def test_any_routing_is_a_loop_over_tokens(routing):
    expert, experts = routing
    tensors = [t.requires_grad_() for t in layer(*expert.shape, experts)]
    x, weights, *w = tensors
    found, expected = experts_swiglu(x, expert, weights, *w), token_by_token(x, expert, weights, *w)
    torch.testing.assert_close(found, expected)
    if len(x):
        upstream = torch.randn_like(found)
        pairs = zip(*(torch.autograd.grad(y, tensors, upstream) for y in (found, expected)), strict=True)
        for got, want in pairs:
            torch.testing.assert_close(got, want)


@pytest.mark.parametrize("num_choices", [1, 2, 4])
def test_all_tokens_to_one_expert(num_choices):
    x, weights, *w = layer(6, num_choices, 4)
    expert = torch.full((6, num_choices), 2)
    torch.testing.assert_close(experts_swiglu(x, expert, weights, *w), token_by_token(x, expert, weights, *w))


def test_every_token_to_every_expert():
    x, weights, *w = layer(6, 4, 4)
    expert = torch.arange(4).expand(6, 4)
    torch.testing.assert_close(experts_swiglu(x, expert, weights, *w), token_by_token(x, expert, weights, *w))


@given(routings())
@settings(deadline=None, max_examples=40)
def test_dispatch_sorts_stably_and_combine_undoes_it(routing):
    expert, experts = routing
    T, K = expert.shape
    x = torch.arange(T, dtype=torch.float64)[:, None].expand(T, 2)
    rows, dispatch = moe_dispatch(x, expert, num_experts=experts)
    slots = sorted(range(T * K), key=lambda slot: (int(expert.reshape(-1)[slot]), slot))
    assert dispatch.order_N.tolist() == slots
    assert rows[:, 0].tolist() == [slot // K for slot in slots]
    assert dispatch.offsets_E.dtype == torch.int32
    assert dispatch.offsets_E.tolist() == [int((expert <= e).sum()) for e in range(experts)]
    if T:
        torch.testing.assert_close(combine(rows, torch.full((T, K), 1 / K), dispatch), x)


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_experts_may_be_any_integers(dtype):
    x, weights, *w = layer(6, 2, 4)
    expert = torch.tensor([[0, 1], [3, 0], [1, 1], [2, 3], [0, 0], [3, 2]])
    found = experts_swiglu(x, expert.to(dtype), weights, *w)
    assert torch.equal(found, experts_swiglu(x, expert, weights, *w))


def test_many_pieces():
    rows, weights = torch.randn(6000, 128), torch.rand(3000, 2)
    expert = torch.randint(0, 5, (3000, 2))
    _, dispatch = moe_dispatch(torch.randn(3000, 1), expert, num_experts=5)
    results = []
    for backend in ("auto", "reference"):
        leaves = [rows.clone().requires_grad_(), weights.clone().requires_grad_()]
        y = combine(*leaves, dispatch, backend=backend)
        results.append([y, *torch.autograd.grad(y.square().sum(), leaves)])
    for found, expected in zip(*results, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def test_results_repeat_to_the_bit():
    x, weights, *w = (t.requires_grad_() for t in layer(500, 2, 8, dtype=torch.float32, D=32, F=64))
    expert = torch.randint(0, 8, (500, 2))
    once, again = (
        torch.autograd.grad(experts_swiglu(x, expert, weights, *w).sum(), (x, weights, *w)) for _ in range(2)
    )
    assert all(torch.equal(a, b) for a, b in zip(once, again, strict=True))


def test_16_bit_experts_keep_wide_routing_weights():
    """A weight that bfloat16 cannot hold is not rounded before the sum."""
    rows = torch.full((2, 4), 256.0, dtype=torch.bfloat16)
    _, dispatch = moe_dispatch(torch.zeros(1, 1), torch.tensor([[0, 1]]), num_experts=2)
    weights = torch.tensor([[1.00390625, -1.0]])  # 1 + 2**-8, which bfloat16 rounds to 1
    assert combine(rows, weights, dispatch).tolist() == [[1.0] * 4]


def test_unused_experts_have_zero_gradients():
    x, w = torch.randn(4, 3), torch.randn(5, 3, 2, requires_grad=True)
    offsets = torch.tensor([0, 4, 4, 4, 4], dtype=torch.int32)
    (gradient,) = torch.autograd.grad(grouped_mm(x, w, offsets).sum(), w)
    assert gradient[1].abs().sum() > 0
    assert gradient[[0, 2, 3, 4]].abs().sum() == 0


def test_flops_count_each_row_once():
    x, w, offsets = torch.ones(7, 3), torch.ones(4, 3, 2), torch.tensor([2, 2, 5, 7], dtype=torch.int32)
    dy = torch.ones(7, 2)
    expected = 2 * 7 * 3 * 2
    assert FLOPS["ftrain::grouped_mm"](x, w, offsets) == expected
    assert FLOPS["ftrain::grouped_mm_backward_x"](dy, w, offsets) == expected
    assert FLOPS["ftrain::grouped_mm_backward_w"](dy, x, offsets) == expected


OFFSETS = torch.tensor([1, 2], dtype=torch.int32)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: moe_dispatch(torch.ones(3, 2), torch.zeros(4, 2).long(), num_experts=2), "T=3"),
        (lambda: moe_dispatch(torch.ones(3, 2), torch.zeros(3, 2), num_experts=2), "float32"),
        (lambda: combine(torch.ones(5, 2), torch.ones(3, 2), None), r"\[5, 2\] must be \[T \* K, D\]"),
        (lambda: grouped_mm(torch.ones(2, 3), torch.ones(2, 4, 1), OFFSETS), "share D"),
        (lambda: grouped_mm(torch.ones(2, 3), torch.ones(2, 3, 1), OFFSETS.long()), r"int32 \[2\]"),
        (lambda: grouped_mm(torch.ones(3, 3), torch.ones(2, 3, 1), OFFSETS), r"\[1, 2\] must ascend .* rows, 3"),
        (lambda: grouped_mm(torch.ones(2, 3), torch.ones(2, 3, 1), OFFSETS.flip(0)), "must ascend"),
    ],
)
def test_bad_input_is_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()
