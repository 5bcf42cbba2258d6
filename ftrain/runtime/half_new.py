"""Half new leaves: a step failed while it wrote its new state over the old one, so the state is of no step.

Every use of such a leaf is an error, but for a checkpoint that is restored in its place.
"""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from ftrain.graph.torch_memory import plain_functions
from ftrain.sharding.private import dtensor_like, local_of, spec_of
from ftrain.sharding.processes import PIECE

_REASON = "_half_new"


class HalfNewTensor(Tensor):
    """The class of a donated tensor after a step failed while it wrote over the state."""

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Refuse every use: ValueError that names the leaf and the failure."""
        given = torch.utils._pytree.tree_leaves((args, kwargs or {}))
        raise ValueError(next((reason_of(a) for a in given if is_half_new(a)), "a leaf is half new"))


class HalfNewDTensor(DTensor):
    """The class of a donated DTensor after a step failed while it wrote over the state."""

    __slots__ = ()
    __torch_function__ = HalfNewTensor.__torch_function__

    def _refuse(self, *args: Any, **kwargs: Any) -> Any:
        raise ValueError(reason_of(self))

    to_local = full_tensor = redistribute = _refuse


def is_half_new(leaf: Any) -> bool:
    """True for a leaf of a state that a failed step has written over in part."""
    return isinstance(leaf, HalfNewTensor | HalfNewDTensor)


def reason_of(leaf: Any) -> str:
    """Which leaf is half new, why, and what to do: a sentence."""
    return leaf.__dict__[_REASON]


def mark_half_new(leaves: Iterable[Tensor], paths: Iterable[str], error: BaseException) -> None:
    """Make every later use of these donated leaves (of any shapes) an error. `paths`: their names; `error`: what the
    step failed with.
    """
    for leaf, path in zip(leaves, paths, strict=True):
        leaf.__dict__[_REASON] = (
            f"leaf {path!r} is half new: a step failed with {type(error).__name__} while it wrote its new state over "
            "the old one, so parts of the state are of one step and parts of the next: restore it (ftrain.checkpoint), "
            "or make the step with donate=None"
        )
        leaf.__class__ = HalfNewDTensor if isinstance(leaf, DTensor) else HalfNewTensor


def as_template(leaf: Any) -> Any:
    """A half new leaf as a plain tensor on its memory, for a checkpoint that is restored in its place; others as they
    are.
    """
    if isinstance(leaf, HalfNewDTensor):
        whole = dtensor_like(local_of(leaf), spec_of(leaf))
        whole.__dict__.update({k: v for k, v in leaf.__dict__.items() if k == PIECE})
        return whole
    if isinstance(leaf, HalfNewTensor):
        with plain_functions():
            return leaf.data
    return leaf
