"""Sizes that depend on data: read by the host once, a symbol in the graph, with what is expected beside them."""

from typing import Any

import torch
from torch import Tensor

from ftrain.kernels.opaque import opaque_op


@opaque_op(
    "host_size(Tensor x, SymInt expected) -> SymInt",
    fake=lambda x, expected: torch.library.get_ctx().new_dynamic_size(),
)
def host_size(x: Tensor, expected: int) -> int:
    """The value of a 0-d int64 tensor on the CPU, as a size. `expected`: the number that plans of memory and time count
    with.
    """
    del expected
    return int(x)


def is_size(target: Any) -> bool:
    """True for the op whose result is a size that depends on data."""
    return target is host_size
