"""A donated leaf: its memory has gone to the step's result, and using it again is an error that names it."""

from typing import Any

import torch
from torch import Tensor


class DonatedTensor(Tensor):
    """What a tensor object becomes when its memory was given to a step."""

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Refuse every use."""
        given = torch.utils._pytree.tree_leaves((args, kwargs or {}))
        names = [path_of(a) for a in given if isinstance(a, DonatedTensor)]
        raise ValueError(
            f"leaf {(names or ['?'])[0]!r} was donated to a step, which wrote its new state over it: use the state "
            "that the step returned, or make the step with donate=None"
        )


def path_of(leaf: DonatedTensor) -> str:
    """The name that the leaf had in the arguments of the step that took it."""
    return leaf.__dict__.get("_donated_path", "?")


def give_away(leaves: list[Tensor], paths: list[str]) -> list[Tensor]:
    """Return new tensors on the memory of the leaves and spoil the old objects. Every step pays this for each leaf."""
    fresh = [leaf.data for leaf in leaves]
    for leaf, path in zip(leaves, paths, strict=True):
        leaf._donated_path = path  # type: ignore[attr-defined]
        leaf.__class__ = DonatedTensor
    return fresh
