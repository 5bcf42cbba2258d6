"""Random numbers of a module that come from a key: the same with recompute, and for each row on any mesh."""

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from contextvars import ContextVar
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from ftrain.bridge.dropped_attention import multi_head, scaled_dot_product
from ftrain.graph.source import user_source
from ftrain.kernels import random
from ftrain.kernels.pack import draw_over_batch
from ftrain.kernels.whole_batch import unwatched_modes

_F = torch.nn.functional
_DROPOUTS: set[Callable[..., Any]] = {_F.dropout, _F.dropout1d, _F.dropout2d, _F.dropout3d, torch.dropout}
_CHANNELS: Mapping[Callable[..., Any], int] = {_F.dropout1d: 1, _F.dropout2d: 2, _F.dropout3d: 3}
_SCALED, _HEADS = _F.scaled_dot_product_attention, _F.multi_head_attention_forward
_OF_HEADS = tuple(inspect.signature(_HEADS).parameters)
_OF_SCALED = ("query", "key", "value", "attn_mask", "dropout_p", "is_causal", "scale", "enable_gqa")
_DROPPING: Mapping[Callable[..., Any], tuple[str, ...]] = {_SCALED: _OF_SCALED, _HEADS: _OF_HEADS}
"""Functions that drop weights of attention, and the names of their arguments."""
_RECURRENT: set[Callable[..., Any]] = {torch.lstm, torch.gru, torch.rnn_tanh, torch.rnn_relu}
_NUMBERS: Mapping[Callable[..., Any], Callable[..., Tensor]] = {
    torch.rand: random.uniform,
    torch.rand_like: random.uniform,
    torch.randn: random.normal,
    torch.randn_like: random.normal,
}
_IN_PLACE: Mapping[Callable[..., Any], Callable[..., Tensor]] = {
    Tensor.uniform_: lambda draw, low=0.0, to=1.0: draw(random.uniform) * (to - low) + low,
    Tensor.normal_: lambda draw, mean=0.0, std=1.0: draw(random.normal) * std + mean,
    Tensor.exponential_: lambda draw, lambd=1.0: -torch.log1p(-draw(random.uniform)) / lambd,
}
"""What tensors are filled with, from numbers of their shape that `draw(function)` gives."""
_OTHERS: set[Callable[..., Any]] = {
    torch.rand, torch.randn, torch.randint, torch.rand_like, torch.randn_like, torch.bernoulli, torch.normal,
    torch.multinomial, torch.randperm, _F.alpha_dropout, _F.feature_alpha_dropout, _F.rrelu, _F.gumbel_softmax,
    Tensor.normal_, Tensor.uniform_, Tensor.exponential_, Tensor.random_, Tensor.bernoulli, Tensor.multinomial,
}  # fmt: skip


@contextmanager
def drawing(key: Tensor | None, rows: int = 0, places: int = 0, *, watched: bool = False) -> Iterator[None]:
    """Within the block dropout, stochastic depth, `torch.rand`, `torch.randn` and what fills tensors in their way draw
    from `key`, int64 `[2]`; without one nothing is dropped.

    `rows`: how many rows of the batch there are (a rank's, on a mesh): an array with so many entries along a dim, or a
    multiple along dim 0, gets for each row the numbers that it has in the whole batch. `places`: tokens of a row; an
    array with an entry for each token of each row is divided so too, where there are several rows. `watched`: on a
    mesh, what the module does with rows is looked at, as in a loss of the user's own. ValueError, with the line, for
    other random numbers, and for a module that seeds those of the process.
    """
    draws, seed = _Draws(key, rows, places), torch.initial_seed()
    token = _current.set(draws)
    try:
        with nullcontext() if watched else unwatched_modes(), draws:
            yield
    finally:
        _current.reset(token)
    if torch.initial_seed() != seed:
        raise ValueError(
            "a bridged module seeds the random numbers of the process while it runs, to draw the same ones again in "
            "its backward pass (as reversible layers do), which a traced step cannot: a model of this kind is not "
            "bridged"
        )


def next_key() -> Tensor:
    """Within `drawing` with a key: a key for one draw of one's own, int64 `[2]`. ValueError elsewhere."""
    return (_current.get() or _Draws(None, 0)).key()


class _Draws(TorchFunctionMode):
    """Each draw takes a key that is folded from the one given, by its number."""

    def __init__(self, key: Tensor | None, rows: int, places: int = 0) -> None:
        super().__init__()
        self._key, self._rows, self._places, self._drawn = key, rows, places, 0

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
        if func is _SCALED and self._key is not None and _given(_OF_SCALED, args, kwargs).get("dropout_p"):
            return self._scaled(*args, **kwargs)
        if func is _HEADS and self._drops_in_heads(_given(_OF_HEADS, args, kwargs)):
            return multi_head(self._ones, _HEADS, _given(_OF_HEADS, args, kwargs))
        if func in _DROPPING:
            args, kwargs = (), {**_given(_DROPPING[func], args, kwargs), "dropout_p": 0.0}
        if func in _RECURRENT:
            args = self._recurrent(func, args)
        if func in _NUMBERS and self._key is not None and kwargs.get("generator") is None:
            return self._numbers(func, args, kwargs)
        if func in _IN_PLACE and self._key is not None and kwargs.get("generator") is None:
            return self._filled(func, *args, **kwargs)
        if func in _OTHERS:
            known = (func in _NUMBERS or func in _IN_PLACE) and kwargs.get("generator") is None
            way = "give the model's functions a key, key=ftrain.key(0)" if known else "pass the numbers in the batch"
            raise ValueError(
                f"{user_source()}: {getattr(func, '__name__', func)} draws random numbers in a bridged module, "
                f"{'and there is no key to draw from' if known else 'which it cannot do from a key'}: {way}"
            )
        return func(*args, **kwargs)

    def _numbers(self, func: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any]) -> Tensor:
        """Uniform or normal numbers of a shape, by which modules of others drop paths."""
        like = args[0] if args and isinstance(args[0], Tensor) else None
        sizes = kwargs.get("size", args[0] if len(args) == 1 and isinstance(args[0], Sequence) else args)
        shape = tuple(sizes) if like is None else tuple(like.shape)
        dtype = kwargs.get("dtype") or (torch.get_default_dtype() if like is None else like.dtype)
        return self._drawn_over(partial(_NUMBERS[func], dtype=dtype), shape)

    def _filled(self, func: Callable[..., Any], x: Tensor, *how: Any, **named: Any) -> Tensor:
        """`x`, overwritten with numbers (`x.uniform_(0.9, 1.1)`)."""
        named = {{"from": "low"}.get(name, name): value for name, value in named.items() if name != "generator"}
        return x.copy_(_IN_PLACE[func](lambda draw: self._drawn_over(draw, tuple(x.shape)), *how, **named))

    def key(self) -> Tensor:
        """The key of the next draw, int64 `[2]`. ValueError without one to fold."""
        if self._key is None:
            raise ValueError("there is no key to draw from: give the model's functions one, key=ftrain.key(0)")
        self._drawn += 1
        return random.fold_in(self._key, self._drawn)

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

    def _scaled(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        **options: Any,
    ) -> Tensor:
        """Attention that drops weights by our numbers."""
        return scaled_dot_product(self._ones, query, key, value, attn_mask, dropout_p, is_causal, **options)

    def _drops_in_heads(self, given: Mapping[str, Any]) -> bool:
        return self._key is not None and bool(given.get("training", True) and given["dropout_p"])

    def _recurrent(self, func: Callable[..., Any], args: Sequence[Any]) -> list[Any]:
        """The arguments of a recurrent network whose layers drop nothing; with a key what would drop is refused."""
        given = list(args)
        at = next(i for i, x in enumerate(given) if isinstance(x, float))
        if given[at] and self._key is not None and given[at + 1]:
            raise ValueError(
                f"{user_source()}: {func.__name__} drops between its layers (p={given[at]}), which cannot be drawn "
                "from a key: set its dropout to 0 and put nn.Dropout between layers"
            )
        given[at] = 0.0
        return given

    def _ones(self, shape: tuple[int, ...], p: float) -> Tensor:
        """Ones with probability `p`, else zeros."""
        return self._drawn_over(partial(random.bernoulli, p=p), shape)

    def _drawn_over(self, draw: Callable[..., Tensor], shape: tuple[int, ...]) -> Tensor:
        """`draw(key, shape)`, where the array has rows of the batch with the numbers that each has in the whole."""
        key = self.key()
        dim = self._dim(shape)
        return draw(key, shape) if dim is None else draw_over_batch(draw, key, shape, dim=dim)

    def _dim(self, shape: tuple[int, ...]) -> int | None:
        """The dim of an array along which rows of the batch lie; None if none does."""
        if not self._rows or not shape:
            return None
        if shape[0] == self._rows * self._places and self._rows > 1:
            return 0  # tokens, row after row
        if len(shape) == 2 and self._rows == 1 and shape[0] == self._places:
            return None  # tokens of the only row, or places that all rows share: a mesh refuses what it cannot tell
        if self._rows in shape[:2]:
            return shape.index(self._rows)
        return (
            0 if len(shape) > 2 and shape[0] % self._rows == 0 else None
        )  # parts of rows, such as windows of pictures


_current: ContextVar[_Draws | None] = ContextVar("ftrain_bridge_draws", default=None)


def _given(names: Sequence[str], args: Sequence[Any], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of a call by name."""
    return {**dict(zip(names, args, strict=False)), **kwargs}
