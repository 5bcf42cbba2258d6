"""Counts of a piece's elements, asked for in a user's own update: refused, for they are not the array's.

`g.sum() / g.numel()` would divide a sum that is finished over the ranks by one rank's number, and nothing in the graph
would tell: a count is a number of Python. A shape is another matter: `torch.zeros(g.shape)` is right of a piece, so
`shape` and `size()` stay the piece's.
"""

import sys
from collections.abc import Callable, Mapping, Sequence
from types import FrameType
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from ftrain.graph.source import is_users
from ftrain.sharding.placement import Placement

_COUNTS: Mapping[Callable, str] = {
    Tensor.numel: "numel()",  # and nelement()
    torch.numel: "torch.numel()",
    Tensor.__len__: "len()",
}


_METHODS = (Tensor.__len__.__code__.co_filename, torch.overrides.__file__)
"""`len(x)` is a method of Python, which asks the mode: its frames, and torch's between them."""


class RefusedCounts(TorchFunctionMode):
    """Within the block, counts of divided arrays that the user's code takes are ValueErrors with the line.

    `placement_of`: where the array is that a tensor is a piece of, None for what is no piece. Inside of a loss
    parameters are whole, and what is computed from them is not asked for.
    """

    def __init__(self, placement_of: Callable[[Tensor], Placement | None]) -> None:
        super().__init__()
        self._placement_of = placement_of

    def __torch_function__(
        self, func: Callable, types: Sequence[type], args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """Run the function, or refuse it."""
        if func in _COUNTS:
            caller = _caller(sys._getframe(1))
            if is_users(caller.f_code.co_filename):
                self._refuse_count(func, args[0], f"{caller.f_code.co_filename}:{caller.f_lineno}")
        return func(*args, **(kwargs or {}))

    def _refuse_count(self, func: Callable, tensor: Any, line: str) -> None:
        if not isinstance(tensor, Tensor) or tensor.requires_grad:
            return
        placement = self._placement_of(tensor)
        dims = set() if placement is None else {split.dim for split in placement.splits}
        if not dims or (func is Tensor.__len__ and 0 not in dims):
            return
        assert placement is not None
        raise ValueError(
            f"{_COUNTS[func]} at {line}: a rank holds {list(tensor.shape)} of an array of {list(placement.shape)}, and "
            "counts its piece alone: take .mean(), or the array's shape with ftrain.optim.shards.whole_shape(leaf)"
        )


def _caller(frame: FrameType) -> FrameType:
    """The frame that called the function."""
    while frame.f_back is not None and frame.f_code.co_filename in _METHODS:
        frame = frame.f_back
    return frame
