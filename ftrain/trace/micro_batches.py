"""Divides a batch into micro-batches, by the rules that also divide it among ranks (`ftrain.sharding.batch`).

A whole batch consists of packs, one after the other: `micro_batches` of them for each data rank. So a batch that is
packed for micro-batches is also a valid batch for the plain loss. On a mesh with a sequence axis, the ranks of this
axis share the packs of a data rank: each holds a contiguous part of all packs together, but needs its part of every
single pack. Then these ranks first exchange the leaves of the batch.

Shapes: m micro-batches, P tokens of all packs of a data rank, T tokens of a pack, t of them on this rank, S ranks of
the sequence axis, N rows or documents.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from types import MappingProxyType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ftrain import tree
from ftrain.graph.torch_private import assert_on_device, node_of
from ftrain.kernels.documents import Documents
from ftrain.kernels.opaque import opaque_op
from ftrain.kernels.pack import draw_over_batch, pack_tokens
from ftrain.kernels.primitive import bind
from ftrain.kernels.random import Window
from ftrain.sharding.batch import (
    BatchRows,
    BatchRule,
    Offsets,
    Replicated,
    TokenIndices,
    Tokens,
    default_rule,
    may_be_missing,
    require_alike,
)
from ftrain.sharding.collectives import gather_pieces
from ftrain.sharding.exchange import draw_over_batch_sharded
from ftrain.sharding.paths import Rules
from ftrain.sharding.sequence_attention import from_pack_order, to_pack_order
from ftrain.sharding.spmd import axis_index
from ftrain.trace.spmd import ShardedTrace, batch_path, current_sharded, note_rows, spread_of
from ftrain.trace.spread import Spread


class MicroBatches(NamedTuple):
    """`leaves`: tensors with a leading dim of micro-batches. `put`: from one element of each to one micro-batch."""

    leaves: list[Tensor]
    put: Callable[[list[Tensor]], Any]


def stacked(batch: Any, count: int) -> MicroBatches:
    """The micro-batches of a batch whose leaves have a leading dim of `count` already.

    ValueError, with the path, for a leaf that does not.
    """
    for path, leaf in zip(tree.paths(batch), tree.leaves(batch), strict=True):
        if not isinstance(leaf, Tensor) or leaf.dim() == 0 or leaf.shape[0] != count:
            shape = tuple(leaf.shape) if isinstance(leaf, Tensor) else type(leaf).__name__
            raise ValueError(
                f"accumulate over {count} stacked micro-batches: batch leaf {path!r} has shape {shape}; its first dim "
                f"must be {count} (without stacked=True the batch is divided here)"
            )
    trace = current_sharded()
    rules = [
        _rule(path, leaf, Rules({}), trace) for path, leaf in zip(tree.paths(batch), tree.leaves(batch), strict=True)
    ]
    leaves, treedef = tree.flatten(batch)
    notes = [_RowNote.of(trace, leaf, _without_first_dim(rule)) for leaf, rule in zip(leaves, rules, strict=True)]

    def put(parts: list[Tensor]) -> Any:
        for part, note in zip(parts, notes, strict=True):
            note.on(part)
        return tree.unflatten(treedef, parts)

    return MicroBatches(leaves, put)


def divide(batch: Any, count: int, rules: Mapping[str, BatchRule] = MappingProxyType({})) -> MicroBatches:
    """Divide a batch, or a rank's share of one, into `count` micro-batches.

    A leaf follows the first rule that exists: in `rules` (by globs over paths), in the plan of the current trace, or
    the default: 0-d leaves and keys are the same in every micro-batch, others are divided along dim 0.

    ValueError, with the path, for a leaf that does not divide, for one without a rule that has another number of
    entries than the others, for a rule that matches no leaf, and for a batch without
    a divided leaf. When the step runs, a document that would be cut in two is a ValueError on a CPU, and an assertion
    on the device on CUDA.
    """
    trace = current_sharded()
    own = Rules(dict(rules), "accumulate(batch=...)", below=True)
    paths, leaves = tree.paths(batch), tree.leaves(batch)
    own.require_used(paths, unless=may_be_missing)
    found = [_rule(path, leaf, own, trace) for path, leaf in zip(paths, leaves, strict=True)]
    if trace is None:
        require_alike(_unnamed(paths, leaves, found, own), paths, rules=own.of)
    cut = _Division(count, _tokens(leaves, found), trace)
    made = [cut.leaf(path, leaf, rule) for path, leaf, rule in zip(paths, leaves, found, strict=True)]
    treedef = tree.flatten(_with_bound(batch, count, cut.ranks))[1]
    divided = [x for x, rule in zip(made, found, strict=True) if not isinstance(rule, Replicated)]
    rules_of_divided = (rule for rule in found if not isinstance(rule, Replicated))
    notes = [_RowNote.of(trace, x, rule) for x, rule in zip(divided, rules_of_divided, strict=True)]

    def put(parts: list[Tensor]) -> Any:
        for part, note in zip(parts, notes, strict=True):
            note.on(part)
        of = iter(parts)
        whole = [x if isinstance(rule, Replicated) else next(of) for x, rule in zip(made, found, strict=True)]
        return tree.unflatten(treedef, whole)

    if not divided:
        raise ValueError(f"accumulate over {count} micro-batches: no leaf of the batch is divided")
    return MicroBatches(divided, put)


def _rule(path: str, leaf: Any, own: Rules[BatchRule], trace: ShardedTrace | None) -> BatchRule:
    if not isinstance(leaf, Tensor) or leaf.dim() == 0:
        return Replicated()
    found = own.find(path)
    if found is not None:
        return found
    if trace is None:
        return default_rule(path)
    return trace.plan.batch_rule(batch_path(trace, leaf) or path)


class _RowNote(NamedTuple):
    """What a trace for a rank is told of a leaf of a micro-batch: its rows, in no order that one device shares."""

    trace: ShardedTrace | None
    spread: Spread
    rule: BatchRule

    @classmethod
    def of(cls, trace: ShardedTrace | None, leaf: Tensor, rule: BatchRule) -> "_RowNote":
        return cls(trace, Spread() if trace is None else Spread(spread_of(trace, leaf).axes), rule)

    def on(self, part: Tensor) -> None:
        node = node_of(part)
        if self.trace is not None and node is not None:
            self.trace.spreads.set(node, self.spread)
            note_rows(self.trace, part, self.rule, ordered=False)


def _without_first_dim(rule: BatchRule) -> BatchRule:
    return replace(rule, dim=rule.dim - 1) if isinstance(rule, Tokens | BatchRows) and rule.dim else rule


def _unnamed(
    paths: Sequence[str], leaves: Sequence[Any], rules: Sequence[BatchRule], own: Rules[BatchRule]
) -> dict[str, int]:
    """The entries of the divided leaves about which no rule says anything in particular."""
    return {
        path: int(leaf.shape[rule.dim])
        for path, leaf, rule in zip(paths, leaves, rules, strict=True)
        if isinstance(rule, Tokens | BatchRows) and leaf.dim() > rule.dim and not own.names(path)
    }


def _tokens(leaves: Sequence[Any], rules: Sequence[BatchRule]) -> int:
    """The number of tokens of a rank, from the first leaf with one entry per token; 0 if there is none."""
    sizes = (x.shape[r.dim] for x, r in zip(leaves, rules, strict=True) if isinstance(r, Tokens) and x.dim() > r.dim)
    return int(next(sizes, 0))


def _with_bound(batch: Any, count: int, ranks: int) -> Any:
    """The batch with the bound on documents' lengths lowered to what a micro-batch of `ranks` ranks has of them."""
    nodes, treedef = tree.flatten_until(batch, Documents)
    bounded = [
        replace(x, longest=min(x.longest, x.ids_T.shape[0] // count * ranks)) if isinstance(x, Documents) else x
        for x in nodes
    ]
    return tree.unflatten(treedef, bounded)


class _Division:
    """Divides the leaves of a rank's batch. `count`: m. `tokens`: the tokens of this rank. `ranks`: S."""

    def __init__(self, count: int, tokens: int, trace: ShardedTrace | None) -> None:
        self.count, self.tokens = count, tokens
        self.mesh = None if trace is None or trace.plan.mesh.sequence == 1 else trace.plan.mesh
        self.order = None if trace is None else trace.plan.order
        self.ranks = 1 if self.mesh is None else self.mesh.sequence

    def leaf(self, path: str, leaf: Any, rule: BatchRule) -> Any:
        """The leaf with a leading dim of micro-batches; by the rule `Replicated`, the leaf itself.

        ValueError, with the path, if the leaf does not divide by its rule.
        """
        if isinstance(rule, Replicated):
            return leaf
        if isinstance(rule, Offsets):
            return self._offsets(path, leaf, rule)
        if isinstance(rule, TokenIndices):
            self._require_divides(path, leaf, 0)
            whole = self._gathered(leaf, 0) if self.mesh is not None else leaf
            places_MN = _micro_places(whole, self.count, self.tokens * self.ranks, path)
            return places_MN if self.mesh is None else self._own_rows(places_MN)
        self._require_divides(path, leaf, rule.dim)
        tells = _tells_documents(path, leaf)
        if self.mesh is None:
            whole = _whole_documents(leaf, self.count, rule.dim, path) if tells else leaf
            return _first(whole.unflatten(rule.dim, (self.count, -1)), rule.dim)
        return self._exchanged(path, leaf, rule, tells=tells)

    def _require_divides(self, path: str, leaf: Tensor, dim: int) -> None:
        size = leaf.shape[dim] if leaf.dim() > dim else 0
        if leaf.dim() <= dim or size % self.count:
            share = "a rank's share of " if current_sharded() is not None else ""
            raise ValueError(
                f"accumulate over {self.count} micro-batches: {share}batch leaf {path!r} of shape {list(leaf.shape)} "
                f"does not divide: dim {dim} must be a multiple of {self.count}; pack to such a budget, or say how the "
                "leaf is divided, as accumulate(..., batch={"
                f"{path!r}: Tokens(dim) or Replicated()}})"
            )

    def _exchanged(self, path: str, leaf: Tensor, rule: Tokens | BatchRows, *, tells: bool) -> Tensor:
        """This rank's part of every single pack, exchanged among the ranks of the sequence axis."""
        whole = self._gathered(_first(leaf, rule.dim), 0)
        zigzag = isinstance(rule, Tokens)
        assert self.order is not None
        if zigzag:
            chunks = self.count * self.order.chunks
            if whole.shape[0] % chunks:
                raise ValueError(
                    f"accumulate over {self.count} micro-batches: batch leaf {path!r} has {whole.shape[0]} tokens for "
                    f"each data rank, which do not divide into {self.count} packs x {self.order.chunks} chunks"
                )
            whole = to_pack_order(whole, self.order)
        if tells:
            whole = _whole_documents(whole, self.count, 0, path)
        parts_MN = whole.unflatten(0, (self.count, -1))
        if zigzag:
            parts_MN = from_pack_order(parts_MN.movedim(1, 0), self.order).movedim(0, 1)
        own_MN = self._own_rows(parts_MN)
        return own_MN if rule.dim == 0 else own_MN.movedim(1, rule.dim + 1).contiguous()

    def _own_rows(self, parts_MN: Tensor) -> Tensor:
        """This rank's part of the second dim."""
        size = parts_MN.shape[1] // self.ranks
        mine_n = axis_index("sequence") * size + torch.arange(size)
        return parts_MN.index_select(1, mine_n.to(parts_MN.device))

    def _gathered(self, leaf: Tensor, dim: int) -> Tensor:
        assert self.mesh is not None
        group = self.mesh.group("sequence")
        if leaf.dtype == torch.bool:  # not every backend sends bools
            return gather_pieces(leaf.to(torch.uint8), group, dim, "micro_batches").to(torch.bool)
        return gather_pieces(leaf, group, dim, "micro_batches")

    def _offsets(self, path: str, offsets: Tensor, rule: Offsets) -> Tensor:
        """The offsets of each micro-batch, `[m, N]`; documents of other micro-batches have length zero."""
        if rule.dim:
            raise ValueError(f"accumulate divides offsets of documents along dim 0, not {rule.dim}: {path!r}")
        parts_m = torch.arange(self.count, device=offsets.device)
        if rule.of == "packs" or self.mesh is None:
            return _micro_offsets(offsets, parts_m, self.count, path)
        # offsets of all rows of the pack; part j * S + s belongs to micro-batch j on rank s
        starts_S1 = torch.arange(self.ranks, device=offsets.device)[:, None] * offsets[-1:]
        whole = (self._gathered(offsets[None], 0) + starts_S1).flatten().to(offsets.dtype)
        own_m = parts_m * self.ranks + axis_index("sequence").to(offsets.device)
        return _micro_offsets(whole, own_m, self.count * self.ranks, path)


def _first(x: Tensor, dim: int) -> Tensor:
    """The tensor with dim `dim` moved to the front, contiguous; for dim 0 the tensor itself."""
    return x if dim == 0 else x.movedim(dim, 0).contiguous()


def _tells_documents(path: str, leaf: Tensor) -> bool:
    """True if a leaf holds ids of documents: as a part of `Documents`, or by its name."""
    name = path.rpartition(".")[2]
    return leaf.dtype == torch.int64 and (name == "ids_T" or name.startswith("segments"))


@contextmanager
def drawing_as_one_batch(number: Tensor | None, count: int) -> Iterator[list[bool]]:
    """Within the block, `draw_over_batch` gives the rows of a micro-batch their numbers in the whole batch.

    `number`: the micro-batch's, 0-d int64, of `count`; None for the first. The yielded list is not empty after a draw.
    """
    drawn: list[bool] = []

    def draw(draw: Callable[..., Tensor], key: Tensor, shape: tuple[int, ...], *, dim: int = 0) -> Tensor:
        drawn.append(True)
        tokens = pack_tokens(shape[dim])

        def windowed(key: Tensor, whole: tuple[int, ...], window: Window | None = None) -> Tensor:
            window = window or Window((0,) * len(whole), whole)
            first = window.start[dim]
            at = first + (first // tokens * (count - 1) + (0 if number is None else number)) * tokens
            start = tuple(at if d == dim else s for d, s in enumerate(window.start))
            shape = tuple(n * count if d == dim else n for d, n in enumerate(whole))
            return draw(key, shape, window=Window(start, window.size))

        return _outer_draw()(windowed, key, shape, dim=dim)

    with bind({"draw_over_batch": draw}):
        yield drawn


def _outer_draw() -> Callable[..., Tensor]:
    """`draw_over_batch` outside of the loop: on a mesh it draws a rank's window of the numbers, else all of them."""
    trace = current_sharded()
    if trace is None or trace.plan.mesh.size == 1:
        return draw_over_batch.local  # type: ignore[attr-defined]
    return partial(draw_over_batch_sharded, mesh=trace.plan.mesh, order=trace.plan.order)


@opaque_op(
    "whole_documents(Tensor ids, int parts, int dim, str leaf) -> Tensor",
    fake=lambda ids, parts, dim, leaf: ids.new_empty(ids.shape),
)
def _whole_documents(ids: Tensor, parts: int, dim: int, leaf: str) -> Tensor:
    """A copy of the ids of documents.

    ValueError (on CUDA: an assertion on the device) if two of `parts` equal parts along `dim` share a document.
    """
    rows = ids.movedim(dim, 0)
    border_m = torch.arange(1, parts, device=ids.device) * (rows.shape[0] // parts)
    same_m = (rows.index_select(0, border_m) == rows.index_select(0, border_m - 1)).reshape(parts - 1, -1).all(1)
    _require_whole(~same_m, border_m, leaf)
    return ids.clone(memory_format=torch.contiguous_format)


@opaque_op(
    "micro_offsets(Tensor offsets, Tensor which, int parts, str leaf) -> Tensor",
    fake=lambda offsets, which, parts, leaf: offsets.new_empty(which.shape[0], offsets.shape[0]),
)
def _micro_offsets(offsets_N: Tensor, which_m: Tensor, parts: int, leaf: str) -> Tensor:
    """The offsets of documents in the parts `which_m` of `parts` equal parts, `[m, N]`, from the start of each part.

    Documents of other parts have length zero. ValueError (on CUDA: an assertion on the device) for a document in two
    parts.
    """
    step = torch.div(offsets_N[-1], parts, rounding_mode="floor")
    border_m = torch.arange(1, parts, device=offsets_N.device) * step
    _require_whole((offsets_N == border_m[:, None]).any(1), border_m, leaf)
    return (offsets_N - which_m[:, None] * step).clamp(min=0).minimum(step).to(offsets_N.dtype)


def _require_whole(whole_m: Tensor, border_m: Tensor, leaf: str) -> None:
    """ValueError for a document that crosses a border between parts; on CUDA an assertion on the device."""
    parts = len(whole_m) + 1
    advice = (
        "it would be cut in two. A batch is one pack after the other, one for each micro-batch of each data rank: pack "
        "documents so that none lies in two (ftrain.modules.mesh_packing.pack_for_mesh(packs=micro-batches x data "
        "ranks), ftrain.modules.packs.join_packs), or, if two documents share the id, give one another"
    )
    what = f"accumulate: batch leaf {leaf!r}, divided in {parts}: a document goes on"
    if whole_m.is_cuda:
        assert_on_device(whole_m.all(), f"{what} where another part begins: {advice}")
    elif not bool(whole_m.all()):
        border = int(border_m[int((~whole_m).nonzero()[0, 0])])
        raise ValueError(f"{what} over token {border}, where another part begins: {advice}")


@opaque_op(
    "micro_places(Tensor place, int parts, int tokens, str leaf) -> Tensor",
    fake=lambda place, parts, tokens, leaf: place.new_empty(parts, place.shape[0] // parts),
)
def _micro_places(place_N: Tensor, parts: int, tokens: int, leaf: str) -> Tensor:
    """Token indices within each of `parts` equal parts, `[parts, N / parts]`, from indices in all `tokens`.

    The index `tokens` (no token) becomes the length of a part. ValueError (on CUDA: an assertion on the device) for a
    row whose token is in another part.
    """
    length = tokens // parts
    place_MN = place_N.unflatten(0, (parts, -1))
    local_MN = place_MN - torch.arange(parts, device=place_N.device)[:, None] * length
    nowhere_MN = place_MN == tokens
    wrong = (~nowhere_MN & ((local_MN < 0) | (local_MN >= length))).any()
    words = (
        f"accumulate over {parts} micro-batches: batch leaf {leaf!r}: a row is at a token of another micro-batch; "
        "a pack's rows and its tokens must be in the same part of the batch (ftrain.modules.mesh_packing)"
    )
    if place_N.is_cuda:
        assert_on_device(~wrong, words)
    elif bool(wrong):
        raise ValueError(words)
    return torch.where(nowhere_MN, length, local_MN)
