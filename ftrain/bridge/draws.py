"""Random numbers of a module that come from a key: the same with recompute, and for each row on any mesh."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from ftrain.graph.source import user_source
from ftrain.kernels import random
from ftrain.kernels.pack import draw_over_batch

_F = torch.nn.functional
_DROPOUTS: set[Callable[..., Any]] = {_F.dropout, _F.dropout1d, _F.dropout2d, _F.dropout3d, torch.dropout}
_CHANNELS: Mapping[Callable[..., Any], int] = {_F.dropout1d: 1, _F.dropout2d: 2, _F.dropout3d: 3}
_OTHERS: set[Callable[..., Any]] = {
    torch.rand, torch.randn, torch.randint, torch.rand_like, torch.randn_like, torch.bernoulli, torch.normal,
    torch.multinomial, torch.randperm, _F.alpha_dropout, _F.feature_alpha_dropout, _F.rrelu, _F.gumbel_softmax,
    Tensor.normal_, Tensor.uniform_, Tensor.exponential_, Tensor.random_, Tensor.bernoulli, Tensor.multinomial,
}  # fmt: skip


@contextmanager
def drawing(key: Tensor | None, rows: int = 0) -> Iterator[None]:
    """Within the block dropout and stochastic depth draw from `key`, int64 `[2]`; without one they drop nothing.

    `rows`: how many rows of the batch there are (a rank's, on a mesh): an array with so many entries along a dim gets
    for each row the numbers that it has in the whole batch. ValueError, with the line, for other random numbers.
    """
    with _Draws(key, rows):
        yield


class _Draws(TorchFunctionMode):
    """Each draw takes a key that is folded from the one given, by its number."""

    def __init__(self, key: Tensor | None, rows: int) -> None:
        super().__init__()
        self._key, self._rows, self._drawn = key, rows, 0

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        kwargs = dict(kwargs or {})
        if func in _DROPOUTS:
            return self._dropped(func, *args, **kwargs)
        if func is Tensor.bernoulli_:
            return self._chosen(*args, **kwargs)
        if func in _OTHERS:
            raise ValueError(
                f"{user_source()}: {getattr(func, '__name__', func)} draws random numbers in a bridged module; only "
                "dropout and stochastic depth draw from a key: make the numbers before and pass them in the batch"
            )
        return func(*args, **kwargs)

    def _dropped(
        self,
        func: Callable[..., Any],
        x: Tensor,
        p: float = 0.5,
        training: bool = True,
        inplace: bool = False,
        train: bool = True,
    ) -> Tensor:
        if self._key is None or not (training and train) or p == 0:
            return x
        last = _CHANNELS.get(func, 0)
        shape = (*x.shape[: x.dim() - last], *(1,) * last)
        factor = self._ones(shape, 1 - p).to(x.dtype) / (1 - p)
        return x.mul_(factor) if inplace else x * factor

    def _chosen(self, x: Tensor, p: float = 0.5) -> Tensor:
        """`x.bernoulli_(p)`: ones where all are kept, without a key."""
        return x.fill_(1) if self._key is None else x.copy_(self._ones(tuple(x.shape), p))

    def _ones(self, shape: tuple[int, ...], p: float) -> Tensor:
        """Ones with probability `p`, else zeros."""
        assert self._key is not None
        self._drawn += 1
        key, draw = random.fold_in(self._key, self._drawn), partial(random.bernoulli, p=p)
        dim = next((i for i, n in enumerate(shape[:2]) if self._rows and n == self._rows), None)
        return draw(key, shape) if dim is None else draw_over_batch(draw, key, shape, dim=dim)
