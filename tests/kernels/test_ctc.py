"""Connectionist temporal classification is its reference, and torch's.

Legend: B rows, L frames, V vocabulary, N tokens of a text.
"""

import pytest
import torch

from ftrain.kernels.ctc import ctc_nats

LABELS_BN = torch.tensor([[1, 1, 2], [3, 0, 0], [4, 2, 0], [0, 0, 0]])
FRAMES_B, TOKENS_B = torch.tensor([9, 5, 7, 4]), torch.tensor([3, 1, 2, 0])


def chances(dtype=torch.float64):
    return torch.randn(4, 9, 5, dtype=dtype, generator=torch.Generator().manual_seed(0)).requires_grad_()


def nats(x_BLV, backend="auto", frames_B=FRAMES_B):
    return ctc_nats(x_BLV.log_softmax(-1), LABELS_BN, frames_B, TOKENS_B, blank=0, backend=backend)


def test_the_fast_version_is_the_reference_with_its_gradient():
    found = []
    for backend in ("auto", "reference"):
        x_BLV = chances()
        value_B = nats(x_BLV, backend)
        (value_B * torch.arange(1.0, 5)).sum().backward()
        found.append((value_B.detach(), x_BLV.grad))
    torch.testing.assert_close(found[0], found[1])


def test_it_is_that_of_torch():
    expected_B = torch.nn.functional.ctc_loss(
        chances().log_softmax(-1).transpose(0, 1), LABELS_BN, FRAMES_B, TOKENS_B, reduction="none"
    )
    torch.testing.assert_close(nats(chances()), expected_B)


@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_a_text_that_has_no_room_costs_nothing(backend):
    x_BLV = chances()
    value_B = nats(x_BLV, backend, torch.tensor([3, 5, 7, 4]))  # two equal tokens need a blank between
    assert value_B[0] == 0
    value_B.sum().backward()
    assert not x_BLV.grad[0].any()
    assert x_BLV.grad[1, :5].any()


def test_a_second_derivative_is_refused():
    x_BLV = chances()
    (grad,) = torch.autograd.grad(nats(x_BLV).sum(), x_BLV, create_graph=True)
    with pytest.raises(NotImplementedError, match="ctc has no second derivative"):
        torch.autograd.grad(grad.sum(), x_BLV)


def test_shapes_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match="are not"):
        ctc_nats(torch.zeros(2, 3, 4), torch.zeros(3, 1, dtype=torch.int64), FRAMES_B, TOKENS_B)
