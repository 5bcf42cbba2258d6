"""A donated leaf: its memory has gone to the step's result, and using it again is an error that names it."""

import gc
from collections.abc import Collection, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from ftrain.graph.torch_private import plain_functions, references, set_memory, storage_id

DONATED_PATH = "_donated_path"
"""The attribute in which a donated leaf keeps its name."""


class DonatedTensor(Tensor):
    """What a tensor object becomes when its memory was given to a step."""

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Refuse every use."""
        given = torch.utils._pytree.tree_leaves((args, kwargs or {}))
        names = [path_of(a) for a in given if is_donated(a)]
        raise ValueError(
            f"leaf {(names or ['?'])[0]!r} was donated to a step, which wrote its new state over it: use the state "
            "that the step returned, or make the step with donate=None"
        )


class DonatedDTensor(DTensor):
    """What a DTensor object becomes when the memory of its piece was given to a step."""

    __slots__ = ()
    __torch_function__ = DonatedTensor.__torch_function__

    def _refuse(self, *args: Any, **kwargs: Any) -> Any:
        return DonatedTensor.__torch_function__(None, (), (self,))

    to_local = full_tensor = redistribute = _refuse


def is_donated(leaf: Any) -> bool:
    """True for what was donated to a step."""
    return isinstance(leaf, DonatedTensor | DonatedDTensor)


def path_of(leaf: Any) -> str:
    """The name that the leaf had in the arguments of the step that took it."""
    return leaf.__dict__.get(DONATED_PATH, "?")


def give_away(leaves: list[Tensor], paths: list[str]) -> list[Tensor]:
    """Return new tensors on the memory of the leaves and spoil the old objects. Every step pays this for each leaf."""
    fresh = [leaf.data for leaf in leaves]
    for leaf, path in zip(leaves, paths, strict=True):
        leaf.__dict__[DONATED_PATH] = path
        leaf.__class__ = DonatedTensor
    return fresh


def empty(spoiled: Iterable[Tensor]) -> None:
    """Take their memory from donated leaves, which need it no more: so it counts as held by the new state alone."""
    for leaf in spoiled:
        set_memory(leaf, _NOTHING)


def empty_all_on(memory: Collection[int]) -> bool:
    """`empty` all donated leaves anywhere that look at memory of these identities, a long search; True if any did."""
    with plain_functions():
        donated = [x for x in gc.get_objects() if type(x) is DonatedTensor]
        found = [x for x in donated if storage_id(x) in memory and references([x])[1].handles == [1]]
    empty(found)
    return len(found) > 0


_NOTHING = torch.empty(0)
