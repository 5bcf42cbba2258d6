"""How the arguments of a step are divided among the ranks of a mesh: the state by placements, the batch by rules."""

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from ftrain.sharding.batch import (
    BatchRows,
    BatchRule,
    Offsets,
    Replicated,
    Tokens,
    require_alike,
    require_whole_documents,
    share,
)
from ftrain.sharding.mesh import Mesh
from ftrain.sharding.placement import Placement
from ftrain.sharding.plan import Plan
from ftrain.sharding.processes import require_world, to_piece
from ftrain.sharding.spmd import coordinates
from ftrain.trace.spmd import Placements
from ftrain.trace.spread import SAME, Spread, Spreads, placed
from ftrain.trace.tracer import Aval, is_array

COORDINATES = "coordinates_3"
"""The path of the last input of a rank's graph: int64[3], its place on the axes replicate, shard and sequence."""


@dataclass(frozen=True)
class Argument:
    """How a leaf of the arguments is divided: a leaf of the state by its `placement`, a leaf of the batch by its
    `rule`.
    """

    path: str
    placement: Placement | None = None
    rule: BatchRule | None = None


class MeshArguments:
    """The arguments of a step with a plan. `batch`: the name of the argument that ranks divide among them.

    `document_ids`: the batch leaves that attention reads as document ids; a trace finds them.
    """

    def __init__(self, plan: Plan, placements: Placements, batch: str) -> None:
        self.plan, self.placements, self.batch = plan, placements, batch
        self.document_ids: set[str] = set()
        self._rules_used = False
        self._placed: dict[str, Placement] = {}

    def in_batch(self, path: str) -> bool:
        """True for the path of a leaf that ranks divide among them."""
        return path == self.batch or path.startswith(self.batch + ".")

    def rule(self, path: str) -> BatchRule:
        """The rule that divides the batch leaf at `path`. ValueError where two equally specific globs of the plan
        decide differently.
        """
        return self.plan.batch_rule(_within(self.batch, path))

    def require_rules_used(self, paths: Sequence[str]) -> None:
        """ValueError for a rule of the plan that matches none of these paths. Only the first batch is checked: a
        modality may be absent from a later one.
        """
        if paths and not self._rules_used:
            self.plan.require_batch([_within(self.batch, path) for path in paths])
            self._rules_used = True

    def argument(self, path: str, leaf: Any) -> Argument:
        """How the leaf at `path` of the whole arguments is divided. ValueError where it does not divide."""
        if not is_array(leaf):
            return Argument(path)
        if self.in_batch(path):
            return Argument(path, rule=self.rule(path))
        return Argument(path, placement=self.placements.of_global(path, tuple(leaf.shape)))

    def spread(self, path: str, leaf: Tensor, spreads: Spreads) -> Spread:
        """How an input of a rank's graph is spread over the mesh, by its path and its shape there.

        `leaf`: an input of any shape, of which only the shape is read.
        """
        if path == COORDINATES:
            return Spread(spreads.everywhere)
        if not self.in_batch(path):
            return placed(self.placement_of(path, tuple(leaf.shape)))
        rule = self.rule(path)
        if isinstance(rule, Replicated):
            return SAME
        if isinstance(rule, Offsets) and rule.of == "packs":
            return Spread(spreads.everywhere - {"sequence"})
        return Spread(spreads.everywhere)

    def placement_of(self, path: str, shape: tuple[int, ...]) -> Placement:
        """Where the pieces of a leaf are, of which a rank holds `shape`.

        `avals` remembers how the whole leaf was divided: a piece of size 1 may belong to a dim of 1 or to a divided
        one.
        """
        seen = self._placed.get(path)
        if seen is not None and seen.local_shape == shape:
            return seen
        return self.placements.of_local(path, shape)

    def avals(self, paths: Sequence[str], leaves: Sequence[Any]) -> list[Any]:
        """A rank's arguments as abstract values, from the `leaves` of a call and their `paths`. ValueError for a whole
        leaf on a mesh of processes that should be divided, and for leaves of the batch of which it is not known what
        they are.
        """
        self._placed = {
            path: self.placements.of_global(path, tuple(leaf.shape))
            for path, leaf in zip(paths, leaves, strict=True)
            if is_array(leaf) and not self.in_batch(path)
        }
        _require_alike(self, paths, leaves)
        if self.plan.mesh.kind == "process":
            require_world(self.plan.mesh)
            return [self._held_aval(path, leaf) for path, leaf in zip(paths, leaves, strict=True)]
        arguments = [self.argument(path, leaf) for path, leaf in zip(paths, leaves, strict=True)]
        tokens = _tokens(arguments, leaves)
        return [self._local_aval(a, leaf, tokens) for a, leaf in zip(arguments, leaves, strict=True)]

    def _held_aval(self, path: str, leaf: Any) -> Any:
        """The aval of what this process holds: of a DTensor its padded piece, of a plain tensor the tensor."""
        if not is_array(leaf):
            return leaf
        if self.in_batch(path):
            return Aval.of(leaf)
        return Aval(self._held_placement(path, leaf).local_shape, leaf.dtype, Aval.of(leaf).device)

    def held(self, path: str, leaf: Any) -> Any:
        """What this process's graph reads for the leaf of a call: of a DTensor its padded piece. ValueError for a whole
        tensor where the plan divides the leaf.
        """
        if not is_array(leaf) or self.in_batch(path):
            return leaf
        return to_piece(leaf, self._held_placement(path, leaf))

    def _held_placement(self, path: str, leaf: Any) -> Placement:
        placement = self.placements.of_global(path, tuple(leaf.shape))
        if placement.splits and not isinstance(leaf, DTensor | Aval):
            raise ValueError(
                f"leaf {path!r} is a whole tensor of shape {tuple(leaf.shape)}; on a mesh of processes it is divided "
                f"({placement.splits}): make the state with step.init, or divide a whole one with step.shard"
            )
        return placement

    def _local_aval(self, argument: Argument, leaf: Any, tokens: int) -> Any:
        if not is_array(leaf):
            return leaf
        if argument.placement is not None:
            return Aval(argument.placement.local_shape, leaf.dtype, Aval.of(leaf).device)
        example = torch.empty(tuple(leaf.shape), dtype=leaf.dtype, device="meta")
        assert argument.rule is not None
        if isinstance(argument.rule, Tokens | Offsets):
            part = _share(self.plan, example, argument, tokens, 0)
        else:
            part = _share(self.plan, torch.zeros_like(example, device="cpu"), argument, tokens, 0)
        return Aval(tuple(part.shape), leaf.dtype, Aval.of(leaf).device)

    def share(self, paths: Sequence[str], leaves: Sequence[Any]) -> list[Any]:
        """This process's share of a whole batch; on other meshes the leaves. ValueError for a leaf that does not
        divide, and for a cut document.
        """
        if self.plan.mesh.kind != "process":
            return list(leaves)
        rank = require_world(self.plan.mesh)
        names = [f"{self.batch}.{path}" if path else self.batch for path in paths]
        self.require_rules_used(names)
        arguments = [self.argument(path, leaf) for path, leaf in zip(names, leaves, strict=True)]
        _require_alike(self, names, leaves)
        _require_whole_documents(arguments, leaves, self.document_ids, self.plan.mesh)
        tokens = _tokens(arguments, leaves)
        return [
            _share(self.plan, leaf, a, tokens, rank).contiguous() if isinstance(leaf, Tensor) else leaf
            for a, leaf in zip(arguments, leaves, strict=True)
        ]

    def divided(self, paths: Sequence[str], leaves: Sequence[Any]) -> list[list[Tensor]]:
        """The graph inputs of every rank, from the whole leaves of a call, each in memory of its own. ValueError for a
        leaf that does not divide, and for a cut document.
        """
        arguments = [self.argument(path, leaf) for path, leaf in zip(paths, leaves, strict=True)]
        _require_whole_documents(arguments, leaves, self.document_ids, self.plan.mesh)
        tokens = _tokens(arguments, leaves)
        ranks = []
        for rank in range(self.plan.mesh.size):
            own = [
                self._piece(a, leaf, tokens, rank) for a, leaf in zip(arguments, leaves, strict=True) if is_array(leaf)
            ]
            ranks.append([*own, coordinates(self.plan.mesh, rank)])
        return ranks

    def _piece(self, argument: Argument, leaf: Tensor, tokens: int, rank: int) -> Tensor:
        if argument.placement is not None:
            return argument.placement.shard(leaf, self.plan.mesh, rank)
        return _share(self.plan, leaf, argument, tokens, rank).clone(memory_format=torch.contiguous_format)


def _require_whole_documents(
    arguments: Sequence[Argument], leaves: Sequence[Any], document_ids: Collection[str], mesh: Mesh
) -> None:
    """Check the leaves that hold document ids: those at `document_ids`, which attention has read, and those that are
    called `segments...`.
    """
    for argument, leaf in zip(arguments, leaves, strict=True):
        rule, name = argument.rule, argument.path.rpartition(".")[2]
        if not isinstance(rule, Tokens) or not isinstance(leaf, Tensor) or leaf.dim() <= rule.dim:
            continue
        if argument.path in document_ids or (name.startswith("segments") and leaf.dtype == torch.int64):
            require_whole_documents(leaf, path=argument.path, dim=rule.dim, mesh=mesh)


def _within(batch: str, path: str) -> str:
    """The path of a leaf within the batch."""
    return path.removeprefix(batch).removeprefix(".")


def _share(plan: Plan, leaf: Tensor, argument: Argument, tokens: int, rank: int) -> Tensor:
    assert argument.rule is not None
    order, mesh = plan.order, plan.mesh
    return share(leaf, argument.rule, path=argument.path, tokens=tokens, order=order, mesh=mesh, rank=rank)


def _tokens(arguments: Sequence[Argument], leaves: Sequence[Any]) -> int:
    """The number of tokens of the whole batch: the length of the first leaf that has one entry per token."""
    for argument, leaf in zip(arguments, leaves, strict=True):
        if isinstance(argument.rule, Tokens) and is_array(leaf) and len(leaf.shape) > argument.rule.dim:
            return int(leaf.shape[argument.rule.dim])
    return 0


def _require_alike(arguments: MeshArguments, paths: Sequence[str], leaves: Sequence[Any]) -> None:
    """ValueError for a batch leaf that no rule names and that has another number of entries than the others."""
    entries = {}
    for path, leaf in zip(paths, leaves, strict=True):
        if arguments.plan.mesh.size > 1 and is_array(leaf) and arguments.in_batch(path):
            within, rule = _within(arguments.batch, path), arguments.rule(path)
            divided = isinstance(rule, Tokens | BatchRows) and len(leaf.shape) > rule.dim
            if divided and not arguments.plan.names_batch_leaf(within):
                entries[path] = int(leaf.shape[rule.dim])  # type: ignore[union-attr]
    require_alike(entries, paths)
