"""Features of media in the places of their tokens, with shapes that do not depend on which tokens they are.

transformers' models write features with `masked_scatter`, and read and write hidden states with a mask as the index.
How many tokens a mask has is known from the features that were written; where they are is data.

Legend: B rows, L tokens of a row, N features of media, D model width.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from ftrain.bridge.attention import of_parts
from ftrain.bridge.patches import Sizes
from ftrain.graph.source import user_source


class InPlaces(TorchFunctionMode):
    """Within the block masks over tokens `[B, L]` are indices of as many tokens as there are features.

    Where a batch has more or fewer tokens of media than features, or pictures that are nothing but filling, what is
    written is NaN: no branch of a trace can look at data, and a loss that is no number is better than one of other
    tokens' features.
    """

    def __init__(self, tokens_BL: Tensor) -> None:
        super().__init__()
        self._shape = tuple(tokens_BL.shape)
        self._written: list[int] = []
        self._pictures = 0

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        if func in (Tensor.masked_scatter, torch.masked_scatter) and args[0].shape[:2] == self._shape:
            return self._scattered(*args, **kwargs)
        if func is Tensor.__getitem__ and self._is_mask(args[1]):
            return args[0].flatten(0, 1)[self._index(_mask(args[1]))]
        if func is Tensor.__setitem__ and self._is_mask(args[1]) and isinstance(args[2], Tensor):
            return self._written_at(args[0], _mask(args[1]), args[2])
        if func is Tensor.__getitem__ and _is_choice(args[0], args[1]):
            self._pictures = len(args[1])
            return _all_or_nan(args[0], args[1])
        if func is Tensor.unbind and self._pictures and _counts(args[0], self._shape[0]):
            return (_Count(self._pictures // self._shape[0]),) * self._shape[0]
        if func in (torch.split, Tensor.split) and isinstance(args[1], Sizes):
            return (of_parts(args[0], args[1].ids_P),)
        return func(*args, **kwargs)

    def _is_mask(self, index: Any) -> bool:
        mask = _mask(index)
        return isinstance(mask, Tensor) and mask.dtype == torch.bool and tuple(mask.shape) == self._shape

    def _scattered(self, x_BLD: Tensor, mask: Tensor, source: Tensor) -> Tensor:
        """`x_BLD` with the rows of `source`, `[..., D]`, where the mask, bool `[B, L, 1 or D]`, is true."""
        mask_T = mask[..., 0].flatten()
        rows_ND = source.reshape(-1, x_BLD.shape[-1])
        self._written.append(len(rows_ND))
        place_T = (mask_T.long().cumsum(0) - 1).clamp(0, len(rows_ND) - 1)
        whole = torch.where(mask_T.sum() == len(rows_ND), 0.0, torch.nan).to(rows_ND.dtype)
        found_BLD = (rows_ND + whole)[place_T].unflatten(0, self._shape).to(x_BLD.dtype)
        return torch.where(mask_T.unflatten(0, self._shape)[..., None], found_BLD, x_BLD)

    def _index(self, mask_BL: Tensor) -> Tensor:
        """The places of the true ones among the folded tokens, int64 `[N]`."""
        if len(self._written) != 1:
            raise ValueError(
                f"{user_source()}: a mask over tokens is an index, and how many are true is not known: features of one "
                f"kind of media were to be written before, and there were {len(self._written)} kinds: give the batch "
                "pictures or videos, not both"
            )
        count = self._written[0]
        return (~mask_BL.flatten()).to(torch.int8).argsort(stable=True)[:count]

    def _written_at(self, x_BLD: Tensor, mask_BL: Tensor, rows_ND: Tensor) -> None:
        index_N = self._index(mask_BL)
        x_BLD.copy_(x_BLD.flatten(0, 1).index_copy(0, index_N, rows_ND).unflatten(0, self._shape))


@dataclass(frozen=True)
class _Count:
    """How many pictures a row has, where none is filling."""

    pictures: int

    def item(self) -> int:
        return self.pictures


def _counts(x: Tensor, rows: int) -> bool:
    return tuple(x.shape) == (rows,) and x.dtype == torch.int64


def _is_choice(x: Tensor, index: Any) -> bool:
    """True for a mask over pictures, by which a model takes those that are not filling."""
    return isinstance(index, Tensor) and index.dtype == torch.bool and index.dim() == 1 and x.dim() > 2


def _all_or_nan(x: Tensor, mask_N: Tensor) -> Tensor:
    """All pictures, which a batch is to have no filling among; NaN if it has."""
    return x + torch.where(mask_N.all(), 0.0, torch.nan).to(x.dtype) if x.dtype.is_floating_point else x


def _mask(index: Any) -> Any:
    """The mask in `x[mask]` and `x[mask, :]`."""
    whole = isinstance(index, tuple) and len(index) == 2 and index[1] in (slice(None), Ellipsis)
    return index[0] if whole else index
