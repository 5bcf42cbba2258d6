"""A jitted function: a pure step that is traced once per kind of arguments into one graph, then run."""

import functools
import inspect
import threading
import types
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from contextvars import ContextVar
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from ftrain import tree
from ftrain.graph.layouts import laid_plainly
from ftrain.remat.policy import Remat
from ftrain.runtime.borrow import plain_leaves
from ftrain.runtime.execute import require_backend
from ftrain.sharding.joint_calls import joint_call
from ftrain.sharding.plan import Plan
from ftrain.step.artifact import Compiled
from ftrain.step.compile import name_of
from ftrain.step.deferred_plan import DeferredPlan, require_batch
from ftrain.step.plan_source import PlanSource
from ftrain.step.remade import Remade
from ftrain.step.runner import Runner
from ftrain.step.sharded import ShardedStep
from ftrain.step.trace_cache import Options, TraceCache
from ftrain.trace.ambient import inside_transform_or_trace
from ftrain.trace.precision import Precision, computing_in
from ftrain.trace.tracer import argument_paths, is_array

_disabled: ContextVar[bool] = ContextVar("ftrain_disable_jit", default=False)


@contextmanager
def disable_jit() -> Iterator[None]:
    """Within the block jitted steps run eagerly, op by op, for a debugger. Nothing is donated.

    A step with a plan of several processes raises a ValueError when it is called in the block: without jit it would see
    the pieces of one process.

    >>> import torch, ftrain
    >>> step = ftrain.jit(lambda x: print("in Python") or x + 1)
    >>> with ftrain.disable_jit():
    ...     step(torch.zeros(2))
    in Python
    tensor([1., 1.])
    """
    token = _disabled.set(True)
    try:
        yield
    finally:
        _disabled.reset(token)


def make_step(
    fn: Callable[..., Any],
    *,
    donate: str | None = None,
    backend: str = "auto",
    remat: Remat | str | None = None,
    precision: Precision | str | torch.dtype | None = None,
    plan: Plan | PlanSource | None = None,
    specs: Any = None,
    batch: str = "batch",
    overlap: bool = True,
) -> "Step":
    """`fn` as a jitted function.

    The other arguments are those of `ftrain.jit`, except for `plan`: a `Plan`, an object whose `choose` returns one
    (see `PlanSource`), or None for a single rank. ValueError for an unknown backend, for `donate` that names no
    argument, and for a plan of several ranks where no argument is called `batch`.
    """
    require_backend(backend)
    remake = functools.partial(
        make_step, donate=donate, backend=backend, remat=remat, precision=precision, plan=plan, specs=specs,
        batch=batch, overlap=overlap,
    )  # fmt: skip
    given = None if remat is None else Remat.of(remat)
    options = Options(_position(fn, donate), backend, given or Remat(), Precision.of(precision))
    if plan is None:
        return Step(fn, options, remake=remake)
    if not isinstance(plan, Plan):
        return Step(fn, options, deferred=DeferredPlan(plan, specs, batch, overlap, given), remake=remake)
    require_batch(fn, _positional_names(fn), batch, plan)
    return Step(fn, options, sharded=ShardedStep(plan, specs=specs, batch=batch, overlap=overlap), remake=remake)


def _position(fn: Callable[..., Any], donate: str | None) -> int | None:
    """Which argument `donate` names."""
    names = _positional_names(fn)
    if donate is not None and donate not in names:
        raise ValueError(f"donate={donate!r} is not an argument of {name_of(fn)}({', '.join(names)})")
    return None if donate is None else names.index(donate)


class Step(Remade):
    """A jitted function, made by `ftrain.jit`: call it, or `lower` it to look at what a call would run."""

    def __init__(
        self,
        fn: Callable[..., Any],
        options: Options,
        *,
        sharded: ShardedStep | None = None,
        deferred: DeferredPlan | None = None,
        remake: Callable[[Callable[..., Any]], "Step"] | None = None,
    ) -> None:
        """`fn` with the options of `ftrain.jit`; `sharded`: its plan; `deferred`: a plan that is chosen when the step
        is first used; `remake`: makes a step of another function with the same options, for methods.
        """
        functools.update_wrapper(self, fn)
        self._parameters = _positional_names(fn)
        self._traces = TraceCache(fn, self._parameters, options)
        self._placed, self._deferred = sharded, deferred
        self._closer = threading.RLock()
        super().__init__(fn, remake, is_method=self._parameters[:1] == ["self"] and isinstance(fn, types.FunctionType))

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run the step on real tensors and return the tree that the function returns.

        Inside `disable_jit`, a transform of `torch.func` or another trace the plain function is called. ValueError for
        an argument that does not exist, for a leaf that was donated to an earlier call or holds no data, and for all
        that a trace refuses, with the user's line.
        """
        args = _bound(self._fn, self._parameters, args, kwargs)
        if _disabled.get() or inside_transform_or_trace():
            return _plain(self._fn, args, self._placed, self._traces.options.precision)
        sharded = self._layout(args)
        leaves, treedef = tree.flatten(args)
        runner, around = self._traces.latest, self._traces.around()
        if runner is not None and sharded is None and runner.compiled.signature.matches_fast(leaves, treedef, around):
            return runner.run(leaves, guard_passed=True)
        if runner is not None and sharded is not None:
            inputs = sharded.matches_fast(runner, leaves, treedef, around)
            if inputs is not None:
                return sharded.run(runner, leaves, treedef, inputs)
        return self._run(args, leaves, treedef, sharded, around)

    def _run(
        self,
        args: tuple[Any, ...],
        leaves: list[Any],
        treedef: Any,
        sharded: ShardedStep | None,
        around: tuple[Any, ...] | None,
    ) -> Any:
        """A call whose arguments need a closer look. One thread at a time: a step's first run makes its program."""
        with self._closer, plain_leaves(leaves) as borrows:
            runner = self._traces.latest
            matches = runner is not None and sharded is None
            if runner is None or not matches or not runner.compiled.signature.matches(leaves, treedef, around):
                runner = self._traces.latest = self._traces.find(args, leaves, treedef, sharded)
            runner.wait_for(borrows)
            return runner.run(leaves) if sharded is None else sharded.run(runner, leaves, treedef)

    def lower(self, *args: Any, **kwargs: Any) -> Compiled:
        """Trace and plan for these arguments without running. Leaves may be real tensors, `ftrain.Aval`s, meta or fake
        tensors: shapes, dtypes and devices are enough. ValueError as for a call.

        >>> import torch, ftrain
        >>> step = ftrain.jit(lambda w, x: (w @ x).sum())
        >>> compiled = step.lower(torch.empty(512, 256, device="meta"), torch.empty(256, 64, device="meta"))
        >>> compiled.cost().flops >= 2 * 512 * 256 * 64
        True
        """
        return self.runner(*args, **kwargs).compiled

    def runner(self, *args: Any, **kwargs: Any) -> Runner:
        """The `Runner` that a call with these arguments would use. It is made without running it; arguments and errors
        as for `lower`, with ValueError for an argument that does not exist.
        """
        args = _bound(self._fn, self._parameters, args, kwargs)
        return self._traces.find(args, *tree.flatten(args), self._layout(args))

    def choose(self, *args: Any, **kwargs: Any) -> Plan | None:
        """Choose the plan now, if the step was given one by name, and return it; None stands for a single rank.

        `plan="auto"` searches by the shapes of these arguments: those of the whole mesh, whose leaves may be `Aval`s or
        meta tensors. A plan that was chosen before stays. ValueError where no layout fits.
        """
        sharded = self._layout(_bound(self._fn, self._parameters, args, kwargs) or None, whole=True)
        return None if sharded is None else sharded.plan

    def flat_inputs(self, *args: Any) -> list[Tensor]:
        """The flat inputs of this process's graph for a call's arguments, with copies of those that the step writes
        over. ValueError on a mesh that is not of processes.
        """
        leaves, sharded, runner = tree.leaves(args), self._layout(args), self.runner(*args)
        if sharded is not None:
            leaves = sharded.flat_inputs(runner, leaves)
        donated = runner.compiled.donation.outputs
        arrays = [leaf for leaf in leaves if is_array(leaf)]
        return [x.clone() if i in donated else laid_plainly(x) for i, x in enumerate(arrays)]

    def rank_inputs(self, *args: Any) -> list[list[Tensor]]:
        """The flat inputs of the graph of each rank that this process runs: all ranks of a virtual mesh, elsewhere one.

        Inputs that the step writes over are copies. ValueError on a fake mesh.
        """
        sharded = self._layout(args)
        if sharded is None or sharded.plan.mesh.kind != "virtual":
            return [self.flat_inputs(*args)]
        paths = argument_paths(args, self._parameters[: len(args)])
        self.runner(*args)  # the trace finds which leaves are ids of documents
        return sharded.arguments.divided(paths, tree.leaves(args))

    def init(self, fn: Callable[..., Any], *args: Any) -> Any:
        """Create a state by running `fn(*args)` as a graph. Each leaf is computed by itself, so nothing else stays in
        memory.

        On a mesh each rank makes its own pieces of the parameters, and no rank ever holds a whole one. Returns the tree
        that `fn` returns: on a mesh of processes with DTensors, elsewhere with whole tensors.

        >>> import ftrain
        >>> from ftrain.modules.spec import ParamSpec, fan_in
        >>> specs = {"w": ParamSpec((4, 8), ("embed", "mlp"), fan_in(4))}
        >>> step = ftrain.jit(lambda params, x: x @ params["w"])
        >>> params = step.init(lambda key: ftrain.init(specs, key), ftrain.key(0))
        >>> params["w"].shape
        torch.Size([4, 8])
        """
        options = Options(donate=None, backend="aten", remat=Remat.of("none"), precision=None)
        sharded = self._layout(None)
        state = Step(fn, options, sharded=sharded)(*args)
        if sharded is None:
            return state
        leaves, treedef = tree.flatten(state)
        whole = [i for i, leaf in enumerate(leaves) if not isinstance(leaf, DTensor)]  # made without a spec
        paths = argument_paths((state,), ["state"])
        divided = sharded.arrays.shard([paths[i] for i in whole], [leaves[i] for i in whole])
        return tree.unflatten(treedef, [dict(zip(whole, divided, strict=True)).get(i, x) for i, x in enumerate(leaves)])

    def shard(self, state: Any, *, name: str = "state") -> Any:
        """The pieces that this process holds of a whole state, as DTensors; elsewhere than on a mesh of processes the
        state itself.

        The state must be equal on all processes. `name`: the argument that the state is for, which begins its paths.
        """
        sharded = self._layout(None)
        if sharded is None:
            return state
        leaves, treedef = tree.flatten(state)
        return tree.unflatten(treedef, sharded.arrays.shard(argument_paths((state,), [name]), leaves))

    def abstract(self, state: Any, *, name: str = "state", device: torch.device | str = "cpu") -> Any:
        """What this process holds of a state, without memory, to restore a checkpoint into: DTensors around meta
        tensors on a mesh of processes, elsewhere the state itself.

        `state`: whole leaves, of shapes alone (meta tensors). `name`: the argument that the state is for. `device`:
        where the restored leaves are to be.
        """
        sharded = self._layout(None)
        if sharded is None:
            return state
        leaves, treedef = tree.flatten(state)
        paths = argument_paths((state,), [name])
        return tree.unflatten(treedef, sharded.arrays.abstract(paths, leaves, torch.device(device).type))

    def whole(self, state: Any) -> Any:
        """The state with whole tensors on every process; elsewhere than on a mesh of processes the state itself. All
        processes call this together, since pieces are gathered.
        """
        if any(isinstance(leaf, DTensor) for leaf in tree.leaves(state)):
            joint_call("gathered a state (step.whole)")
        return tree.map(lambda leaf: leaf.full_tensor() if isinstance(leaf, DTensor) else leaf, state)

    def share(self, batch: Any) -> Any:
        """This process's share of the whole mesh's batch, divided by the rules of the plan (see
        `ftrain.sharding.batch`).

        Elsewhere than on a mesh of processes it is the batch itself: there one call takes the whole batch. ValueError
        for a leaf that does not divide, and for a document that would be cut in two.

        >>> import torch, ftrain
        >>> batch = {"tokens": torch.arange(8)}
        >>> ftrain.jit(lambda batch: batch["tokens"].sum()).share(batch) is batch
        True
        """
        sharded = self._layout(None)
        if sharded is None:
            return batch
        leaves, treedef = tree.flatten(batch)
        return tree.unflatten(treedef, sharded.arguments.share(tree.paths(batch), leaves))

    @property
    def traces(self) -> int:
        """How many traces of the function are held: one for each kind of arguments, at most 8."""
        return len(self._traces)

    def _layout(self, args: tuple[Any, ...] | None, *, whole: bool = False) -> ShardedStep | None:
        """The plan in use. A plan given by name is chosen now. `args`: those of a call, None if there is none; `whole`:
        they are those of the whole mesh.
        """
        deferred = self._deferred
        if deferred is not None:
            names = self._parameters if args is None else self._parameters[: len(args)]
            options = self._traces.options
            self._placed, remat = deferred.decide(self._fn, names, args, options, whole=whole)
            self._deferred = None
            self._traces.options = replace(options, remat=remat)
        return self._placed


def _plain(
    fn: Callable[..., Any], args: tuple[Any, ...], sharded: ShardedStep | None, precision: Precision | None
) -> Any:
    """The function itself: under `disable_jit`, and inside a transform of `torch.func` or another trace.

    ValueError for a step on several ranks inside another: what it would see are not its pieces.
    """
    mesh = None if sharded is None else sharded.plan.mesh
    if _disabled.get() and mesh is not None and mesh.size > 1 and mesh.kind == "process":
        raise ValueError(
            f"{name_of(fn)} has a plan of {mesh.size} processes, and without jit it would see this one's pieces: debug "
            "it on a virtual mesh of the same sizes, Mesh(..., kind='virtual'), in one process"
        )
    if not _disabled.get() and mesh is not None and mesh.size > 1:
        raise ValueError(
            f"{name_of(fn)} has a plan of {mesh.size} ranks and is called inside a transform of torch.func or another "
            "jitted step: call the plain function there, and jit the whole"
        )
    with computing_in(precision) if precision is not None else nullcontext():
        return fn(*args)


def _bound(
    fn: Callable[..., Any], parameters: list[str], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[Any, ...]:
    """The arguments of a call in order, without names."""
    if not kwargs:
        return args
    unknown = set(kwargs) - set(parameters)
    if unknown:
        raise ValueError(f"{name_of(fn)} has no argument {', '.join(sorted(unknown))}")
    bound = _signature(fn).bind(*args, **kwargs)
    given = 1 + max(parameters.index(n) for n in bound.arguments)
    bound.apply_defaults()
    return tuple(bound.arguments[n] for n in parameters[:given])


def _positional_names(fn: Callable[..., Any]) -> list[str]:
    kinds = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    parameters = _signature(fn).parameters.values()
    names = [p.name for p in parameters if p.kind in kinds]
    if any(p.kind is inspect.Parameter.VAR_POSITIONAL for p in parameters):
        names += [f"arg{i}" for i in range(len(names), 32)]
    return names


def _signature(fn: Callable[..., Any]) -> inspect.Signature:
    """The signature of a function; of one in C that tells none (`torch.relu`): any number of arguments."""
    try:
        return inspect.signature(fn)
    except ValueError:
        return inspect.Signature([inspect.Parameter("args", inspect.Parameter.VAR_POSITIONAL)])
