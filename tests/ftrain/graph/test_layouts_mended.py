"""Real layouts are held against planned ones at the first run, and mended where shape rules were wrong."""

import pytest
import torch
import torch.nn.functional as F

import ftrain
from ftrain.graph.layouts import to_layout

w, x, y = torch.randn(6, 3), torch.randn(4, 5, 6), torch.randn(4, 3, 5)

LOSSES = {
    "mse": F.mse_loss,
    "huber": F.huber_loss,
    "smooth_l1": F.smooth_l1_loss,
    "softplus": lambda a, b: (F.softplus(a) * b).sum(),
    "elu": lambda a, b: (F.elu(a) * b).sum(),
    "hardswish": lambda a, b: (F.hardswish(a) * b).sum(),
    "one row": lambda a, b: F.mse_loss(a[:, :1], b[:, :1]),
}


@pytest.mark.parametrize("loss", LOSSES.values(), ids=LOSSES)
@pytest.mark.parametrize("options", [{}, {"remat": "all"}, {"backend": "inductor"}], ids=str)
def test_losses_of_a_transposed_prediction(loss, options):
    step = ftrain.value_and_grad(lambda w, x: loss((x @ w).transpose(1, 2), y))
    jitted = ftrain.jit(step, **options)
    for _ in range(3):
        torch.testing.assert_close(jitted(w, x), step(w, x))


def test_in_the_body_of_a_loop_too():
    def loss(w, batch):
        return ftrain.Mean(F.mse_loss((batch @ w).transpose(1, 2), y, reduction="sum"), torch.tensor(1.0))

    step = ftrain.value_and_grad(ftrain.accumulate(loss, 2, stacked=True))
    batch = torch.stack([x, -x])
    jitted = ftrain.jit(step)
    for _ in range(2):
        torch.testing.assert_close(jitted(w, batch), step(w, batch))


@torch.library.custom_op("layouts_test::flipped", mutates_args=())
def flipped(x: torch.Tensor) -> torch.Tensor:
    """Returns its result in another layout than its shape rule says."""
    return (x * 2).t().contiguous().t()


flipped.register_fake(torch.empty_like)


@torch.library.custom_op("layouts_test::longer", mutates_args=())
def longer(x: torch.Tensor) -> torch.Tensor:
    """Returns another shape than its shape rule says."""
    return torch.cat([x, x])


longer.register_fake(torch.empty_like)


def test_strides_that_are_read_are_those_of_the_plan():
    step = ftrain.jit(lambda x: torch.as_strided(flipped(x), (6,), (1,)))  # other numbers in another layout
    given = torch.arange(6.0).reshape(2, 3)
    for _ in range(2):
        assert step(given).tolist() == [0, 2, 4, 6, 8, 10]
    assert to_layout in [n.target for n in step.lower(given).graph.graph.nodes]


def test_a_wrong_shape_rule_is_named():
    with pytest.raises(
        ValueError, match=r"test_layouts_mended.py:\d+.*longer.*returned float32\[4, 3\] where its shape rule"
    ):
        ftrain.jit(lambda x: longer(x) * 2)(torch.ones(2, 3))
