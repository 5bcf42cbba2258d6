"""The gated delta rule in chunks equals its definition, token by token, in every document."""

import pytest
import torch

from ftrain.kernels.gated_delta_rule import gated_delta_rule, gated_delta_step

LENGTHS = (7, 1, 9, 3)


def numbers(rows=2, heads=3, tokens=20, key=4, value=5):
    generator = torch.Generator().manual_seed(0)
    made = lambda *shape: torch.randn(*shape, generator=generator, dtype=torch.float64)  # noqa: E731
    q, k = (torch.nn.functional.normalize(made(rows, heads, tokens, key), dim=-1) for _ in range(2))
    decay, rate = -made(rows, heads, tokens).exp(), made(rows, heads, tokens).sigmoid()
    return q, k, made(rows, heads, tokens, value), decay, rate


def one_by_one(q, k, v, decay, rate, lengths):
    outs, begin = [], 0
    for length in lengths:
        state = q.new_zeros(*q.shape[:2], q.shape[-1], v.shape[-1])
        for t in range(begin, begin + length):
            out, state = gated_delta_step(*(x[:, :, t] for x in (q, k, v, decay, rate)), state)
            outs.append(out)
        begin += length
    return torch.stack(outs, 2), state


@pytest.mark.parametrize("chunk", [1, 4, 64])
def test_chunks_give_what_single_tokens_give(chunk):
    given = [x.requires_grad_() for x in numbers()]
    documents = torch.repeat_interleave(torch.arange(4), torch.tensor(LENGTHS)).expand(2, -1)
    ours = gated_delta_rule(*given, documents_BL=documents, chunk=chunk)
    definition = one_by_one(*given, LENGTHS)
    weight = torch.linspace(-1, 1, ours[0].numel(), dtype=torch.float64).view(ours[0].shape)
    grads = [torch.autograd.grad((out * weight).sum() + state.sum(), given) for out, state in (ours, definition)]
    for a, b in zip([*ours, *grads[0]], [*definition, *grads[1]], strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-10)


def test_the_rule_forgets_and_corrects():
    """A key that is written again is overwritten by its rate; what is forgotten is gone."""
    one = torch.ones(1, 1, 2, 1)
    values, never = torch.tensor([1.0, 5.0]).view(1, 1, 2, 1), torch.zeros(1, 1, 2)
    out, state = gated_delta_rule(one, one, values, never, never + 1)
    assert out.flatten().tolist() == [1.0, 5.0]
    assert state.item() == 5.0
    out, _ = gated_delta_rule(one, one, values, torch.tensor([[[0.0, -100.0]]]), torch.tensor([[[1.0, 0.5]]]))
    assert out.flatten().tolist() == [1.0, 2.5]


def test_half_precision_is_computed_in_float32():
    q, k, v, decay, rate = (x.to(torch.bfloat16) for x in numbers())
    out, state = gated_delta_rule(q, k, v, decay, rate)
    wide, _ = gated_delta_rule(*(x.float() for x in (q, k, v, decay, rate)))
    assert (out.dtype, state.dtype) == (torch.bfloat16, torch.float32)
    torch.testing.assert_close(out, wide.to(torch.bfloat16))
