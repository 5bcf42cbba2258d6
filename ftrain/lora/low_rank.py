"""A weight that is a sum, `(base + scale * left @ right) * gain`, and multiplies without being added up.

A loss sees it in the place of a parameter. Products with rows (`x @ w`, `F.linear`, grouped products of experts), rows
of a table and convolutions are computed from the parts, so that neither `left @ right` nor the gradient of the whole
weight exists; anything else gets the sum. The base has no gradient.

Legend: M rows and N columns of the weight as it is stored, r rank.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from ftrain.graph.torch_memory import tensor_without_memory
from ftrain.kernels.stand_in import StandIn
from ftrain.lora.blocks import Blocks
from ftrain.lora.dropout import Dropped

Rule = Callable[..., Any]
RULES: dict[Any, Rule] = {}
"""What is computed from the parts, by function of torch or kernel; a rule may return NotImplemented."""


@dataclass(frozen=True)
class Parts:
    """What a `LowRank` is made of.

    - `base`: the frozen weight, `[..., M, N]`, or its quantized blocks.
    - `left` `[..., M, r]`, `right` `[..., r, N]`: None for a base without a delta. A convolution's are those of the
      weight as a matrix, with its taps on the side of the inputs.
    - `gain`: `[M, 1]` or `[1, N]`, a factor for each output; None for 1.
    - `dropped`: what the inputs of the delta lose.
    """

    base: Tensor | Blocks
    left: Tensor | None = None
    right: Tensor | None = None
    scale: float = 1.0
    gain: Tensor | None = None
    dropped: Dropped | None = None

    @property
    def is_stack(self) -> bool:
        """True for matrices of several experts."""
        return self.left is None or self.left.dim() == len(self.base.shape)

    @property
    def is_matrix(self) -> bool:
        """True for two dims."""
        return len(self.base.shape) == 2

    def map(self, function: Callable[[str, Any], Any]) -> "Parts":
        """With `function(name, tensor)` for the base, the factors and the gain."""
        names = ("base", "left", "right", "gain")
        changed = {n: function(n, getattr(self, n)) for n in names if getattr(self, n) is not None}
        return replace(self, **changed)

    def dense(self) -> Tensor:
        """The weight, `[..., M, N]`, in the dtype of the base."""
        base = self.base.decoded() if isinstance(self.base, Blocks) else self.base
        if self.left is None or self.right is None:
            return base
        product = (self.left * self.scale) @ self.right
        flat = base.reshape(product.shape) + product.to(base.dtype)
        return (flat if self.gain is None else flat * self.gain.to(base.dtype)).reshape(base.shape)

    def transposed(self) -> "Parts":
        """The last two dims swapped."""
        return replace(
            self,
            base=self.base.mT,
            left=None if self.right is None else self.right.mT,
            right=None if self.left is None else self.left.mT,
            gain=None if self.gain is None else self.gain.mT,
        )

    def tensors(self) -> list[Tensor]:
        """All tensors in it, the inverse of `rebuilt`."""
        base = self.base.tensors() if isinstance(self.base, Blocks) else [self.base]
        return [*base, *(x for x in (self.left, self.right, self.gain) if x is not None)]

    def rebuilt(self, tensors: Sequence[Tensor]) -> "Parts":
        """The same weight of other tensors."""
        left = iter(tensors)
        base = self.base.rebuilt([next(left), next(left)]) if isinstance(self.base, Blocks) else next(left)
        return self.map(lambda name, x: base if name == "base" else next(left))


class LowRank(Tensor, StandIn):
    """A weight made of `parts`, which functions of torch and kernels take as a tensor of the base's shape and dtype."""

    parts: Parts

    @staticmethod
    def __new__(cls, parts: Parts) -> "LowRank":
        base = parts.base
        made: LowRank = tensor_without_memory(cls, tuple(base.shape), base.dtype, base.device)
        made.parts = parts
        return made

    def __init__(self, parts: Parts) -> None:
        del parts

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        return f"LowRank({list(self.parts.base.shape)}, rank {_rank(self.parts)})"

    def run(self, kernel: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
        """As `StandIn.run`: by a rule for the kernel, or with the sum in the place of each such weight."""
        return _computed(kernel, args, kwargs)

    @classmethod
    def __torch_function__(
        cls,
        func: Callable[..., Any],
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        return _computed(func, args, kwargs or {})

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        raise ValueError(
            f"{func} got a weight with a low-rank delta past torch's functions, so that the delta would get no "
            "gradient: give it weight.parts.dense()"
        )


def rule(*functions: Any) -> Callable[[Rule], Rule]:
    """Decorate what computes these functions of torch, or kernels, from the parts of a `LowRank`."""

    def decorate(made: Rule) -> Rule:
        for function in functions:
            RULES[function] = made
        return made

    return decorate


def dense(value: Any) -> Any:
    """The value, a tree of tuples, lists and dicts, with the sum in the place of each `LowRank`."""
    if isinstance(value, LowRank):
        return value.parts.dense()
    if isinstance(value, tuple | list) and not hasattr(value, "_fields"):
        return type(value)(map(dense, value))
    if isinstance(value, dict):
        return {key: dense(x) for key, x in value.items()}
    return value


def _computed(func: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    own = RULES.get(func)
    if own is not None:
        found = own(*args, **kwargs)
        if found is not NotImplemented:
            return found
    return func(*map(dense, args), **{name: dense(x) for name, x in kwargs.items()})


def _rank(parts: Parts) -> int:
    return 0 if parts.left is None else parts.left.shape[-1]


def _of_base(name: str, *, call: bool) -> Rule:
    """A question that the base answers: of shape, dtype, device."""

    def ask(weight: LowRank, *args: Any) -> Any:
        found = getattr(weight.parts.base, name)
        return found(*args) if call else found

    return ask


for _name in ("shape", "dtype", "device", "ndim"):
    RULES[getattr(Tensor, _name).__get__] = _of_base(_name, call=False)
for _name in ("dim", "size", "numel", "is_floating_point", "ndimension", "nelement"):
    RULES[getattr(Tensor, _name)] = _of_base(_name, call=True)
RULES[torch.numel], RULES[torch.is_floating_point] = RULES[Tensor.numel], RULES[Tensor.is_floating_point]


@rule(Tensor.__len__)
def _length(weight: LowRank) -> int:
    return int(weight.parts.base.shape[0])


@rule(Tensor.requires_grad.__get__)  # type: ignore[attr-defined]
def _requires_grad(weight: LowRank) -> bool:
    return any(x.requires_grad for x in weight.parts.tensors())


@rule(Tensor.contiguous)
def _itself(weight: LowRank) -> LowRank:
    return weight
