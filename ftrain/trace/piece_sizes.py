"""Sizes in a user's own update on a mesh: the user's code reads those of whole arrays, while a rank holds pieces.

Python computes with sizes outside of the graph. With the sizes of pieces, `g.sum() / g.shape[0]` would divide a sum
over all ranks by the size of one piece, `g.view(-1, 2)` could form other blocks than on one device, and `g[:2]` could
be all of a piece. So within the trace of a step, on lines of the user's code:

- `x.shape`, `x.size()`, `x.numel()`, `x.nbytes` and `len(x)` of a piece are those of the array (`DividedSize`).
- A function that creates or expands a tensor with such a size (`torch.zeros(g.shape)`, `row.expand(g.shape)`) creates a
  piece, and the trace records its placement.
- The sizes for `view`, `reshape` and `unflatten` are those of the array. The piece is viewed accordingly, or gathered
  if the view cuts or merges a divided dim.
- An index that takes a part of a divided dim gathers the piece. So do `narrow` and `select`.
- Any other function runs on pieces if possible, else on whole arrays (`ftrain.trace.whole_arrays`).

Any other use of such a size is the plain number of the array. Code of torch, of ftrain and of kernels reads the sizes
of pieces, and inside of a loss parameters are whole. Leaves of the batch are a rank's share and no pieces of an array:
their sizes are those of the share, as the counts in a `Mean` must be. Reads that call no function of torch return the
values of the piece: `x.stride()`, calls of `torch.ops.aten`, and numpy.
"""

import functools
import math
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import CodeType, FrameType
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from ftrain.graph.source import is_models, is_users
from ftrain.graph.torch_private import vmapped_dims
from ftrain.kernels.whole_batch import modes_are_watched
from ftrain.sharding.placement import Placement
from ftrain.trace import piece_reductions
from ftrain.trace.batch_mixing import BatchMixing
from ftrain.trace.divided_size import DividedSize, of_pieces, placement_of_sizes, shape_of, whole
from ftrain.trace.list_ops import one_by_one
from ftrain.trace.piece_reductions import REDUCTIONS
from ftrain.trace.piece_views import cut_dim, reshaped
from ftrain.trace.provenance import current_provenance
from ftrain.trace.refusals import Untraceable
from ftrain.trace.spmd import ShardedTrace, spread_of
from ftrain.trace.spread import Spread, share_ranks
from ftrain.trace.whole_arrays import WholeArrays

_METHODS = (
    Tensor.__len__.__code__.co_filename, torch.functional.__file__, torch.overrides.__file__, torch._ops.__file__,
    torch.library.CustomOpDef.__call__.__code__.co_filename,
)  # fmt: skip
"""Files of Python functions that call the mode themselves (`len(x)`, `broadcast_tensors`); they are no callers."""

_WAY_OUT = (
    "gather it (ftrain.optim.shards.whole_leaf, piece_of_leaf), or keep it whole on every rank with "
    "Layout(parameters=())"
)


class ArraySizes(TorchFunctionMode):
    """A mode in which the user's code reads the sizes of whole arrays.

    `trace`: the current trace for a rank. `arrays`: runs functions on whole arrays. Within its block, ValueError with
    the user's line for a view, an index or a slice that needs a gathered array where none can be gathered.
    """

    def __init__(self, trace: ShardedTrace) -> None:
        super().__init__()
        self._trace = trace
        self.arrays = WholeArrays(trace)
        self._batch = BatchMixing(trace.rows, self.arrays, trace.plan.mesh, trace.plan.order)

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        """Return the size of the array for a query; run any other function on pieces or arrays, or refuse it."""
        kwargs = kwargs or {}
        caller = _caller(sys._getframe(1))
        if func is torch.autograd.grad and not _is_ours(caller):
            self._batch.differentiate(args[0] if args else kwargs["outputs"])
        if func is Tensor.register_hook and not _is_ours(caller):
            args, kwargs = (args[0], self._batch.hooked(args[0], args[1] if len(args) > 1 else kwargs["hook"])), {}
        if _reads_arrays(caller.f_code.co_filename):
            if func in _QUERIES:
                placement = self._placement(args[0])
                return func(*args, **kwargs) if placement is None else _QUERIES[func](placement, *args, **kwargs)
            line = f"{caller.f_code.co_filename}:{caller.f_lineno}"
            run = partial(self._run, func, line=line)
            if is_models(caller.f_code.co_filename):
                return run(args, kwargs)
            return self._batch.call(func, run, args, kwargs, line)
        return func(*whole(args), **whole(kwargs))

    def _run(self, func: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any], *, line: str) -> Any:
        """A function on pieces of parameters."""
        if func in _VIEWS:
            return _VIEWS[func](self, func, args, kwargs, line)
        return self._call(func, whole(args), whole(kwargs))

    def _call(self, func: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
        """Run a function that is no view."""
        if not self.arrays.divided((args, kwargs)):
            return func(*args, **kwargs)
        each = one_by_one(func, args, kwargs)
        if each is not None:
            results = [self._call(*one) for one in each]
            return args[0] if func.__name__.endswith("_") else results
        return self.arrays.call(func, args, kwargs, instead=_of_its_parts(self, func))

    def _placement(self, tensor: Any) -> Placement | None:
        """The placement of the array that a tensor is a piece of; None for no piece and for parameters in a loss."""
        if not isinstance(tensor, Tensor) or tensor.requires_grad:
            return None
        placement = self._trace.placement_of_piece(tensor)
        if placement is None:
            return None
        for dim in vmapped_dims(tensor):
            placement = _without(placement, dim)
        provenance = current_provenance()
        if provenance is not None and provenance.phase != "step":  # experts are each rank's own in a loss
            placement = replace(placement, splits=tuple(s for s in placement.splits if s.gathered))
        return placement if placement.splits else None

    def _make(self, func: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any], line: str) -> Any:
        """Create a tensor: a piece if its sizes are those of a divided array, unless two dims share ranks."""
        first = 1 if args and isinstance(args[0], Tensor) else 0
        sizes, rest, options = _sizes(args[first:], kwargs, "size", filled=func in _FILLED)
        placement = placement_of_sizes(sizes)
        if not placement.splits or share_ranks(placement.splits):
            return func(*whole(args), **whole(kwargs))
        made = func(*args[:first], of_pieces(sizes), *whole(rest), **whole(options))
        if func not in _DRAWN:
            _note(self._trace, made, placement, uniform=True)
        return made

    def _expand(self, func: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any], line: str) -> Any:
        """Expand a tensor along dims of size 1; a tensor that is equal on all ranks becomes a piece."""
        del func
        source, (sizes, _, _) = args[0], _sizes(args[1:], kwargs, "size", "shape", "other")
        sizes = self._sizes_of(sizes)
        own, new = self._placement(source), len(sizes) - source.dim()
        held = {} if own is None else {split.dim + new: split for split in own.splits}
        given, splits = list(map(int, sizes)), dict(held)
        for dim, size in enumerate(sizes):
            if dim in held:
                given[dim] = -1 if size in (-1, own.shape[dim - new]) else size  # type: ignore[union-attr]
            elif isinstance(size, DividedSize) and (dim < new or source.shape[dim - new] == 1):
                given[dim], splits[dim] = size.piece, size.split._replace(dim=dim)
        expanded = source.expand(given)
        if len(splits) == len(held) or _is_own(spread_of(self._trace, source)):
            return expanded
        if share_ranks(splits.values()):
            raise Untraceable(f"expand at {line}: two dims would be divided among the same ranks: {_WAY_OUT}")
        shape = [
            own.shape[dim - new] if own is not None and dim in held else int(sizes[dim]) if dim in splits else size
            for dim, size in enumerate(expanded.shape)
        ]
        copies = placement_of_sizes(sizes).copies if own is None else own.copies
        placement = Placement(tuple(shape), tuple(splits[dim] for dim in sorted(splits)), copies)
        _note(self._trace, expanded, placement, of=[source], uniform=spread_of(self._trace, source).uniform)
        return expanded

    def _rows(self, func: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any], line: str) -> Any:
        """Iterate over rows."""
        return iter(self.arrays.call(Tensor.unbind, args, kwargs))

    def _broadcast(self, func: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any], line: str) -> Any:
        """`torch.broadcast_tensors`."""
        tensors = args[0] if len(args) == 1 and not isinstance(args[0], Tensor) else args
        sizes = list[int]()
        for tensor in tensors:
            own = list(self._sizes_of(tensor))
            sizes = [1] * (len(own) - len(sizes)) + sizes
            own = [1] * (len(sizes) - len(own)) + own
            sizes = [a if b == 1 else b for a, b in zip(sizes, own, strict=True)]
        return [self._expand(func, (tensor, sizes), kwargs, line) for tensor in tensors]

    def _view(self, func: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any], line: str) -> Any:
        """View a piece with the sizes of the array."""
        if _is_dtype(args[1:], kwargs):
            return func(*args, **kwargs)
        sizes, _, _ = _sizes(args[1:], kwargs, "size", "shape", "other")
        name = "view" if "view" in func.__name__ else "reshape"
        return self._viewed(name, args[0], self._sizes_of(sizes), line)

    def _unflatten(self, func: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any], line: str) -> Any:
        """Split one dim into several."""
        given = dict(zip(("dim", "sizes"), args[1:], strict=False)) | dict(kwargs)
        placement, dim = self._placement(args[0]), given["dim"]
        if placement is None or not isinstance(dim, int):
            open_size = isinstance(dim, int) and -1 in given["sizes"]
            if not open_size:
                return func(*whole(args), **whole(kwargs))
            dim, shape = dim % args[0].dim(), list(args[0].shape)  # a view, whose graph tells which size was left open
            return Tensor.view(args[0], [*shape[:dim], *whole(list(given["sizes"])), *shape[dim + 1 :]])
        dim %= len(placement.shape)
        parts = _known(placement.shape[dim], list(given["sizes"]))
        return self._viewed("view", args[0], [*placement.shape[:dim], *parts, *placement.shape[dim + 1 :]], line)

    def _viewed(self, name: str, source: Tensor, sizes: Sequence[int], line: str) -> Any:
        view, placement = getattr(Tensor, name), self._placement(source)
        if placement is None:  # whole on every rank, or a rank's own
            return view(source, of_pieces(sizes) if _is_own(spread_of(self._trace, source)) else list(map(int, sizes)))
        after, lost = reshaped(placement, sizes)
        if any(split.gathered for split in lost):
            gathered = self.arrays.on_whole(view, (source, list(map(int, sizes))), {})
            if gathered is not None:
                return gathered
            raise Untraceable(
                f"{name} at {line}: a rank holds {list(source.shape)} of an array of {list(placement.shape)}, and as "
                f"{list(after.shape)} its divided dim {lost[0].dim} does not stay whole: {_WAY_OUT}"
            )
        if lost:
            return view(source, of_pieces(sizes))
        viewed = view(source, after.local_shape)
        if self._trace.placement_of_piece(viewed) != after:
            _note(self._trace, viewed, after, of=[source], uniform=spread_of(self._trace, source).uniform)
        return viewed

    def _sizes_of(self, sizes: Any) -> Sequence[int]:
        """The sizes, or those of a tensor that is given instead."""
        if not isinstance(sizes, Tensor):
            return sizes
        placement = self._placement(sizes)
        return sizes.shape if placement is None else shape_of(placement)

    def _index(self, func: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any], line: str) -> Any:
        """Read or write at an index."""
        placement = self._placement(args[0])
        dim = None if placement is None else cut_dim(placement, args[1])
        if placement is None or (dim is None and not _has_tensors(args[1])):
            return self.arrays.call(func, whole(args), whole(kwargs))
        if func is Tensor.__setitem__:
            if self.arrays.write_item(func, args[0], whole(args[1]), args[2]):
                return None
        elif (part := self.arrays.on_whole(func, whole(args), whole(kwargs))) is not None:
            return part
        if dim is None:
            return func(*whole(args), **whole(kwargs))
        raise _cut("an index (slice or select)", line, args[0], placement, dim)

    def _narrow(self, func: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any], line: str) -> Any:
        """`narrow` and `select`; a part of a divided dim is read from the gathered array."""
        given = dict(zip(("dim", "start", "length"), args[1:], strict=False)) | dict(kwargs)
        given.setdefault("start", given.pop("index", None))
        placement, dim = self._placement(args[0]), given["dim"]
        divided = set() if placement is None else {split.dim for split in placement.splits}
        if placement is None or not isinstance(dim, int) or dim % len(placement.shape) not in divided:
            return func(*whole(args), **whole(kwargs))
        dim %= len(placement.shape)
        size = placement.shape[dim]
        if given.get("length") != size or given["start"] not in (0, -size):
            part = self.arrays.on_whole(func, whole(args), whole(kwargs))
            if part is not None:
                return part
            raise _cut(f"{func.__name__} (a slice)", line, args[0], placement, dim)
        return args[0].view(args[0].shape) if "copy" not in func.__name__ else args[0].clone()


def _of_its_parts(mode: ArraySizes, func: Callable[..., Any]) -> Callable[..., Any] | None:
    """The replacement of a composite reduction by functions that work on pieces, run under this mode."""
    parts = REDUCTIONS.get(func)
    if parts is None:
        return None

    def run(*args: Any, **kwargs: Any) -> Any:
        with mode:
            return parts(*args, **kwargs)

    return run


def _has_tensors(index: Any) -> bool:
    """True for an index with tensors or lists, whose numbers are positions in the array."""
    return any(isinstance(part, Tensor | list) for part in (index if isinstance(index, tuple) else (index,)))


def _note(trace: ShardedTrace, made: Tensor, placement: Placement, *, of: Sequence[Tensor] = (), uniform: bool) -> None:
    if not vmapped_dims(made):  # a wrapped tensor has more dims
        trace.note_piece(made, placement, of=of, uniform=uniform)


def _is_own(spread: Spread) -> bool:
    """True for a value that may differ between ranks and is no piece of an array."""
    return spread.placement is None and (bool(spread.axes) or spread.batch)


def _size(placement: Placement, x: Tensor, dim: int | None = None) -> Any:
    shape = shape_of(placement)
    return shape if dim is None else shape[dim]


def _count(placement: Placement, x: Tensor) -> int:
    return math.prod(placement.shape)


_QUERIES: Mapping[Callable[..., Any], Callable[..., Any]] = {
    Tensor.shape.__get__: lambda placement, *_: shape_of(placement),  # type: ignore[attr-defined]
    Tensor.size: _size,
    Tensor.numel: _count,
    Tensor.nelement: _count,
    torch.numel: _count,
    Tensor.nbytes.__get__: lambda placement, x, *_: _count(placement, x) * x.itemsize,  # type: ignore[attr-defined]
    Tensor.__len__: lambda placement, x: placement.shape[0],
}
_DRAWN: set[Callable[..., Any]] = {torch.rand, torch.randn}
_FILLED: set[Callable[..., Any]] = {torch.full, Tensor.new_full}
_MAKERS: set[Callable[..., Any]] = {
    torch.zeros, torch.ones, torch.empty, Tensor.new_zeros, Tensor.new_ones, Tensor.new_empty, *_FILLED, *_DRAWN,
}  # fmt: skip
_RESHAPES = (Tensor.view, Tensor.reshape, torch.reshape, Tensor.view_as, Tensor.reshape_as)
_VIEWS: Mapping[Callable[..., Any], Callable[..., Any]] = {
    **dict.fromkeys(_MAKERS, ArraySizes._make),
    **dict.fromkeys((Tensor.expand, Tensor.expand_as, Tensor.broadcast_to, torch.broadcast_to), ArraySizes._expand),
    torch.broadcast_tensors: ArraySizes._broadcast,
    **dict.fromkeys(_RESHAPES, ArraySizes._view),
    **dict.fromkeys((Tensor.unflatten, torch.unflatten), ArraySizes._unflatten),
    **dict.fromkeys((Tensor.__getitem__, Tensor.__setitem__), ArraySizes._index),
    **dict.fromkeys((Tensor.narrow, torch.narrow, Tensor.narrow_copy, torch.narrow_copy), ArraySizes._narrow),
    **dict.fromkeys((Tensor.select, torch.select), ArraySizes._narrow),
    Tensor.__iter__: ArraySizes._rows,
}


def _sizes(
    args: Sequence[Any], kwargs: Mapping[str, Any], *names: str, filled: bool = False
) -> tuple[Any, Sequence[Any], Mapping[str, Any]]:
    """The sizes among a function's arguments, the positional arguments after them, and the other keyword arguments."""
    for name in names:
        if name in kwargs:
            return kwargs[name], args, {key: value for key, value in kwargs.items() if key != name}
    if filled or not args or not isinstance(args[0], int):
        return args[0] if args else (), args[1:], kwargs
    return tuple(args), (), kwargs


def _is_dtype(args: Sequence[Any], kwargs: Mapping[str, Any]) -> bool:
    return "dtype" in kwargs or (len(args) > 0 and isinstance(args[0], torch.dtype))


def _known(count: int, parts: list[int]) -> list[int]:
    """The sizes that a dim is split into, with -1 replaced by its value."""
    others = math.prod(part for part in parts if part != -1)
    return [count // others if part == -1 and others else part for part in parts]


def _without(placement: Placement, dim: int) -> Placement:
    splits = tuple(s._replace(dim=s.dim - int(s.dim > dim)) for s in placement.splits if s.dim != dim)
    return Placement((*placement.shape[:dim], *placement.shape[dim + 1 :]), splits, placement.copies)


def _cut(what: str, line: str, piece: Tensor, placement: Placement, dim: int) -> Untraceable:
    return Untraceable(
        f"{what} at {line} takes a part of dim {dim} of an array of {list(placement.shape)}, of which a rank holds "
        f"{list(piece.shape)}: {_WAY_OUT}"
    )


@functools.cache
def _reads_arrays(file: str) -> bool:
    """True for code that is written for whole arrays: the user's, and torch's in `_LIBRARY`."""
    return is_users(file) or file == piece_reductions.__file__ or file.startswith(_LIBRARY)


def _is_ours(frame: FrameType) -> bool:
    """True for code that the trainer calls, through torch's own."""
    here: FrameType | None = frame
    while here is not None and here.f_code.co_filename.startswith(_TORCH):
        here = here.f_back
    return here is not None and not is_users(here.f_code.co_filename)


_TORCH = str(Path(torch.__file__).parent) + os.sep
_LIBRARY = tuple(str(Path(torch.__file__).parent / name) + os.sep for name in ("nn", "optim", "distributions"))


def _caller(frame: FrameType) -> FrameType:
    """The frame that called the function, without the files of `_METHODS` and other modes that pass it on."""
    while frame.f_back is not None and _passes_on(frame.f_code):
        frame = frame.f_back
    return frame


def _passes_on(code: CodeType) -> bool:
    return code.co_filename in _METHODS or (code.co_name == "__torch_function__" and modes_are_watched())
