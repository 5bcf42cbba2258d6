"""What a weight of parts does in products, lookups and convolutions: the rules of `LowRank`.

Legend: x rows with I at last, w `[I, O]`, E experts, N rows sorted by expert, V rows of a table, D width, r rank.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ftrain.kernels.embedding import embedding
from ftrain.kernels.experts import dropped_rows, experts
from ftrain.kernels.grouped_mm import grouped_mm
from ftrain.kernels.wide_mm import wide_mm
from ftrain.lora.blocks import Blocks
from ftrain.lora.low_rank import LowRank, Parts, rule

Product = Callable[..., Tensor]


def weight(parts: Parts) -> LowRank:
    """The weight of these parts, with the rules of this file."""
    return LowRank(parts)


def times(x: Tensor, parts: Parts, product: Product = torch.matmul, *others: Tensor) -> Tensor:
    """`product(x, w)` of the weight `[..., I, O]`, from its parts: `x @ base + ((drop(x) @ left) scale) @ right`."""
    if parts.gain is not None and parts.gain.shape[-1] == 1:  # a factor for each input
        x = x * parts.gain.squeeze(-1).to(x.dtype)
    y = _by_base(x, parts.base, product, *others)
    if parts.left is not None and parts.right is not None:
        seen = x if parts.dropped is None else parts.dropped.of(x)
        inner = product(seen, parts.left.to(x.dtype), *others) * parts.scale
        y = y + product(inner, parts.right.to(inner.dtype), *others)
    if parts.gain is not None and parts.gain.shape[-2] == 1:
        y = y * parts.gain.squeeze(-2).to(y.dtype)
    return y


def _by_base(x: Tensor, base: Tensor | Blocks, product: Product, *others: Tensor) -> Tensor:
    return base.times(product, x, *others) if isinstance(base, Blocks) else product(x, base, *others)


@rule(torch.matmul, torch.mm, torch.bmm, Tensor.matmul, Tensor.__matmul__, Tensor.mm, Tensor.bmm)
def _matmul(x: Any, w: Any) -> Any:
    return times(x, w.parts) if _right(x, w) else NotImplemented


@rule(Tensor.__rmatmul__)
def _rmatmul(w: Any, x: Any) -> Any:
    return times(x, w.parts) if _right(x, w) else NotImplemented


@rule(F.linear)
def _linear(x: Any, w: Any, bias: Tensor | None = None) -> Any:
    if not _right(x, w) or not w.parts.is_matrix:
        return NotImplemented
    y = times(x, w.parts.transposed())
    return y if bias is None else y + bias


@rule(wide_mm)
def _wide(x: Any, w: Any, **options: Any) -> Any:
    if not _right(x, w) or w.parts.gain is not None:
        return NotImplemented
    return times(x, w.parts, lambda x, w: wide_mm(x, w, **options))


@rule(grouped_mm)
def _grouped(x_ND: Any, w_EDF: Any, offsets_E: Tensor, **options: Any) -> Any:
    if not _right(x_ND, w_EDF) or w_EDF.parts.gain is not None:
        return NotImplemented
    return times(x_ND, w_EDF.parts, partial(_in_groups, **options), offsets_E)


def _in_groups(x_ND: Tensor, w_EDF: Tensor, offsets_E: Tensor, **options: Any) -> Tensor:
    return grouped_mm(x_ND, w_EDF, offsets_E, **options)


@rule(experts)
def _experts(
    x_TD: Tensor, expert_TK: Tensor, weights_TK: Tensor, leaves: Sequence[Any], ffn: Any, **options: Any
) -> Any:
    """The experts' parts go to the ranks that hold them, and are one weight again within the network."""
    flat = [leaf.parts.tensors() if isinstance(leaf, LowRank) else [leaf] for leaf in leaves]

    def network(rows_ND: Tensor, offsets_E: Tensor, expert_N: Tensor, own: Sequence[Tensor]) -> Tensor:
        left = iter(own)
        mine = [[next(left) for _ in tensors] for tensors in flat]
        again = [
            weight(leaf.parts.rebuilt(tensors)) if isinstance(leaf, LowRank) else tensors[0]
            for leaf, tensors in zip(leaves, mine, strict=True)
        ]
        found: Tensor = ffn(rows_ND, offsets_E, expert_N, tuple(again))
        return found

    return experts(x_TD, expert_TK, weights_TK, [x for tensors in flat for x in tensors], network, **options)


@rule(dropped_rows)
def _dropped_rows(expert_TK: Tensor, w_EDF: LowRank) -> Tensor:
    return dropped_rows(expert_TK, w_EDF.parts.tensors()[0])


@rule(embedding)
def _embedding(tokens: Tensor, table: Any, **options: Any) -> Any:
    return _looked_up(tokens, table, lambda x, rows: embedding(x, rows, **options))


@rule(F.embedding)
def _torch_embedding(tokens: Tensor, table: Any, padding_idx: int | None = None, *args: Any, **options: Any) -> Any:
    look_up = lambda x, rows: F.embedding(x, rows, padding_idx, *args, **options)  # noqa: E731
    found = _looked_up(tokens, table, look_up)
    if padding_idx is None or found is NotImplemented:
        return found
    padding = tokens == padding_idx % table.parts.base.shape[0]
    return torch.where(padding[..., None], found.detach(), found)  # a lookup of padding has no gradient


def _looked_up(tokens: Tensor, table: Any, look_up: Callable[[Tensor, Tensor], Tensor]) -> Any:
    parts = table.parts
    if parts.gain is not None or (isinstance(parts.base, Blocks) and parts.base.views):
        return NotImplemented
    rows = parts.base.rows(tokens) if isinstance(parts.base, Blocks) else look_up(tokens, parts.base)
    if parts.left is None:
        return rows
    return rows + (look_up(tokens, parts.left).to(rows.dtype) * parts.scale) @ parts.right.to(rows.dtype)


@rule(F.conv1d, F.conv2d, F.conv3d)
def _convolution(x: Any, w: Any, bias: Tensor | None = None, *args: Any, **options: Any) -> Any:
    """The delta is a convolution to r channels and one of a single tap to the outputs."""
    if not _right(x, w) or w.parts.is_stack or isinstance(w.parts.base, Blocks) or _groups(args, options) != 1:
        return NotImplemented
    parts: Parts = w.parts
    assert parts.left is not None
    assert parts.right is not None
    assert isinstance(parts.base, Tensor)
    taps = parts.base.shape[2:]
    if parts.left.shape[0] != parts.base.shape[0] or parts.right.shape[1] != parts.base[0].numel():
        return NotImplemented
    convolve = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}[len(taps)]
    y = convolve(x, parts.base, None, *args, **options)
    seen = x if parts.dropped is None else parts.dropped.of(x)
    inner = convolve(seen, parts.right.reshape(-1, *parts.base.shape[1:]).to(x.dtype), None, *args, **options)
    y = y + convolve(inner * parts.scale, parts.left.reshape(*parts.left.shape, *(1 for _ in taps)).to(x.dtype))
    y = y if parts.gain is None else y * parts.gain.reshape(-1, *(1 for _ in taps)).to(y.dtype)
    return y if bias is None else y + bias.reshape(-1, *(1 for _ in taps))


def _groups(args: Sequence[Any], options: dict[str, Any]) -> int:
    return int(args[3] if len(args) > 3 else options.get("groups", 1))


@rule(Tensor.t, torch.t, Tensor.T.__get__, Tensor.mT.__get__)  # type: ignore[attr-defined]
def _transposed(w: LowRank) -> Any:
    return weight(w.parts.transposed()) if w.parts.is_stack else NotImplemented


@rule(Tensor.transpose, torch.transpose)
def _swapped(w: LowRank, dim0: int, dim1: int) -> Any:
    dims = len(w.parts.base.shape)
    swaps = {dim0 % dims, dim1 % dims} == {dims - 1, dims - 2}
    return weight(w.parts.transposed()) if swaps and w.parts.is_stack else NotImplemented


@rule(Tensor.__getitem__)
def _some(w: LowRank, index: Any) -> Any:
    """Some of the columns, `w[..., a:b]`."""
    last = index[-1] if isinstance(index, tuple) and len(index) == 2 else None
    before = index[0] if isinstance(index, tuple) and index else None
    matrix = before == slice(None) and w.parts.is_matrix
    if not isinstance(last, slice) or not (before is Ellipsis or matrix) or not w.parts.is_stack:
        return NotImplemented

    def columns(name: str, x: Any) -> Any:
        if name == "left" or (name == "gain" and x.shape[-1] == 1):
            return x
        return x.columns(last) if isinstance(x, Blocks) else x[..., last]

    return weight(w.parts.map(columns))


def _right(x: Any, w: Any) -> bool:
    """True where only the second factor is made of parts."""
    return isinstance(w, LowRank) and not isinstance(x, LowRank)
