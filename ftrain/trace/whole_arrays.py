"""Runs ops of a user's own update on whole arrays if a rank cannot compute them on its pieces.

A function of torch that a user's line calls first runs on the pieces. If the spread of its result has a cause (it read
a piece as if it were the array), or if sizes do not match, it runs again:

1. with the tensors that are whole on every rank cut to pieces, if that suffices (`piece - whole`, elementwise);
2. else with every piece gathered. The result is then whole on every rank, as on one device. It is cut again where it is
   combined with pieces, and where the step returns it as a divided leaf.

Neither changes a number, because a gathered array equals the array. This holds for every op that is a function of its
arguments; ops that draw random numbers are not run again. A view of a gathered array is a view of a copy. A later write
into the view, or into its base, would not reach the other, and is refused
(`require_no_lost_writes`).
"""

import functools
import types
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx

from ftrain import tree
from ftrain.graph.op_effects import Effect, effect_of
from ftrain.graph.source import user_source
from ftrain.graph.torch_private import (
    functional_transform,
    node_of,
    quiet_shape_rules,
    tracing_graph,
)
from ftrain.sharding.placement import Placement, Split
from ftrain.sharding.shards import piece_of, whole_of
from ftrain.trace.gathered_copies import GatheredCopies, last_node, tensors_in, writes_since
from ftrain.trace.provenance import current_provenance
from ftrain.trace.refusals import refusals_are_tries
from ftrain.trace.spmd import ShardedTrace, spread_of
from ftrain.trace.spread import SAME, placed

PURPOSE = "whole_array"
"""The purpose of the gathers of this file, in tables of bytes by purpose."""
LARGE = 64 * 2**20
"""A gather of more bytes than this gives a warning with the user's line."""
_MISFITS = (RuntimeError, IndexError, ValueError, TypeError)


class WholeArrays:
    """Runs functions of torch on pieces, or on whole arrays if necessary. `trace`: the current trace for a rank."""

    def __init__(self, trace: ShardedTrace) -> None:
        self._trace = trace
        self.copies = GatheredCopies()

    def call(
        self,
        func: Callable[..., Any],
        args: Sequence[Any],
        kwargs: Mapping[str, Any],
        *,
        instead: Callable[..., Any] | None = None,
    ) -> Any:
        """The result of `func` on one device: as a piece, or whole on every rank.

        `instead`: a function with the same result that is composed of ops that work on pieces.
        """
        pieces = [] if functional_transform() else [t for t in tensors_in((args, kwargs)) if self.placement(t)]
        if not pieces:
            return func(*args, **kwargs)
        if writes(func, kwargs):
            args, kwargs = self._fitting(args, kwargs)
            return func(*args, **kwargs)
        as_it_is = not reads_sizes(func) and not _in_a_loss()
        found = self._try(func, args, kwargs) if as_it_is else None
        if found is None and instead is not None and not _in_a_loss():
            found = self._try(instead, args, kwargs)
        if found is None and as_it_is:
            cut = self._cut_others(args, kwargs, pieces)
            found = None if cut is None else self._try(func, *cut)
        if found is None:
            found = self._try_on_whole(func, args, kwargs)
        return func(*args, **kwargs) if found is None else found[0]

    def on_whole(self, func: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
        """The result of `func` with all pieces gathered; None if they cannot be gathered."""
        gathered = self._gather_all(args, kwargs)
        if gathered is None:
            return None
        result = func(*gathered[0], **gathered[1])
        self.copies.note_views(result, args, kwargs, gathered)
        return result

    def divided(self, values: Any) -> bool:
        """True if `values`, a tree of arguments, contains a piece of an array."""
        return not functional_transform() and any(self.placement(t) for t in tensors_in(values))

    def placement(self, tensor: Any) -> Placement | None:
        """The placement of the array that a tensor is a piece of; None if it is no piece or must not be gathered."""
        found = self._trace.placement_of_piece(tensor)
        if found is None or tensor.requires_grad or not found.splits:
            return None
        return found if _may_gather(found) else None

    def whole(self, tensor: Tensor, *, fresh: bool = False) -> Tensor:
        """The whole array, of its placement's shape, of which `tensor` is a piece; another tensor is returned itself.

        An array is gathered once, unless something was written since. `fresh`: the result has memory of its own.
        """
        node, placement = node_of(tensor), self.placement(tensor)
        if node is None or placement is None:
            return tensor.clone() if fresh else tensor
        known = self.copies.of(node)
        if known is None or fresh:
            _warn_of_size(tensor, placement)
            gathered = whole_of(tensor, _all_gathered(placement), self._trace.plan.mesh, why=PURPOSE).contiguous()
            at = node_of(gathered)
            if fresh or at is None:
                return gathered
            self.copies.add(node, gathered, at)
            return gathered
        return known

    def piece(self, whole: Tensor, placement: Placement) -> Tensor:
        """A rank's piece, of the placement's local shape, of an array that all ranks hold whole."""
        cut = piece_of(whole, _all_gathered(placement))
        self._trace.note_if_clean(cut, placed(placement))
        return cut

    def write_item(self, func: Callable[..., Any], target: Tensor, index: Any, value: Any) -> bool:
        """Compute `target[index] = value` on the whole array that `target`, of any shape, is a piece of.

        False, without a write, if the array cannot be gathered.
        """
        placement = self.placement(target)
        if placement is None or functional_transform():
            return False
        copy = self.copies.written(target, value)
        whole = self.whole(target, fresh=True) if copy is None else copy.clone()
        func(whole, map_tensors(self.whole, index), map_tensors(self.whole, value))
        target.copy_(self.piece(whole, placement))
        return True

    def results(self, result: Any, where: Callable[[str, Sequence[int]], Placement]) -> Any:
        """The step's result, in which whole arrays that are divided leaves of the state are cut to this rank's piece.

        `where`: from a leaf's path and whole shape to its placement.
        """
        if self.copies.empty:
            return result

        def piece(path: str, leaf: Any) -> Any:
            if not isinstance(leaf, Tensor) or spread_of(self._trace, leaf) != SAME:
                return leaf
            placement = where(path, leaf.shape)
            return self.piece(leaf, placement) if placement.splits and placement.shape == tuple(leaf.shape) else leaf

        leaves, treedef = tree.flatten(result)
        return tree.unflatten(treedef, [piece(p, x) for p, x in zip(tree.paths(result), leaves, strict=True)])

    def _try_on_whole(
        self, func: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any]
    ) -> tuple[Any] | None:
        gathered = self._gather_all(args, kwargs)
        found = None if gathered is None else self._try(func, *gathered)
        if gathered is not None and found is not None:
            self.copies.note_views(found[0], args, kwargs, gathered)
        return found

    def _try(self, func: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any]) -> tuple[Any] | None:
        """The result, if it equals that of one device; else None, and the nodes of this run are removed."""
        graph = tracing_graph()
        before = None if graph is None else last_node(graph)
        try:
            with quiet_shape_rules(), refusals_are_tries():
                result = func(*args, **kwargs)
            cause = _cause(self._trace, result)
            if cause is None or effect_of(cause) is Effect.RANDOM or _cause(self._trace, (args, kwargs)) is not None:
                return (result,)
        except _MISFITS:
            result = None
        del result
        if before is not None:
            self.discard_after(before)
        return None

    def discard_after(self, node: fx.Node) -> None:
        """Remove all nodes after `node` from the trace, unless one of them writes."""
        last = last_node(node.graph)
        if any(True for _ in writes_since(node)):
            return
        self._trace.spreads.discard_after(node)
        erased = set[fx.Node]()
        while last is not node:
            before = last.prev
            node.graph.erase_node(last)
            erased.add(last)
            last = before
        self.copies.discard(erased)

    def _gather_all(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> tuple[Any, Any] | None:
        if not self.divided((args, kwargs)):
            return None
        return map_tensors(self.whole, args), map_tensors(self.whole, kwargs)

    def _cut_others(self, args: Any, kwargs: Any, pieces: Sequence[Tensor]) -> tuple[Any, Any] | None:
        """The arguments with whole tensors cut as the piece with most dims is divided; None if none can be cut."""
        model = max(filter(None, map(self.placement, pieces)), key=lambda p: len(p.shape))
        cut = False

        def fitting(tensor: Tensor) -> Tensor:
            nonlocal cut
            part = _part(self._trace, tensor, model)
            cut = cut or part is not None
            return tensor if part is None else self.piece(tensor, part)

        changed = map_tensors(fitting, args), map_tensors(fitting, kwargs)
        return changed if cut else None

    def _fitting(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> tuple[Any, Any]:
        """The arguments of a write, cut or gathered to match its target. A write cannot run twice."""
        target = args[0] if args else None
        model = self.placement(target) if isinstance(target, Tensor) else None
        if model is not None:
            return self._cut_others(args, kwargs, [target]) or (args, kwargs)  # type: ignore[list-item]
        if isinstance(target, Tensor) and spread_of(self._trace, target).placement is None:
            return (target, *map_tensors(self.whole, args[1:])), map_tensors(self.whole, kwargs)
        return args, kwargs


def _part(trace: ShardedTrace, tensor: Tensor, model: Placement) -> Placement | None:
    """The placement of a whole tensor that is combined elementwise with an array like `model`; None if uncut."""
    spread = spread_of(trace, tensor)
    if spread.axes or spread.placement is not None or tensor.requires_grad:
        return None
    shift = len(model.shape) - tensor.dim()
    splits = list[Split]()
    for split in model.splits:
        at = split.dim - shift
        if at >= 0 and tensor.shape[at] == model.shape[split.dim] > 1:
            splits.append(split._replace(dim=at))
    return Placement(tuple(tensor.shape), tuple(splits), model.copies) if splits else None


def _cause(trace: ShardedTrace, values: Any) -> fx.Node | None:
    return next((c for t in tensors_in(values) if (c := spread_of(trace, t).cause) is not None), None)


def _may_gather(placement: Placement) -> bool:
    return not _in_a_loss() or all(split.gathered for split in placement.splits)


def _warn_of_size(tensor: Tensor, placement: Placement) -> None:
    size = torch.Size(placement.shape).numel() * tensor.itemsize
    if size > LARGE:
        warnings.warn(
            f"{user_source()}: gathers an array of {list(placement.shape)} ({size / 2**20:.0f} MiB) on every rank, "
            f"as what it does cannot be done on pieces; compiled.bytes_moved() has such bytes as {PURPOSE!r}",
            stacklevel=2,
        )


def _in_a_loss() -> bool:
    """True within a loss, where only pieces of parameters that are gathered for the loss may be gathered."""
    provenance = current_provenance()
    return provenance is not None and provenance.phase != "step"


@functools.cache
def reads_sizes(func: Callable[..., Any]) -> bool:
    """True for a Python function of torch that computes with sizes, so that the sizes of a piece would be wrong."""
    return _reads_sizes(func, 3)


_SIZES = frozenset({"size", "shape", "numel", "nelement", "len"})
_ASKS_DIMS_ALONE = frozenset({torch.norm, Tensor.norm})
_LIBRARY = str(Path(torch.__file__).parent)


def _reads_sizes(func: Any, depth: int) -> bool:
    if func in _ASKS_DIMS_ALONE or not isinstance(func, types.FunctionType):
        return False
    if not func.__code__.co_filename.startswith(_LIBRARY):
        return False
    names = set(func.__code__.co_names)
    if names & _SIZES:
        return True
    called = (func.__globals__.get(name, getattr(torch, name, None)) for name in names)
    return depth > 0 and any(isinstance(f, types.FunctionType) and _reads_sizes(f, depth - 1) for f in called)


def writes(func: Callable[..., Any], kwargs: Mapping[str, Any]) -> bool:
    """True for a function that writes into an argument, judged by its name and keyword arguments."""
    name = getattr(func, "__name__", "")
    in_place = name.endswith("_") and not name.endswith("__")
    operator = name.startswith("__i") and name not in ("__iter__", "__invert__", "__index__", "__int__")
    return in_place or operator or name == "__setitem__" or kwargs.get("out") is not None or bool(kwargs.get("inplace"))


def _all_gathered(placement: Placement) -> Placement:
    return replace(placement, splits=tuple(split._replace(gathered=True) for split in placement.splits))


def map_tensors(change: Callable[[Tensor], Tensor], value: Any) -> Any:
    """A tree of arguments with `change` applied to each tensor."""
    if isinstance(value, Tensor):
        return change(value)
    if type(value) in (list, tuple):
        return type(value)(map_tensors(change, item) for item in value)
    return {key: map_tensors(change, item) for key, item in value.items()} if type(value) is dict else value
