"""A step on a mesh: what a rank's arguments are, the function that is traced for it, and how results come back.

On a *virtual* mesh a call takes and returns whole arrays: they are divided, all ranks run in lockstep, the pieces are
joined again. On a *process* mesh a call takes and returns what this process holds: leaves of the state as DTensors, its
own share of the batch as plain tensors.
"""

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx
from torch.distributed.tensor import DTensor

from ftrain import tree
from ftrain.bindings import bindings
from ftrain.compiled import Compiled
from ftrain.donation import give_away
from ftrain.lost_rank import naming_lost_ranks
from ftrain.op_effects import Effect, effect_of
from ftrain.refusals import in_words_of_a_mesh
from ftrain.sharded_trace import Placements, ShardedTrace, reduce_means, tracing_rank
from ftrain.spread import SAME, Spread, Spreads
from ftrain.spread_fixes import finish_reductions
from ftrain.trace import Aval, Traced, is_array
from kernels.primitive import bind
from sharding.batch import BatchRule, Offsets, Same, Tokens, require_whole_documents, share
from sharding.copies import Held, compare_processes
from sharding.heartbeat import Heartbeat
from sharding.placement import Placement
from sharding.plan import Plan
from sharding.processes import DeviceMeshes, open_groups, require_world, to_dtensor, to_piece
from sharding.spmd import coordinates

COORDINATES = "coordinates_3"


@dataclass(frozen=True)
class Argument:
    """How a leaf of the arguments is divided: `placement` for the state's, `rule` for the batch's."""

    path: str
    placement: Placement | None = None
    rule: BatchRule | None = None


class ShardedStep:
    """What a jitted function needs of its plan. `batch`: the name of the argument that ranks share out."""

    def __init__(self, plan: Plan, *, specs: Any = None, batch: str = "batch", overlap: bool = True) -> None:
        self.plan, self.batch, self.overlap = plan, batch, overlap
        self.placements = Placements(plan, plan.placements(specs) if specs is not None else None)
        self.document_ids: set[str] = set()
        """Batch leaves that attention takes for the ids of documents."""
        self._piece_shapes: set[tuple[int, ...]] = set()
        self._opened: set[Compiled] = set()
        self._compared: set[Compiled] = set()
        self._heartbeat: Heartbeat | None = None
        self._device_meshes: dict[str, DeviceMeshes] = {}

    def argument(self, path: str, leaf: Any) -> Argument:
        """How the leaf at `path` of the whole arguments is divided."""
        if not is_array(leaf):
            return Argument(path)
        if self._in_batch(path):
            return Argument(path, rule=self.plan.batch_rule(path.removeprefix(self.batch).removeprefix(".")))
        return Argument(path, placement=self.placements.of_whole(path, tuple(leaf.shape)))

    def local_function(self, fn: Callable, paths: Sequence[str]) -> Callable:
        """`fn` as a rank runs it, with the rank's coordinates as last argument; `Mean`s of its result are summed.

        `paths`: of the leaves of its arguments.
        """

        def local(*args: Any) -> Any:
            *own, coordinates_3 = args
            trace = ShardedTrace(self.placements, document_ids=self.document_ids)
            for path, leaf in zip(paths, tree.leaves(own), strict=True):
                if isinstance(leaf, Tensor):
                    batch = self._in_batch(path)
                    known = not batch and self.placements.parameter(path) is not None
                    spread = self._spread(path, leaf, trace.spreads)
                    trace.note_input(leaf, path, spread, parameter=known, batch=batch)
            everywhere = self._spread(COORDINATES, coordinates_3, trace.spreads)
            trace.note_input(coordinates_3, COORDINATES, everywhere, parameter=False, batch=True)
            trace.note_coordinates(coordinates_3)
            with tracing_rank(trace, coordinates_3), bind(bindings(trace)), in_words_of_a_mesh(self.plan.mesh.size):
                return reduce_means(fn(*own), trace)

        local.__name__ = getattr(fn, "__name__", "step")
        return local

    def local_arguments(self, paths: Sequence[str], leaves: Sequence[Any], treedef: Any) -> tuple:
        """A rank's arguments as abstract values, its coordinates last, from those of a call."""
        if self.plan.mesh.kind == "process":
            require_world(self.plan.mesh)
            own = [self._held_aval(path, leaf) for path, leaf in zip(paths, leaves, strict=True)]
        else:
            arguments = [self.argument(path, leaf) for path, leaf in zip(paths, leaves, strict=True)]
            tokens = self._tokens(arguments, leaves)
            own = [self._local_aval(a, leaf, tokens) for a, leaf in zip(arguments, leaves, strict=True)]
        return (*tree.unflatten(treedef, own), Aval((3,), torch.int64, torch.device("cpu")))

    def _spread(self, path: str, leaf: Tensor, spreads: Spreads) -> Spread:
        """How an input of a rank's graph is spread, by its path and its shape there."""
        if path == COORDINATES:
            return Spread(spreads.everywhere)
        if not self._in_batch(path):
            return spreads.of_placement(self.placements.of_local(path, tuple(leaf.shape)))
        rule = self.plan.batch_rule(path.removeprefix(self.batch).removeprefix("."))
        if isinstance(rule, Same):
            return SAME
        if isinstance(rule, Offsets) and rule.of == "packs":
            return Spread(spreads.everywhere - {"sequence"})
        return Spread(spreads.everywhere)

    def settle(self, traced: Traced) -> list[Placement]:
        """Finish reductions over divided dims, and tell where each result's pieces are.

        ValueError, with the line, for a result that is not the same as one device's: what differs between ranks, or
        was computed from one rank's piece of an array.
        """
        mesh = self.plan.mesh
        spreads = Spreads(mesh)
        inputs = [n for n in traced.module.graph.nodes if n.op == "placeholder"]
        for node, path in zip(inputs, traced.input_paths, strict=True):
            spreads.give(node, self._spread(path, node.meta["val"], spreads))
            node.meta["coordinates"] = path == COORDINATES
        held = (spreads.of(node).placement for node in inputs)
        self._piece_shapes = {p.local_shape for p in held if p is not None and len(p.local_shape) > 0}
        outputs = traced.module.graph.output_node().args[0]
        found = [
            self._placed(path, node, spreads.of(node))
            for path, node in zip(traced.output_paths, outputs, strict=True)  # type: ignore[arg-type]
        ]
        finish_reductions(list(spreads.fixes.values()), mesh)
        return found

    def _placed(self, path: str, node: fx.Node, spread: Spread) -> Placement:
        if spread.cause is not None:
            raise ValueError(_misread(path, spread.cause))
        shape = tuple(node.meta["val"].shape)
        if spread.placement is not None:
            return spread.placement
        if spread.axes:
            raise ValueError(
                f"result {path!r} must be the same on all ranks, and was computed from one rank's data (the last op is "
                f"at {node.meta.get('site')}): return it as a Mean(total, count), or add it up with "
                "kernels.mean.sum_over_batch"
            )
        if not spread.uniform:
            return Placement(shape)
        placement = self.placements.of_local(path, shape)
        if not placement.splits and shape in self._piece_shapes:
            raise ValueError(
                f"result {path!r} is a constant of shape {list(shape)} (made at {node.meta.get('site')}), and so is a "
                "rank's piece of an array: make it like its leaf (torch.zeros_like(leaf)), or keep it in another shape"
            )
        return placement

    def run(self, compiled: Compiled, leaves: list[Any]) -> Any:
        """Run the compiled step on the leaves of a call's arguments."""
        kind = self.plan.mesh.kind
        if kind == "fake":
            raise ValueError("a fake mesh has shapes only: lower the step, or run it on a virtual or process mesh")
        runs = self._run_virtual if kind == "virtual" else self._run_process
        return compiled.traced.assemble(runs(compiled, leaves))

    def _run_virtual(self, compiled: Compiled, leaves: list[Any]) -> list[Tensor]:
        results = compiled.run_ranks(self.divided(compiled, leaves), self.plan.mesh)
        slots = compiled.donated_slots
        give_away([leaves[slot] for slot in slots], [compiled.leaf_paths[slot] for slot in slots])
        columns = zip(compiled.traced.output_paths, compiled.placements, zip(*results, strict=True), strict=True)
        return [self._join(*column) for column in columns]

    def flat_inputs(self, compiled: Compiled, leaves: list[Any]) -> list[Any]:
        """What this process's graph takes for the leaves of a call's arguments; its groups are open after this."""
        mesh = self.plan.mesh
        if mesh.kind != "process":
            raise ValueError(f"on a {mesh.kind} mesh no process runs a graph of its own; use a mesh of processes")
        rank = require_world(mesh)
        if compiled not in self._opened:
            open_groups(mesh, compiled.groups())
            self._opened.add(compiled)
        if self._heartbeat is None and mesh.size > 1:
            self._heartbeat = Heartbeat()
        own = [
            to_piece(leaf, self.placements.of_whole(path, leaf.shape)) if is_array(leaf) else leaf
            for path, leaf in zip(compiled.leaf_paths, leaves, strict=False)
        ]
        return [*own, coordinates(mesh, rank)]

    def _run_process(self, compiled: Compiled, leaves: list[Any]) -> list[Tensor]:
        rank, mesh = require_world(self.plan.mesh), self.plan.mesh
        own = self.flat_inputs(compiled, leaves)
        if compiled not in self._compared and mesh.size > 1:
            self._compared.add(compiled)
            self._compare(compiled, own)
        with naming_lost_ranks(lambda: compiled.running, self._heartbeat):
            outputs = compiled.run_flat(own)
        found = []
        for placement, piece in zip(compiled.placements, outputs, strict=True):
            found.append(to_dtensor(piece, placement, mesh, rank, self._meshes(piece.device.type)))
        return found

    def _compare(self, compiled: Compiled, own: Sequence[Any]) -> None:
        """Before the first run: copies of the state's leaves are equal, and not all ranks have one batch.

        ValueError names the leaf and two ranks; a batch that is everywhere the same is a warning.
        """
        held = [
            Held(path, piece, None if self._in_batch(path) else self.placements.of_local(path, tuple(piece.shape)))
            for path, piece in zip(compiled.leaf_paths, own, strict=False)
            if isinstance(piece, Tensor) and path != COORDINATES
        ]
        differs, same_batch = compare_processes(held, self.plan.mesh)
        if differs is not None:
            raise ValueError(
                f"leaf {differs.path!r} must be the same on ranks {' and '.join(map(str, differs.ranks))}, and is not: "
                "make the state with step.init, which gives all ranks the same numbers, load it everywhere from one "
                "checkpoint, or send it from one rank to the others before"
            )
        if same_batch:
            warnings.warn(
                "every rank was given the same batch, so that all compute the same: give each its own, or its share "
                "of a whole one (step.share(batch))",
                stacklevel=6,
            )

    def _meshes(self, device_type: str) -> DeviceMeshes:
        if device_type not in self._device_meshes:
            self._device_meshes[device_type] = DeviceMeshes(self.plan.mesh, device_type)
        return self._device_meshes[device_type]

    def _held_aval(self, path: str, leaf: Any) -> Any:
        """Of what this process holds: of a DTensor its padded piece; of a plain tensor the tensor."""
        if not is_array(leaf):
            return leaf
        if self._in_batch(path):
            return Aval.of(leaf)
        placement = self.placements.of_whole(path, tuple(leaf.shape))
        if placement.splits and not isinstance(leaf, DTensor | Aval):
            raise ValueError(
                f"leaf {path!r} is a whole tensor of shape {tuple(leaf.shape)}; on a mesh of processes it is divided "
                f"({placement.splits}): make the state with step.init, or divide a whole one with step.shard"
            )
        return Aval(placement.local_shape, leaf.dtype, Aval.of(leaf).device)

    def shard(self, paths: Sequence[str], leaves: Sequence[Any]) -> list[Any]:
        """What this process holds of whole leaves that are equal on all processes; on other meshes the leaves."""
        mesh = self.plan.mesh
        if mesh.kind != "process":
            return list(leaves)
        rank = require_world(mesh)
        found = []
        for path, leaf in zip(paths, leaves, strict=True):
            placement = self.placements.of_whole(path, tuple(leaf.shape)) if isinstance(leaf, Tensor) else None
            if placement is None or not placement.splits:
                found.append(leaf)
            else:
                piece = placement.shard(leaf, mesh, rank)
                found.append(to_dtensor(piece, placement, mesh, rank, self._meshes(leaf.device.type)))
        return found

    def abstract(self, paths: Sequence[str], leaves: Sequence[Any], device_type: str) -> list[Any]:
        """As `shard`, of whole leaves that are shapes alone: DTensors around meta tensors, unpadded."""
        mesh = self.plan.mesh
        if mesh.kind != "process":
            return list(leaves)
        rank = require_world(mesh)
        found = []
        for path, leaf in zip(paths, leaves, strict=True):
            placement = self.placements.of_whole(path, tuple(leaf.shape)) if isinstance(leaf, Tensor) else None
            if placement is None or not placement.splits:
                found.append(leaf)
            else:
                piece = torch.empty(placement.local_shape, dtype=leaf.dtype, device="meta")
                found.append(to_dtensor(piece, placement, mesh, rank, self._meshes(device_type)))
        return found

    def share(self, paths: Sequence[str], leaves: Sequence[Any]) -> list[Any]:
        """This process's share of a whole batch; on other meshes the leaves."""
        if self.plan.mesh.kind != "process":
            return list(leaves)
        rank = require_world(self.plan.mesh)
        names = [f"{self.batch}.{path}" if path else self.batch for path in paths]
        arguments = [self.argument(path, leaf) for path, leaf in zip(names, leaves, strict=True)]
        self._require_whole_documents(arguments, leaves)
        tokens = self._tokens(arguments, leaves)
        return [
            self._share(leaf, a, tokens, rank).contiguous() if isinstance(leaf, Tensor) else leaf
            for a, leaf in zip(arguments, leaves, strict=True)
        ]

    def _require_whole_documents(self, arguments: Sequence[Argument], leaves: Sequence[Any]) -> None:
        """Of leaves that tell documents by ids: those that attention has read, and those of the usual name."""
        for argument, leaf in zip(arguments, leaves, strict=True):
            rule, name = argument.rule, argument.path.rpartition(".")[2]
            if not isinstance(rule, Tokens) or not isinstance(leaf, Tensor) or leaf.dim() <= rule.dim:
                continue
            if argument.path in self.document_ids or (name.startswith("segments") and leaf.dtype == torch.int64):
                require_whole_documents(leaf, path=argument.path, dim=rule.dim, mesh=self.plan.mesh)

    def _in_batch(self, path: str) -> bool:
        return path == self.batch or path.startswith(self.batch + ".")

    def _local_aval(self, argument: Argument, leaf: Any, tokens: int) -> Any:
        if not is_array(leaf):
            return leaf
        if argument.placement is not None:
            return Aval(argument.placement.local_shape, leaf.dtype, Aval.of(leaf).device)
        example = torch.empty(tuple(leaf.shape), dtype=leaf.dtype, device="meta")
        assert argument.rule is not None
        if isinstance(argument.rule, Tokens | Offsets):
            part = self._share(example, argument, tokens, 0)
        else:
            part = self._share(torch.zeros_like(example, device="cpu"), argument, tokens, 0)
        return Aval(tuple(part.shape), leaf.dtype, Aval.of(leaf).device)

    def divided(self, compiled: Compiled, leaves: Sequence[Any]) -> list[list[Tensor]]:
        """What the graph of every rank takes, from the whole leaves of a call; each in memory of its own."""
        arguments = [self.argument(path, leaf) for path, leaf in zip(compiled.leaf_paths, leaves, strict=False)]
        self._require_whole_documents(arguments, leaves)
        tokens = self._tokens(arguments, leaves)
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
        return self._share(leaf, argument, tokens, rank).clone(memory_format=torch.contiguous_format)

    def _share(self, leaf: Tensor, argument: Argument, tokens: int, rank: int) -> Tensor:
        assert argument.rule is not None
        mesh, order = self.plan.mesh, self.plan.order
        return share(leaf, argument.rule, path=argument.path, tokens=tokens, order=order, mesh=mesh, rank=rank)

    def _tokens(self, arguments: Sequence[Argument], leaves: Sequence[Any]) -> int:
        """How many tokens the whole batch has: by the first leaf that has one entry per token."""
        for argument, leaf in zip(arguments, leaves, strict=True):
            if isinstance(argument.rule, Tokens) and is_array(leaf) and len(leaf.shape) > argument.rule.dim:
                return int(leaf.shape[argument.rule.dim])
        return 0

    def _join(self, path: str, placement: Placement, pieces: Sequence[Tensor]) -> Tensor:
        """The whole leaf of the result at `path` from all ranks' pieces; replicas are compared."""
        self._require_copies(path, placement, pieces)
        return placement.join(pieces, self.plan.mesh)

    def _require_copies(self, path: str, placement: Placement, pieces: Sequence[Tensor]) -> None:
        first: dict[tuple, tuple[int, Tensor]] = {}
        for rank, piece in enumerate(pieces):
            other, copy = first.setdefault(placement.windows(self.plan.mesh, rank), (rank, piece))
            if copy is not piece and not torch.equal(copy.nan_to_num(), piece.nan_to_num()):
                off = (copy.double() - piece.double()).abs().max().item()
                raise ValueError(
                    f"result {path!r} must be the same on ranks {other} and {rank} and differs by up to {off:.3g}: it "
                    "was computed from one rank's data; return it as a Mean(total, count), or add it up with "
                    "kernels.mean.sum_over_batch"
                )


def _misread(path: str, cause: fx.Node) -> str:
    """Why a result that depends on one rank's piece is refused."""
    name = str(cause.target).removeprefix("aten.").removesuffix(".default")
    if effect_of(cause) is Effect.RANDOM:
        return (
            f"result {path!r} is not what one device computes: {name} at {cause.meta.get('site')} draws with torch's "
            "own generator, on each rank other numbers: draw with a key (kernels.pack.draw_over_batch for rows of the "
            "batch), or leave it out on a mesh (module.eval(), p=0)"
        )
    return (
        f"result {path!r} is not what one device computes: {name} at {cause.meta.get('site')} reads a whole array, and "
        "a rank holds a piece of it. Inside of a loss, pass the array to value_and_grad or ftrain.forward as an "
        "argument; numbers for rows of the batch come from kernels.pack.draw_over_batch; in an update of your own, "
        "gather it (ftrain.optim.shards.whole_leaf, piece_of_leaf), or keep it whole on every rank with "
        "Layout(parameters=())"
    )
