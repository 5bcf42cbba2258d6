"""A step made ready for given shapes: the graph after its passes, its plan, and the program that runs it."""

import operator
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx

from ftrain import tree
from ftrain.ambient import ambient, as_a_program
from ftrain.captured import captured_tensors
from ftrain.communication import bytes_moved
from ftrain.cost import Cost, graph_cost
from ftrain.cuda_allocator import CUBLAS_WORKSPACE, reserved_over_allocated, warn_without_expandable_segments
from ftrain.donation import give_away
from ftrain.execute import Program, as_executed, choose, compile_graph, waiting
from ftrain.layers import mark_layers
from ftrain.layouts import LayoutCheck, views_as_reshapes
from ftrain.leaf_guard import guard_like
from ftrain.liveness import MemoryPlan, plan_memory
from ftrain.loan import Fence, Loan
from ftrain.lockstep import groups_of, lockstep_program
from ftrain.loop import is_loop, loop_body
from ftrain.no_gradient import refusing
from ftrain.op_times import OpTimes
from ftrain.out_of_memory import explained, is_out_of_memory
from ftrain.overlap_budget import bytes_within
from ftrain.passes.bucket import bucket
from ftrain.passes.clean import clean
from ftrain.passes.donate import donate as donate_pass
from ftrain.passes.order import update_early
from ftrain.passes.sink import gather_chains, sink_gathers
from ftrain.passes.sizes import expect_sizes
from ftrain.passes.sum_early import sum_early
from ftrain.passes.waits import join_waits
from ftrain.precision import Precision
from ftrain.private import lazy_module
from ftrain.remat import Remat, rematerialize, require_matches
from ftrain.remat_fit import BookRow, book_table, fit
from ftrain.run_errors import name_line
from ftrain.schedule import Schedule, overlap, simulate_schedule
from ftrain.shared_memory import SharedMemory
from ftrain.trace import Aval, Traced, argument_paths, is_array, signature_of, spread_paths, trace
from sharding.link import Link
from sharding.mesh import Mesh
from sharding.placement import Placement


class Compiled:
    """What a call of a jitted function runs for arguments of one set of shapes."""

    def __init__(self, traced: Traced, treedef: Any, leaves: list[Any], paths: list[str], backend: str) -> None:
        self.traced = traced
        self.name = ""
        self.graph: fx.GraphModule = traced.module
        self.backend = backend
        self.seconds_to_compile = 0.0
        self.leaf_paths = paths
        self.leaf_signatures = [signature_of(leaf) for leaf in leaves]
        self.donated: dict[int, int] = {}
        self.book: list[BookRow] = []
        self.mesh: Mesh | None = None
        self.placements: list[Placement] = []
        self.link = Link()
        self.again: Callable[..., Compiled] | None = None
        self._treedef = treedef
        self._slots = [i for i, leaf in enumerate(leaves) if is_array(leaf)]
        self._shapes = [torch.Size(a.shape) for a in traced.input_avals]
        self._dtypes = [a.dtype for a in traced.input_avals]
        self._devices = [a.device for a in traced.input_avals]
        self._statics = [(i, leaf) for i, leaf in enumerate(leaves) if not is_array(leaf)]
        self.ambient = ambient()
        self._program: Program | None = None
        self._running: fx.GraphModule | None = None
        self._lockstep: Callable | None = None
        self._guard: Callable[..., bool] | None = None
        self._wants_gradients = False
        self._fence = Fence()

    def knows(self, leaves: list[Any], treedef: Any, around: tuple) -> bool:
        """True if such arguments were run before and need no closer look: they fit, and are contiguous.

        `around`: what `ambient` says of the call.
        """
        if self._guard is None or around != self.ambient or treedef != self._treedef or not self._same_statics(leaves):
            return False
        return self._guard(*self._tensors(leaves))

    def fits(self, leaves: list[Any], treedef: Any, around: tuple) -> bool:
        """True if arguments with these leaves and this structure can be run as they are, in a call amid `around`."""
        if treedef != self._treedef or around != self.ambient:
            return False
        if not self._same_statics(leaves):
            return False
        leaves = self._tensors(leaves)
        return (
            set(map(type, leaves)) <= _PLAIN
            and [*map(Tensor.size, leaves)] == self._shapes
            and [*map(_dtype_of, leaves)] == self._dtypes
            and [*map(_device_of, leaves)] == self._devices
        )

    def _same_statics(self, leaves: list[Any]) -> bool:
        return all(type(leaves[i]) is type(v) and leaves[i] == v for i, v in self._statics)

    def _tensors(self, leaves: list[Any]) -> list[Any]:
        return [leaves[i] for i in self._slots] if self._statics else leaves

    def expect(self, loans: Mapping[int, Loan]) -> None:
        """Of the leaves of the next call these are still read by somebody: by their positions in its arguments.

        The program waits for those that it writes over, before its first write; the others are waited for here.
        """
        if loans:
            donated = set(self.donated_slots)
            for slot, loan in loans.items():
                if slot not in donated:
                    loan.wait()
            self._fence.expect(loans.values())

    def run(self, leaves: list[Any], *, known: bool = False) -> Any:
        """Run on the flat leaves of real arguments and return the result's tree; `known`: what `knows` said of them."""
        tensors = self._tensors(leaves)
        if not known:
            self._wants_gradients = any(getattr(x, "requires_grad", False) for x in tensors)
            if self._program is not None:
                self._guard = guard_like(tensors) if all(map(Tensor.is_contiguous, tensors)) else None
        results = self.run_flat(leaves, contiguous=known)
        if self._wants_gradients and torch.is_grad_enabled():
            results = self._refusing(results)
        return self.traced.assemble(results)

    def _refusing(self, results: list[Tensor]) -> list[Tensor]:
        """The results, but for a new state in the memory of the old, refuse a backward from outside."""
        kept = set(self.donated.values())
        others = iter(refusing([x for i, x in enumerate(results) if i not in kept], self.name))
        return [x if i in kept else next(others) for i, x in enumerate(results)]

    def run_flat(self, leaves: list[Any], *, contiguous: bool = False) -> list[Tensor]:
        """Run on the flat leaves of real arguments and return the tensors of the result, in order.

        `contiguous`: the leaves are known to be.
        """
        leaves = self._tensors(leaves)
        if self._program is None:
            self._check_real(leaves)
            warn_without_expandable_segments(self.device)
            self._running = copy_graph(self.graph)
            self._program = compile_graph(
                self._running, self.backend, before_write=self._fence.wait, checked=self._mend
            )
        contiguous = contiguous or all(map(Tensor.is_contiguous, leaves))
        if self.donated:
            self._shared_memory.require_none(leaves, contiguous=contiguous)
        inputs = leaves if contiguous else [leaf.contiguous() for leaf in leaves]
        try:
            with as_a_program():
                outputs = self._program(inputs)
        except Exception as error:
            if isinstance(error, RuntimeError) and is_out_of_memory(error):
                raise explained(self, error) from None
            if self._running is not None:
                name_line(error, self._running)
            raise
        if self.donated:
            outputs = self._with_donated(leaves, inputs, outputs)
        return outputs

    @property
    def running(self) -> fx.GraphModule:
        """The graph whose generated code is run; before the first run the graph itself."""
        return self.graph if self._running is None else self._running

    def run_ranks(self, ranks: list[list[Tensor]], mesh: Mesh) -> list[list[Tensor]]:
        """Run all ranks of a virtual mesh in lockstep, on and to flat tensors; donated ones are written over."""
        self._fence.wait()
        if self._lockstep is None:
            self._lockstep = lockstep_program(self.interpreted, mesh)
        outputs = self._lockstep(ranks)
        if not self.donated:
            return outputs
        slots, _, order = self._donation
        found = [[*(own[slot] for slot in slots), *out] for own, out in zip(ranks, outputs, strict=True)]
        return [[out[i] for i in order] for out in found]

    def with_remat(self, remat: Remat) -> "Compiled":
        """The same step made ready again with another choice of what to recompute."""
        assert self.again is not None
        return self.again(remat=remat)

    def _mend(self, check: LayoutCheck) -> None:
        check.mend(self.graph)
        self.__dict__.pop("executed", None)
        self.__dict__.pop("interpreted", None)

    def use_program(self, program: Program) -> None:
        """Run another program for the same graph from now on, e.g. one that measures."""
        self._program = waiting(program, self._fence.wait)

    def groups(self) -> list[tuple[str, ...]]:
        """The axes of each group of ranks that the graph's collectives run over, in order of first use."""
        return groups_of(self.graph)

    @property
    def donated_slots(self) -> list[int]:
        """Which leaves of the arguments the step writes its new state over."""
        return [self._slots[slot] for slot in self.donated]

    def _with_donated(self, leaves: list[Tensor], inputs: list[Tensor], outputs: list[Tensor]) -> list[Tensor]:
        slots, paths, order = self._donation
        fresh = give_away([leaves[slot] for slot in slots], paths)
        if inputs is not leaves:
            fresh = [x if inputs[slot] is leaves[slot] else inputs[slot] for slot, x in zip(slots, fresh, strict=True)]
        found = fresh + outputs
        return [found[i] for i in order]

    @cached_property
    def _donation(self) -> tuple[list[int], list[str], list[int]]:
        """The donated slots, their paths, and where each output is in the list of donated leaves and other outputs."""
        slots = list(self.donated)
        place = {self.donated[slot]: i for i, slot in enumerate(slots)}
        others = iter(range(len(slots), len(self.traced.output_paths)))
        order = [place[i] if i in place else next(others) for i in range(len(self.traced.output_paths))]
        return slots, [self.traced.input_paths[slot] for slot in slots], order

    def _check_real(self, leaves: list[Any]) -> None:
        for path, leaf in zip(self.traced.input_paths, leaves, strict=True):
            if not isinstance(leaf, Tensor) or leaf.device.type == "meta":
                raise ValueError(f"leaf {path!r} has a shape and no data: this step can be lowered but not run on it")

    @cached_property
    def _shared_memory(self) -> SharedMemory:
        captured = {self.traced.name_of(x): x for x in captured_tensors(self.graph).values()}
        return SharedMemory(self.traced.input_paths, self.donated, captured)

    def memory(self) -> MemoryPlan:
        """Bytes alive over the run, the peak, and what is alive then; on CUDA also what is reserved for it."""
        plan = plan_memory(self.executed, round_to=self.granularity)
        if self.device.type != "cuda":
            return plan
        return replace(plan, libraries=CUBLAS_WORKSPACE, reserved_share=reserved_over_allocated())

    def cost(self) -> Cost:
        """FLOPs and bytes per node, and in all."""
        return graph_cost(self.graph)

    @cached_property
    def executed(self) -> fx.GraphModule:
        """The graph as it runs: writes in place; under a compiler, what it may fuse as one node each."""
        module = copy_graph(self.graph)
        as_executed(module, self.backend)
        return module

    @cached_property
    def interpreted(self) -> fx.GraphModule:
        """The graph as it runs op by op, whatever the backend."""
        module = copy_graph(self.graph)
        as_executed(module, "aten")
        views_as_reshapes(module)
        return module

    def as_text(self) -> str:
        """The graph, a line per node: name, type, op, and where it comes from."""
        from ftrain.text import graph_text

        return graph_text(self.executed)

    def report(self, file: str | Path) -> Path:
        """Write an HTML page about the step: totals, memory over time, costs, the graph."""
        from ftrain.report import write_report

        return write_report(self, Path(file))

    def schedule(self, link: Link | None = None) -> Schedule:
        """When each collective starts and ends, what it overlaps, and how long compute waits for it, on paper."""
        if self.mesh is None:
            return Schedule([], 0.0, 0.0, 0.0)
        return simulate_schedule(self.graph, self.mesh, times=OpTimes.on(self.device), link=link or self.link)

    def bytes_moved(self) -> dict[str, int]:
        """Bytes that a rank sends in one step, by purpose."""
        return {} if self.mesh is None else bytes_moved(self.graph, self.mesh)

    def remat_table(self) -> str:
        """The account book of recompute: each tensor that the backward needs, its MB, microseconds, their ratio, and
        whether it is kept; empty for a step without a budget.
        """
        return book_table(self.book) if self.book else "nothing is recomputed for a budget (see Remat)"

    @property
    def granularity(self) -> int:
        """Bytes to which the allocator rounds: 512 on CUDA; storages on a CPU are exact."""
        return 512 if self.device.type == "cuda" else 1

    @property
    def device(self) -> torch.device:
        """Where the arguments are."""
        return self._devices[0] if self._devices else torch.device("cpu")


# Built from C functions, since every call pays for each leaf.
_PLAIN = {Tensor, torch.nn.Parameter}
_dtype_of = operator.attrgetter("dtype")
_device_of = operator.attrgetter("device")


def compile_step(
    fn: Callable,
    args: tuple,
    names: Sequence[str],
    *,
    donate: int | None,
    backend: str,
    remat: Remat,
    precision: Precision | None,
    mesh: Mesh | None = None,
    settle: Callable[[Traced], list[Placement]] | None = None,
    link: Link = Link(),  # noqa: B008  # frozen
    hide_communication: bool = True,
) -> Compiled:
    """Trace `fn(*args)` and run the passes: clean, rematerialize, update early, donate; on a mesh those of overlap.

    `settle`: on a mesh, what finishes the trace for a rank and tells where each result's pieces are.
    """
    leaves, treedef = tree.flatten(args)
    traced = trace(fn, args, names, precision=precision)
    device = traced.input_avals[0].device if traced.input_avals else torch.device("cpu")
    compiled = Compiled(traced, treedef, leaves, argument_paths(args, names), choose(backend, device))
    compiled.name = name_of(fn)
    compiled.again = partial(
        compile_step, fn, tree.map(_abstract, args), names, donate=donate, backend=backend, precision=precision,
        mesh=mesh, settle=settle, link=link, hide_communication=hide_communication,
    )  # fmt: skip
    if settle is not None:
        compiled.placements = settle(traced)
    module = traced.module
    join_waits(module)
    clean(module)
    expect_sizes(module)
    if mesh is not None:
        sink_gathers(module)
        sum_early(module)
    spread_paths(module, names[0] if names else "")
    mark_layers(module, dict(zip(traced.input_paths, traced.input_avals, strict=True)))
    compiled.donated = {} if donate is None else match_donated(traced, args[donate], names[donate])
    inputs = [n.name for n in module.graph.nodes if n.op == "placeholder"]
    by_name = {inputs[slot]: output for slot, output in compiled.donated.items()}
    require_matches(module, remat)
    rematerialize(module, remat, gathers=gather_chains)
    if mesh is not None:
        bucket(module, limit=link.bucket_bytes)
    update_early(module, by_name)
    if remat.by_price or remat.offloads_paths:
        if backend == "cudagraph" and (remat.offload is not None or remat.offloads_paths):
            raise ValueError(f"{remat}: copies to the host are not captured in a CUDA graph; take backend='inductor'")

        def finished_peak(trial: fx.GraphModule) -> int:
            donate_pass(trial, by_name)
            as_executed(trial, compiled.backend)
            return plan_memory(trial, round_to=compiled.granularity).peak

        module, compiled.book = fit(
            module,
            by_name,
            remat,
            times=OpTimes.on(compiled.device, mesh),
            device=compiled.device,
            mesh=mesh,
            copy=copy_graph,
            finished_peak=finished_peak,
        )
    compiled.mesh, compiled.link = mesh, link
    if mesh is not None and hide_communication and groups_of(module):
        within = bytes_within(module, remat, compiled.device, mesh)
        overlap(module, mesh, times=OpTimes.on(compiled.device, mesh), link=link, within=within)
    donate_pass(module, by_name)
    compiled.graph = module
    return compiled


def _abstract(leaf: Any) -> Any:
    return Aval.of(leaf) if is_array(leaf) else leaf


def name_of(fn: Callable) -> str:
    """What a step is called in messages and reports."""
    return getattr(fn, "__name__", type(fn).__name__)


def match_donated(traced: Traced, argument: Any, name: str) -> dict[int, int]:
    """Which input leaf's memory takes which output leaf: positions of both in the graph.

    The whole result or one member of a tuple result must have the argument's structure.
    """
    marker = tree.unflatten(traced.output_tree, range(traced.output_tree.num_leaves))
    structure = tree.flatten(argument)[1]
    members = [marker, *marker] if isinstance(marker, tuple) and not hasattr(marker, "_fields") else [marker]
    found = next((m for m in members if tree.flatten(m)[1] == structure), None)
    if found is None:
        nearest = members[1] if len(members) > 1 else members[0]
        raise ValueError(
            f"donate={name!r}: no part of the result has its structure; return the new {name} with the same tree. "
            f"Differences to the result's first part: {tree.diff(argument, nearest)}"
        )
    tensor_index = {
        leaf: i for i, leaf in enumerate(i for i in tree.flatten(marker)[0] if i not in traced.static_outputs)
    }
    avals = dict(zip(traced.input_paths, traced.input_avals, strict=True))
    slots = {path: i for i, path in enumerate(traced.input_paths)}
    values = traced.module.graph.output_node().args[0]
    matched: dict[int, int] = {}
    for path, output in zip(argument_paths((argument,), [name]), tree.flatten(found)[0], strict=True):
        if path not in slots or output not in tensor_index:
            continue
        new = Aval.of(values[tensor_index[output]].meta["val"])  # type: ignore[index,union-attr]
        if (new.shape, new.dtype) != (avals[path].shape, avals[path].dtype):
            raise ValueError(
                f"donate={name!r}: leaf {path!r} is {avals[path]} and its new value is {new}: a step must keep shapes "
                "and dtypes of its state"
            )
        matched[slots[path]] = tensor_index[output]
    return matched


def copy_graph(module: fx.GraphModule) -> fx.GraphModule:
    """A graph of its own with the same values in its metadata; bodies of loops are copied too."""
    graph = fx.Graph()
    graph.output(graph.graph_copy(module.graph, {}))
    copy = lazy_module(module, graph)
    for node in copy.graph.nodes:
        if is_loop(node):
            setattr(copy, node.args[0].target, copy_graph(loop_body(node)))
    return copy
