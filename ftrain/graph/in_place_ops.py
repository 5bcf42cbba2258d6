"""Pure ops and their in-place forms, which write the same bits over what the results replace."""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch

from ftrain.kernels.adamw import adamw_fused, adamw_in_place

_aten = torch.ops.aten


class InPlaceOp(NamedTuple):
    """The in-place form of a pure op: `op(*args)` writes what the pure op returns.

    - `added`: pairs (result, argument) by position: the result is added to that argument.
    - `written`: pairs (result, argument): the result overwrites that argument.

    With one argument more, a 0-d bool, it does so where that is true.
    """

    op: Callable[..., Any]
    added: tuple[tuple[int, int], ...]
    written: tuple[tuple[int, int], ...]


IN_PLACE_OPS: dict[Callable[..., Any], InPlaceOp] = {
    adamw_fused: InPlaceOp(adamw_in_place, added=((0, 0),), written=((1, 2), (2, 3)))
}

PASSED_ON = {_aten.where.self, _aten.add.Tensor}
"""Ops through which a result may pass on its way to the state."""
