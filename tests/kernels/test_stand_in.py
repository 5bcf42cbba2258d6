"""Objects in the place of a weight are asked by kernels, in whatever argument they are."""

import pytest
import torch

from ftrain.kernels.embedding import embedding
from ftrain.kernels.experts import experts_swiglu
from ftrain.kernels.grouped_mm import grouped_mm
from ftrain.kernels.linear_cross_entropy import linear_cross_entropy
from ftrain.kernels.stand_in import StandIn
from ftrain.kernels.wide_mm import wide_mm


class Held(StandIn):
    """A weight that stands for a tensor that it holds."""

    def __init__(self, tensor):
        self.tensor, self.asked = tensor, []

    @property
    def shape(self):
        return self.tensor.shape

    def run(self, kernel, args, kwargs):
        self.asked.append(kernel.__name__)

        def real(value):
            if isinstance(value, tuple | list):
                return type(value)(map(real, value))
            return value.tensor if isinstance(value, Held) else value

        return kernel(*map(real, args), **{name: real(x) for name, x in kwargs.items()})


X = torch.randn(4, 3, generator=torch.Generator().manual_seed(0))
TOKENS, ENDS = torch.tensor([0, 1, 2, 0]), torch.tensor([1, 4], dtype=torch.int32)
STACK, DOWN = torch.ones(2, 3, 5), torch.ones(2, 5, 3)
CALLS = {
    "wide_mm": (lambda w: wide_mm(X, w), torch.ones(3, 2)),
    "grouped_mm": (lambda w: grouped_mm(X, w, ENDS), torch.ones(2, 3, 2)),
    "embedding": (lambda w: embedding(TOKENS, w), torch.ones(3, 2)),
    "linear_cross_entropy": (lambda w: linear_cross_entropy(X, w, TOKENS), torch.ones(3, 4)),
    "experts": (lambda w: experts_swiglu(X, TOKENS[:, None] % 2, torch.ones(4, 1), STACK, w, DOWN), STACK),
}


@pytest.mark.parametrize("kernel", CALLS)
def test_a_kernel_leaves_the_call_to_what_stands_for_its_weight(kernel):
    call, weight = CALLS[kernel]
    held = Held(weight)
    torch.testing.assert_close(call(held), call(weight))
    assert held.asked == [kernel]


def test_a_class_says_how_it_multiplies():
    with pytest.raises(NotImplementedError, match="StandIn does not say how wide_mm"):
        wide_mm(X, StandIn())
