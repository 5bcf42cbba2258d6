"""A donated leaf: its memory has gone to the step's result, and using it again is an error that names it."""

from typing import Any

from torch import Tensor


class DonatedTensor(Tensor):
    """What a tensor object becomes when its memory was given to a step."""

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Refuse every use."""
        names = [path_of(a) for a in (*args, *(kwargs or {}).values()) if isinstance(a, DonatedTensor)]
        raise ValueError(
            f"leaf {(names or ['?'])[0]!r} was donated to a step, which wrote its new state over it: use the state that "
            "the step returned, or make the step with donate=None"
        )


def path_of(leaf: DonatedTensor) -> str:
    """The name that the leaf had in the arguments of the step that took it."""
    return leaf.__dict__.get("_donated_path", "?")


def give_away(leaf: Tensor, path: str) -> Tensor:
    """Return a new tensor on the leaf's memory and spoil the old object."""
    fresh = leaf.data
    leaf._donated_path = path  # type: ignore[attr-defined]
    leaf.__class__ = DonatedTensor  # type: ignore[assignment]
    return fresh
