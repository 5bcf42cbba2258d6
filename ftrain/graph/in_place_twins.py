"""Ops and their twins that write the results over what they replace, with the same bits."""

from collections.abc import Callable
from typing import NamedTuple

import torch

from ftrain.kernels.adamw import adamw_fused, adamw_in_place

_aten = torch.ops.aten


class Twin(NamedTuple):
    """`op(*args)` writes in place what the pure op returns: result i is added to (`added`) or put over (`written`) the
    argument of that number; pairs of (result, argument). With one argument more, a 0-d bool, it does so where that is
    true.
    """

    op: Callable
    added: tuple[tuple[int, int], ...]
    written: tuple[tuple[int, int], ...]


TWINS: dict[Callable, Twin] = {adamw_fused: Twin(adamw_in_place, added=((0, 0),), written=((1, 2), (2, 3)))}

PASSED_ON = {_aten.where.self, _aten.add.Tensor}
"""Ops through which a twin's result may pass on its way to the state."""
