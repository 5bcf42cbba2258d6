"""Donated leaves: their memory belongs to the step's result, and using such a leaf is an error that names it."""

import gc
from collections.abc import Collection, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from ftrain.graph.torch_memory import (
    plain_functions,
    references,
    set_memory,
    storage_id,
)

DONATED_PATH = "_donated_path"
"""The attribute in which a donated leaf keeps its name."""


class DonatedTensor(Tensor):
    """The class of a tensor object after its memory was given to a step."""

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Refuse every use: ValueError that names the leaf."""
        given = torch.utils._pytree.tree_leaves((args, kwargs or {}))
        names = [path_of(a) for a in given if is_donated(a)]
        raise ValueError(
            f"leaf {(names or ['?'])[0]!r} was donated to a step, which wrote its new state over it: use the state "
            "that the step returned, or make the step with donate=None"
        )


class DonatedDTensor(DTensor):
    """The class of a DTensor object after the memory of its piece was given to a step."""

    __slots__ = ()
    __torch_function__ = DonatedTensor.__torch_function__

    def _refuse(self, *args: Any, **kwargs: Any) -> Any:
        return DonatedTensor.__torch_function__(None, (), (self,))

    to_local = full_tensor = redistribute = _refuse


def is_donated(leaf: Any) -> bool:
    """True for a leaf that was donated to a step."""
    return isinstance(leaf, DonatedTensor | DonatedDTensor)


def path_of(leaf: Any) -> str:
    """The path of a donated leaf in the arguments of the step that took it."""
    return leaf.__dict__.get(DONATED_PATH, "?")


def give_away(leaves: list[Tensor], paths: list[str]) -> list[Tensor]:
    """New tensors on the memory of the leaves; the old objects are invalidated. Every step does this for each leaf."""
    fresh = [leaf.data for leaf in leaves]
    for leaf, path in zip(leaves, paths, strict=True):
        leaf.__dict__[DONATED_PATH] = path
        leaf.__class__ = DonatedTensor
    return fresh


def empty(donated: Iterable[Tensor]) -> None:
    """Release the memory of donated leaves, so that only the new state holds it."""
    for leaf in donated:
        set_memory(leaf, _NOTHING)


def empty_all_on(memory: Collection[int]) -> bool:
    """Call `empty` on all donated leaves of the process that hold memory with these identities. A slow search through
    all objects; returns True if it found any.
    """
    with plain_functions():
        donated = [x for x in gc.get_objects() if type(x) is DonatedTensor]
        found = [x for x in donated if storage_id(x) in memory and references([x])[1].handles == [1]]
    empty(found)
    return len(found) > 0


_NOTHING = torch.empty(0)
