"""A step on a mesh: the function that is traced for a rank, how it runs, and how results come back.

On a *virtual* mesh a call takes and returns whole arrays: they are divided, all ranks run in lockstep, and the pieces
are joined. On a *process* mesh a call takes and returns what this process holds: leaves of the state as DTensors, its
own share of the batch as plain tensors.
"""

import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, fx
from torch.distributed.tensor import DTensor

from ftrain import tree
from ftrain.graph.collectives import groups_of
from ftrain.graph.op_effects import draws
from ftrain.graph.torch_memory import storage_id
from ftrain.kernels.mean import Mean
from ftrain.kernels.primitive import bind
from ftrain.runtime.donation import give_away
from ftrain.runtime.half_new import mark_half_new
from ftrain.runtime.lost_rank import naming_lost_ranks
from ftrain.sharding.copies import Held, compare_processes
from ftrain.sharding.heartbeat import Heartbeat
from ftrain.sharding.joint_calls import joint_call
from ftrain.sharding.placement import Placement
from ftrain.sharding.plan import Plan
from ftrain.sharding.private import local_of
from ftrain.sharding.processes import PIECE, open_groups, require_world
from ftrain.sharding.spmd import coordinates
from ftrain.step.mesh_arguments import COORDINATES, MeshArguments
from ftrain.step.mesh_call import MeshCall
from ftrain.step.process_arrays import ProcessArrays
from ftrain.step.runner import Runner
from ftrain.trace.grad import require_tensors
from ftrain.trace.own_counts import require_own_counts
from ftrain.trace.piece_sizes import ArraySizes
from ftrain.trace.refusals import explain_mesh_sizes
from ftrain.trace.spmd import Placements, ShardedTrace, note_coordinates, note_rows, reduce_means, tracing_rank
from ftrain.trace.spmd_rules import bindings
from ftrain.trace.spread import Spread, Spreads
from ftrain.trace.spread_fixes import finish_reductions
from ftrain.trace.tracer import Aval, Traced


class ShardedStep:
    """What a jitted function needs of its plan.

    `specs`: tree of `ParamSpec`s, by whose paths placements are found. `batch`: the name of the argument that ranks
    divide. `overlap`: whether communication is hidden behind compute. `arguments`: the class that divides arguments.
    """

    def __init__(
        self,
        plan: Plan,
        *,
        specs: Any = None,
        batch: str = "batch",
        overlap: bool = True,
        arguments: Callable[[Plan, Placements, str], MeshArguments] = MeshArguments,
    ) -> None:
        self.plan, self.overlap = plan, overlap
        self.placements = Placements(plan, plan.placements(specs) if specs is not None else None)
        self.arguments = arguments(plan, self.placements, batch)
        self.arrays = ProcessArrays(plan.mesh, self.placements)
        self._piece_shapes: set[tuple[int, ...]] = set()
        self._calls: dict[Runner, MeshCall] = {}
        self._compared: set[Runner] = set()
        self._heartbeat: Heartbeat | None = None

    def local_function(self, fn: Callable[..., Any], paths: Sequence[str]) -> Callable[..., Any]:
        """`fn` as one rank runs it, with the rank's coordinates (int64[3]) as last argument. `Mean`s in its result are
        summed over ranks.

        `paths`: of the leaves of its arguments. ValueError for a rule of the plan that matches no leaf of the first
        batch.
        """
        self.arguments.require_rules_used([path for path in paths if self.arguments.in_batch(path)])

        def local(*args: Any) -> Any:
            *own, coordinates_3 = args
            trace = ShardedTrace(self.placements, document_ids=self.arguments.document_ids)
            for path, leaf in zip(paths, tree.leaves(own), strict=True):
                if isinstance(leaf, Tensor):
                    batch = self.arguments.in_batch(path)
                    is_parameter = not batch and self.placements.parameter_of(path) is not None
                    spread = self.arguments.spread(path, leaf, trace.spreads)
                    trace.note_input(leaf, path, spread, parameter=is_parameter, batch=batch)
                    if batch:
                        note_rows(trace, leaf, self.arguments.rule(path))
            everywhere = self.arguments.spread(COORDINATES, coordinates_3, trace.spreads)
            trace.note_input(coordinates_3, COORDINATES, everywhere, parameter=False, batch=True)
            note_coordinates(coordinates_3)
            with tracing_rank(trace, coordinates_3), bind(bindings(trace)), explain_mesh_sizes(self.plan.mesh.size):
                with ArraySizes(trace) as sizes:
                    result = fn(*own)
                means = [x for x in tree.flatten_until(result, Mean)[0] if isinstance(x, Mean)]
                for mean in means:
                    require_tensors(mean)
                sizes.arrays.copies.require_no_lost_writes(result)
                require_own_counts(means)
                return reduce_means(sizes.arrays.results(result, self.placements.of_global), trace)

        local.__name__ = getattr(fn, "__name__", "step")
        return local

    def local_arguments(self, paths: Sequence[str], leaves: Sequence[Any], treedef: Any) -> tuple[Any, ...]:
        """A rank's arguments as abstract values, its coordinates last, from the `leaves` of a call with their `paths`
        and `treedef`. ValueError for a whole leaf on a mesh of processes that should be divided.
        """
        own = self.arguments.avals(paths, leaves)
        return (*tree.unflatten(treedef, own), Aval((3,), torch.int64, torch.device("cpu")))

    def settle(self, traced: Traced) -> list[Placement]:
        """Finish reductions over divided dims in the trace, and return where the pieces of each result are.

        ValueError, with the user's line, for a result that is not what one device computes: it differs between ranks,
        or was computed from one rank's piece of an array.
        """
        mesh = self.plan.mesh
        spreads = Spreads(mesh)
        inputs = [n for n in traced.module.graph.nodes if n.op == "placeholder"]
        for node, path in zip(inputs, traced.input_paths, strict=True):
            spreads.set(node, self.arguments.spread(path, node.meta["val"], spreads))
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
                f"at {node.meta.get('source')}): return it as a Mean(total, count), or add it up with "
                "ftrain.kernels.mean.sum_over_batch"
            )
        if not spread.uniform:
            return Placement(shape)
        placement = self.placements.of_constant(path, shape)
        if not placement.splits and shape in self._piece_shapes:
            raise ValueError(
                f"result {path!r} is a constant of shape {list(shape)} (made at {node.meta.get('source')}), and so is "
                "a rank's piece of an array: make it like its leaf (torch.zeros_like(leaf)), or keep another shape"
            )
        return placement

    def matches_fast(
        self, runner: Runner, leaves: list[Any], treedef: Any, around: tuple[Any, ...] | None
    ) -> list[Any] | None:
        """The inputs of this process's graph, if the arguments are like those of the last call of `runner`; None
        otherwise.

        `leaves` with `treedef`: of a call's arguments. `around`: see `TraceCache.around`.
        """
        call = self._calls.get(runner)
        return None if call is None else call.inputs(leaves, treedef, around)

    def run(self, runner: Runner, leaves: list[Any], treedef: Any, inputs: list[Any] | None = None) -> Any:
        """Run a compiled step, and return the tree of the result.

        `leaves` with `treedef`: of a call's arguments. `inputs`: what `matches_fast` returned for them. ValueError on a
        fake mesh, for arguments that do not divide, for donated leaves that share memory, and for copies that differ
        between ranks. RuntimeError where a rank is lost.
        """
        kind = self.plan.mesh.kind
        if kind == "fake":
            raise ValueError("a fake mesh has shapes only: lower the step, or run it on a virtual or process mesh")
        if kind == "virtual":
            return runner.compiled.traced.assemble(self._run_virtual(runner, leaves))
        if inputs is not None:
            return self._run_process(runner, leaves, inputs, guard_passed=True)
        inputs = self.flat_inputs(runner, leaves)
        self._calls[runner].learn(leaves, treedef, inputs)
        return self._run_process(runner, leaves, inputs)

    def _run_virtual(self, runner: Runner, leaves: list[Any]) -> list[Tensor]:
        compiled = runner.compiled
        paths = compiled.signature.paths
        results = runner.run_ranks(self.arguments.divided(paths[:-1], leaves))
        slots = compiled.donated_leaves
        give_away([leaves[slot] for slot in slots], [paths[slot] for slot in slots])
        columns = zip(compiled.traced.output_paths, compiled.placements, zip(*results, strict=True), strict=True)
        return [self._join(*column) for column in columns]

    def flat_inputs(self, runner: Runner, leaves: list[Any]) -> list[Any]:
        """The inputs of this process's graph for the leaves of a call's arguments. The process groups that the graph
        uses are opened.

        ValueError on a mesh that is not of processes, and for a whole leaf that should be a DTensor.
        """
        mesh, compiled = self.plan.mesh, runner.compiled
        if mesh.kind != "process":
            raise ValueError(f"on a {mesh.kind} mesh no process runs a graph of its own; use a mesh of processes")
        rank = require_world(mesh)
        if self._heartbeat is None and mesh.size > 1:
            self._heartbeat = Heartbeat()
        own = [self.arguments.held(path, leaf) for path, leaf in zip(compiled.signature.paths, leaves, strict=False)]
        inputs = [*own, coordinates(mesh, rank)]
        if runner not in self._calls:
            open_groups(mesh, groups_of(compiled.graph))
            self._calls[runner] = MeshCall(compiled, self.arrays.wrap, inputs[-1])
        return inputs

    def _run_process(self, runner: Runner, leaves: list[Any], inputs: list[Any], *, guard_passed: bool = False) -> Any:
        compiled = runner.compiled
        call = self._calls[runner]
        first = runner not in self._compared and self.plan.mesh.size > 1
        if first or call.meets_others:
            joint_call(call.words)
        if first:
            self._compared.add(runner)
            self._compare(compiled.signature.paths, inputs)
        begun: list[bool] = []
        try:
            with naming_lost_ranks(lambda: runner.running, self._heartbeat):
                tensors, places = compiled.signature.tensors(inputs), compiled.signature.slots
                used, outputs = runner.run_flat(
                    tensors,
                    begun=begun,
                    guard_passed=guard_passed,
                    own_references=lambda slot: _references(leaves[places[slot]], tensors[slot]),
                )
            results = call.results(leaves, used, outputs)
            if call.renewed:
                runner.forget_holders()
        except BaseException as error:
            if begun:
                mark_half_new([leaves[i] for i in compiled.donated_leaves], compiled.donation.paths, error)
            raise
        return compiled.traced.assemble(results)

    def _compare(self, paths: Sequence[str], own: Sequence[Any]) -> None:
        """Before the first run: check that copies of the state's leaves are equal on all ranks, and that not all ranks
        have one batch.

        ValueError names the leaf and two ranks. A batch that is the same everywhere is a warning.
        """

        def placement(path: str, piece: Tensor) -> Placement | None:
            return None if self.arguments.in_batch(path) else self.arguments.placement_of(path, tuple(piece.shape))

        held = [
            Held(path, piece, placement(path, piece))
            for path, piece in zip(paths, own, strict=False)
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

    def _join(self, path: str, placement: Placement, pieces: Sequence[Tensor]) -> Tensor:
        """The whole leaf of the result at `path`, from the pieces of all ranks; copies are compared."""
        self._require_copies(path, placement, pieces)
        return placement.join(pieces, self.plan.mesh)

    def _require_copies(self, path: str, placement: Placement, pieces: Sequence[Tensor]) -> None:
        first: dict[tuple[tuple[int, int], ...], tuple[int, Tensor]] = {}
        for rank, piece in enumerate(pieces):
            other, copy = first.setdefault(placement.windows(self.plan.mesh, rank), (rank, piece))
            if copy is not piece and not torch.equal(copy.nan_to_num(), piece.nan_to_num()):
                off = (copy.double() - piece.double()).abs().max().item()
                raise ValueError(
                    f"result {path!r} must be the same on ranks {other} and {rank} and differs by up to {off:.3g}: it "
                    "was computed from one rank's data; return it as a Mean(total, count), or add it up with "
                    "ftrain.kernels.mean.sum_over_batch"
                )


def _references(leaf: Any, piece: Tensor) -> int | None:
    """How many references a DTensor holds to the memory of its padded piece. None for a DTensor that no step has
    made.
    """
    if not isinstance(leaf, DTensor):
        return 0
    if leaf.__dict__.get(PIECE) is not piece:
        return None if storage_id(local_of(leaf)) == storage_id(piece) else 0
    local = local_of(leaf)
    return 0 if local is piece else 1 + int(local._base is not None)


def _misread(path: str, cause: fx.Node) -> str:
    """The message for a result that depends on one rank's piece."""
    name = str(cause.target).removeprefix("aten.").removesuffix(".default")
    if draws(cause):
        return (
            f"result {path!r} is not what one device computes: {name} at {cause.meta.get('source')} draws with torch's "
            "own generator, on each rank other numbers: draw with a key (ftrain.kernels.pack.draw_over_batch for "
            "rows of the batch), or leave it out on a mesh (module.eval(), p=0)"
        )
    return (
        f"result {path!r} is not what one device computes: {name} at {cause.meta.get('source')} reads a whole array, "
        "and a rank holds a piece of it. Inside of a loss, pass the array to value_and_grad or ftrain.forward as an "
        "argument; numbers for rows of the batch come from ftrain.kernels.pack.draw_over_batch; in an update of your "
        "own, gather it (ftrain.optim.shards.whole_leaf, piece_of_leaf), or keep it whole on every rank with "
        "Layout(parameters=())"
    )
