"""One look, in C++, at all leaves of a call: are they like those of an earlier call? A private torch name with a canary
test.
"""

from collections.abc import Callable, Sequence

from torch import Tensor
from torch._C._dynamo.guards import TensorGuards


def guard_like(tensors: Sequence[Tensor]) -> Callable[..., bool]:
    """A function of as many tensors, of any shapes: True if each has the type, dtype, device, shape, strides and
    `requires_grad` of its example. It may return False where they differ in nothing that matters, as under
    `torch.inference_mode`.

    The examples are not kept. The function raises a TypeError for another number of tensors.
    """
    shapes, strides = [list(t.shape) for t in tensors], [list(t.stride()) for t in tensors]
    # The type stub has lists of ints where lists of lists are right.
    return TensorGuards(*tensors, dynamic_dims_sizes=shapes, dynamic_dims_strides=strides).check  # type: ignore[arg-type]
