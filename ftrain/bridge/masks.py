"""What a mask of transformers means: causal or not, how far back, in which chunks; read from how it was composed.

transformers builds a mask as a function of two positions, composed of a few known ones. `MaskRule` says in numbers what
the attention primitive takes; what is composed in another way stays a dense mask.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor

# The functions of transformers.masking_utils that make a mask's parts, by the names that Python gives their results.
_INNER = "{}.<locals>.{}"
_WINDOW = _INNER.format("sliding_window_overlay", "inner_mask")
_BOTH_SIDES = _INNER.format("sliding_window_bidirectional_overlay", "inner_mask")
_CHUNKS = _INNER.format("chunked_overlay", "inner_mask")
_PACKED = _INNER.format("packed_sequence_mask_function", "inner_mask")
_REMAPPED = _INNER.format("remap_positions_for_packed_sequence", "inner_mask")
_AND = _INNER.format("and_masks", "and_mask")


@dataclass(frozen=True)
class MaskRule:
    """Which keys a query sees within its document.

    - `causal`: only those at or before it. `window`: as in `ftrain.kernels.attention`. `chunk`: only those of its own
      chunk of so many tokens, counted from the document's start.
    - `dense`: bool `[B, 1 or H, T, S]`, which holds all that is seen in its place; None for a rule in numbers.
    - `bias`: numbers that a model adds to the mask, and so to the scores; None for none.
    """

    causal: bool = True
    window: int | None = None
    chunk: int | None = None
    dense: Tensor | None = None
    bias: Tensor | None = None

    def __add__(self, bias: Tensor) -> "MaskRule":
        """The rule with numbers `[B or 1, H or 1, T, S]` that are added to scores."""
        return replace(self, bias=bias if self.bias is None else self.bias + bias)

    __radd__ = __add__


def read(function: Callable[..., Any]) -> MaskRule | None:
    """The rule that a mask function of transformers stands for; None for one that is no rule in numbers."""
    rule = MaskRule(causal=False)
    for part in _parts(function):
        found = _part(part, rule)
        if found is None:
            return None
        rule = found
    return rule


def _parts(function: Callable[..., Any]) -> list[Callable[..., Any]]:
    """The functions that must all allow a key."""
    name = getattr(function, "__qualname__", "")
    if name == _AND:
        return [inner for part in _held(function, "mask_functions") for inner in _parts(part)]
    if name == _REMAPPED:
        return _parts(_held(function, "mask_function"))
    return [function]


def _part(function: Callable[..., Any], rule: MaskRule) -> MaskRule | None:
    name = getattr(function, "__qualname__", "")
    if name == "causal_mask_function":
        return replace(rule, causal=True)
    if name in ("bidirectional_mask_function", _PACKED):
        return rule
    if name == _WINDOW:
        return replace(rule, window=_held(function, "sliding_window"))
    if name == _BOTH_SIDES:
        return replace(rule, window=_held(function, "sliding_window") + 1)
    if name == _CHUNKS:
        return replace(rule, chunk=_held(function, "chunk_size"))
    return None


def _held(function: Callable[..., Any], name: str) -> Any:
    """What a function has closed over under this name."""
    cells = dict(zip(function.__code__.co_freevars, function.__closure__ or (), strict=True))
    return cells[name].cell_contents
