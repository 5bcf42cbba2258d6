"""Ops and their in-place twins, which write the results over what they replace, with the same bits."""

from collections.abc import Callable
from typing import NamedTuple

import torch

from ftrain.kernels.adamw import adamw_fused, adamw_in_place

_aten = torch.ops.aten


class Twin(NamedTuple):
    """The in-place form of a pure op: `op(*args)` writes what the pure op returns.

    - `added`: pairs (result, argument) by position: the result is added to that argument.
    - `written`: pairs (result, argument): the result overwrites that argument.

    With one argument more, a 0-d bool, it does so where that is true.
    """

    op: Callable
    added: tuple[tuple[int, int], ...]
    written: tuple[tuple[int, int], ...]


TWINS: dict[Callable, Twin] = {adamw_fused: Twin(adamw_in_place, added=((0, 0),), written=((1, 2), (2, 3)))}

PASSED_ON = {_aten.where.self, _aten.add.Tensor}
"""Ops through which a twin's result may pass on its way to the state."""
