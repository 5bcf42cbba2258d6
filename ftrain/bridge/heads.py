"""The scores of a linear head before they are computed, so that a loss need not hold them all.

Legend: D model width, V vocabulary; "..." the dims of the tokens.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from ftrain.kernels.linear_cross_entropy import linear_cross_entropy
from ftrain.kernels.linear_token_losses import linear_token_losses


@dataclass(frozen=True)
class Scores:
    """`after * tanh(before * (x @ w.T + b))`, or without the tanh, not computed yet.

    A model may scale, cap and cast it; for anything else it becomes the tensor that it stands for.
    """

    x: Tensor
    w_VD: Tensor
    b_V: Tensor | None = None
    before: float = 1.0
    after: float = 1.0
    capped: bool = False

    @classmethod
    def __torch_function__(
        cls,
        func: Callable[..., Any],
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        if func in (torch.tanh, Tensor.tanh) and isinstance(args[0], Scores):
            return args[0].tanh()
        return func(*map(_tensor, args), **{name: _tensor(value) for name, value in (kwargs or {}).items()})

    def tanh(self) -> "Scores | Tensor":
        """The capped scores; a tensor if they are capped already."""
        return self.tensor().tanh() if self.capped else replace(self, capped=True)

    def _scaled(self, factor: float) -> "Scores":
        if self.capped:
            return replace(self, after=self.after * factor)
        return replace(self, before=self.before * factor)

    def __mul__(self, other: Any) -> Any:
        return self._scaled(float(other)) if isinstance(other, int | float) else self.tensor() * _tensor(other)

    __rmul__ = __mul__

    def __truediv__(self, other: Any) -> Any:
        return self._scaled(1 / other) if isinstance(other, int | float) else self.tensor() / _tensor(other)

    def float(self) -> "Scores":
        """The same: a loss computes in float32 in any case."""
        return self

    def to(self, *args: Any, **kwargs: Any) -> Any:
        """The same on another device or in another dtype that a loss would compute in."""
        dtypes = [a for a in (*args, *kwargs.values()) if isinstance(a, torch.dtype)]
        return self if all(d in (torch.float32, self.x.dtype) for d in dtypes) else self.tensor().to(*args, **kwargs)

    def contiguous(self) -> "Scores":
        """The same."""
        return self

    @property
    def device(self) -> torch.device:
        """That of the tensor."""
        return self.x.device

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return getattr(self.tensor(), name)

    def __getitem__(self, index: Any) -> Tensor:
        return self.tensor()[index]

    def __add__(self, other: Any) -> Any:
        """The scores with a number for each of the vocabulary still are not computed."""
        plain = self.before == self.after == 1.0 and not self.capped
        if plain and isinstance(other, Tensor) and other.numel() == other.shape[-1] == len(self.w_VD):
            return replace(self, b_V=other.flatten() if self.b_V is None else self.b_V + other.flatten())
        return self.tensor() + _tensor(other)

    __radd__ = __add__

    def __sub__(self, other: Any) -> Any:
        return self.tensor() - _tensor(other)

    def tensor(self) -> Tensor:
        """The scores, `[..., V]`."""
        scores = self.x @ self.w_VD.t()  # no linear layer, which would be the head's again
        scores = scores if self.b_V is None else scores + self.b_V
        scores = scores if self.before == 1.0 else scores * self.before
        scores = scores.tanh() if self.capped else scores
        return scores if self.after == 1.0 else scores * self.after

    def cross_entropy(self, labels: Tensor, ignore_index: int = -100) -> Tensor:
        """The sum of the cross entropies of the labels, of x's leading dims: 0-d, in nats."""
        x, w, cap = _plain(self)
        return linear_cross_entropy(x, w, labels.flatten(), ignore_index=ignore_index, softcap=cap, transposed=True)


def _plain(scores: Scores) -> tuple[Tensor, Tensor, float | None]:
    """x `[T, D]` and w `[V, D]`, whose product, softcapped, is the scores; and the softcap."""
    x, w = scores.x.flatten(0, -2), scores.w_VD
    if scores.b_V is not None:
        x = torch.cat([x, x.new_ones(len(x), 1)], 1)
        w = torch.cat([w, scores.b_V[:, None].to(w.dtype)], 1)
    factor = scores.before * scores.after
    x = x if factor == 1.0 else x * factor
    return x, w, scores.after if scores.capped else None


def _tensor(value: Any) -> Any:
    if isinstance(value, Scores):
        return value.tensor()
    if isinstance(value, tuple | list):
        return type(value)(map(_tensor, value))
    return value


class HeadReads(TorchFunctionMode):
    """Within the block a product with the weight of the head gives `Scores`, and what it read is kept.

    `w_VD`: the weight, the same object that the model is called with.
    """

    def __init__(self, w_VD: Tensor) -> None:
        super().__init__()
        self._weight = w_VD
        self.read: Tensor | None = None

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        if func is torch.nn.functional.linear and len(args) > 1 and args[1] is self._weight:
            self.read = args[0]
            return Scores(args[0], args[1], args[2] if len(args) > 2 else kwargs.get("bias"))
        return func(*args, **kwargs)


def cross_entropy(scores: Any, labels: Tensor, ignore_index: int = -100) -> Tensor:
    """The sum of the cross entropies of labels, for scores `[..., V]` that are computed or not: 0-d, in nats."""
    if isinstance(scores, Scores):
        return scores.cross_entropy(labels, ignore_index)
    wide = torch.promote_types(scores.dtype, torch.float32)
    flat = scores.flatten(0, -2).to(wide)
    return torch.nn.functional.cross_entropy(flat, labels.flatten(), ignore_index=ignore_index, reduction="sum")


def token_losses(scores: Any, labels: Tensor, ignore_index: int = -100) -> Tensor:
    """The cross entropy of each label, for scores `[..., V]` that are computed or not: in nats, with their dims."""
    if isinstance(scores, Scores):
        x, w, cap = _plain(scores)
        found = linear_token_losses(x, w, labels.flatten(), ignore_index=ignore_index, softcap=cap, transposed=True)
        return found.unflatten(0, labels.shape)
    wide = torch.promote_types(scores.dtype, torch.float32)
    flat = scores.flatten(0, -2).to(wide)
    found = torch.nn.functional.cross_entropy(flat, labels.flatten(), ignore_index=ignore_index, reduction="none")
    return found.unflatten(0, labels.shape)
