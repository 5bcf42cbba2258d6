"""`ftrain.jit`: a pure step, traced once per shapes into one graph, then run."""

import functools
import inspect
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from contextvars import ContextVar
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from ftrain import tree
from ftrain.ambient import AMBIENT_NAMES, ambient, within_another
from ftrain.compiled import Compiled, compile_step, name_of
from ftrain.donation import DonatedTensor, path_of
from ftrain.execute import require_backend
from ftrain.loan import taken_back
from ftrain.planned import Chooser, Wanted, chooser_of
from ftrain.precision import Precision, computing_in
from ftrain.remat import Remat
from ftrain.sharded_step import COORDINATES, ShardedStep
from ftrain.trace import Aval, argument_paths, is_array, signature_of
from sharding.link import Link
from sharding.plan import Plan

_MOST_TRACES = 8

_disabled: ContextVar[bool] = ContextVar("ftrain_disable_jit", default=False)


@contextmanager
def disable_jit() -> Iterator[None]:
    """Within the block jitted steps run eagerly, op by op, for a debugger; nothing is donated."""
    token = _disabled.set(True)
    try:
        yield
    finally:
        _disabled.reset(token)


def jit(
    fn: Callable | None = None,
    *,
    donate: str | None = None,
    backend: str = "auto",
    remat: Remat | str | None = None,
    precision: Precision | str | torch.dtype | None = None,
    plan: Plan | Chooser | str | Path | None = None,
    specs: Any = None,
    batch: str = "batch",
    overlap: bool = True,
) -> Any:
    """Make a step of a pure function of trees of tensors; usable as a decorator, with or without options.

    - `donate`: the name of an argument whose memory the step may write its new value into. The result, or one member of
      a tuple result, must have the argument's tree, shapes and dtypes. The old leaves are spoiled: using one again is
      a ValueError that names it.
    - `backend`: "aten" (the graph as Python), "inductor", "cudagraph", or "auto": aten on CPU, inductor on CUDA.
    - `remat`: what the backward computes again instead of keeping; see `Remat`. Default: nothing, or what a plan says
      that is given by name.
    - `precision`: in which dtype losses see the parameters; see `Precision`. A name or a dtype is the compute dtype.
    - `plan`: the mesh that the step runs on, and how; see `sharding.Plan`. Or a file that `ftrain plan --apply` wrote,
      or "auto", which searches at start-up (see `ftrain.SavedPlan`, `ftrain.AutoPlan`).
    - `specs`: the tree of `ParamSpec`s of the model, by whose paths leaves of the state are found; not needed where the
      state comes from this step's `init`. `batch`: the name of the argument that the ranks divide among them.
      `overlap`: reorder the graph so that communication hides behind compute; values are the same without.

    Leaves that are not tensors (numbers, strings) are constants of the trace; another value traces again. So do other
    shapes, dtypes or devices, and modes around the call (autocast, the default dtype and device); from the second trace
    on a warning says which leaf changed, and how. A step holds at most 8 traces, and drops the oldest with a warning.
    Inside a transform of `torch.func`, another jitted function or a trace of another kind, a jitted function is the
    plain one.
    """
    if fn is None:
        return functools.partial(
            jit,
            donate=donate,
            backend=backend,
            remat=remat,
            precision=precision,
            plan=plan,
            specs=specs,
            batch=batch,
            overlap=overlap,
        )
    require_backend(backend)
    _require_plan(plan)
    precision = Precision.of(precision)
    given = None if remat is None else Remat.of(remat)
    sharded = ShardedStep(plan, specs=specs, batch=batch, overlap=overlap) if isinstance(plan, Plan) else None
    if sharded is not None and sharded.plan.mesh.size > 1:
        _require_batch(fn, batch)
    undecided = None
    if plan is not None and sharded is None:
        undecided = Undecided(chooser_of(plan), specs, batch, overlap, given)  # type: ignore[arg-type]
    return Step(
        fn,
        donate=donate,
        backend=backend,
        remat=given or Remat(),
        precision=precision,
        sharded=sharded,
        undecided=undecided,
    )


def _require_batch(fn: Callable, batch: str) -> None:
    """ValueError for a step of several arguments none of which ranks would share out."""
    names = _positional_names(fn)
    if len(names) > 1 and batch not in names:
        raise ValueError(
            f"{name_of(fn)}({', '.join(names[:8])}) has no argument {batch!r}, so every rank would compute all of the "
            f"data: call that argument {batch!r}, or name it in jit(batch=...)"
        )


@dataclass(frozen=True)
class Undecided:
    """A plan that is chosen when the step is first used, and the options of `jit` that then matter.

    `remat`: None to take what the choice says.
    """

    chooser: Chooser
    specs: Any
    batch: str
    overlap: bool
    remat: Remat | None


class Step:
    """A jitted function: call it, or `lower` it to look at what a call would run."""

    def __init__(
        self,
        fn: Callable,
        *,
        donate: str | None,
        backend: str,
        remat: Remat,
        precision: Precision | None,
        sharded: ShardedStep | None = None,
        undecided: Undecided | None = None,
    ) -> None:
        functools.update_wrapper(self, fn)
        self._fn = fn
        self._parameters = _positional_names(fn)
        if donate is not None and donate not in self._parameters:
            raise ValueError(f"donate={donate!r} is not an argument of {name_of(fn)}({', '.join(self._parameters)})")
        self._donate = None if donate is None else self._parameters.index(donate)
        self._backend, self._remat, self._precision = backend, remat, precision
        self._placed, self._undecided = sharded, undecided
        self._compiled: dict[Any, Compiled] = {}
        self._latest: Compiled | None = None
        self._explained = False
        self._dropped = False

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run the step on real tensors."""
        args = self._bind(args, kwargs)
        if _disabled.get() or within_another():
            return self._plain(args)
        if self._undecided is not None:
            self._decide(args)
        leaves, treedef = tree.flatten(args)
        compiled, around = self._latest, ambient()
        if self._sharded is None and compiled is not None and compiled.knows(leaves, treedef, around):
            return compiled.run(leaves, known=True)
        with taken_back(leaves) as loans:
            if compiled is None or self._sharded is not None or not compiled.fits(leaves, treedef, around):
                self._refuse_donated(args, leaves)
                compiled = self._latest = self._find(args, leaves, treedef)
            compiled.expect(loans)
            return compiled.run(leaves) if self._sharded is None else self._sharded.run(compiled, leaves)

    def _plain(self, args: tuple) -> Any:
        """The function itself: under `disable_jit`, and inside a transform of `torch.func` or another trace.

        ValueError for a step on several ranks inside another: what it would see are not its pieces.
        """
        mesh = None if _disabled.get() or self._placed is None else self._placed.plan.mesh
        if mesh is not None and mesh.size > 1:
            raise ValueError(
                f"{name_of(self._fn)} has a plan of {mesh.size} ranks and is called inside a transform of torch.func "
                "or another jitted step: call the plain function there, and jit the whole"
            )
        with computing_in(self._precision) if self._precision is not None else nullcontext():
            return self._fn(*args)

    def lower(self, *args: Any, **kwargs: Any) -> Compiled:
        """Trace and plan for these arguments without running; leaves may be `Aval`s, meta or fake tensors."""
        args = self._bind(args, kwargs)
        if self._undecided is not None:
            self._decide(args)
        leaves, treedef = tree.flatten(args)
        self._refuse_donated(args, leaves)
        return self._find(args, leaves, treedef)

    def choose(self, *args: Any, **kwargs: Any) -> Plan | None:
        """Choose a plan that was given by name now, and return it: None is a single rank.

        "auto" searches by the shapes of these arguments: those of the whole mesh, whose leaves may be `Aval`s or meta
        tensors. A plan that is there already stays. ValueError where no layout fits.
        """
        if self._undecided is not None:
            self._decide(self._bind(args, kwargs) or None, whole=True)
        return None if self._placed is None else self._placed.plan

    def flat_inputs(self, *args: Any) -> list[Tensor]:
        """The inputs of this process's graph for a call's arguments, with copies of those that the step writes over."""
        leaves, treedef = tree.flatten(args)
        compiled = self._find(args, leaves, treedef)
        if self._sharded is not None:
            leaves = self._sharded.flat_inputs(compiled, leaves)
        arrays = [leaf for leaf in leaves if is_array(leaf)]
        return [x.clone() if i in compiled.donated else x.contiguous() for i, x in enumerate(arrays)]

    def rank_inputs(self, *args: Any) -> list[list[Tensor]]:
        """As `flat_inputs`, for each rank that this process runs: all of a virtual mesh, elsewhere one."""
        if self._sharded is None or self._sharded.plan.mesh.kind != "virtual":
            return [self.flat_inputs(*args)]
        leaves, treedef = tree.flatten(args)
        return self._sharded.divided(self._find(args, leaves, treedef), leaves)

    def init(self, fn: Callable, *args: Any) -> Any:
        """Create a state: `fn(*args)` run as a graph, so that each leaf is made on its own and nothing else is kept.

        On a mesh each rank makes its own pieces of the parameters, and no rank ever holds the whole.
        """
        make = Step(fn, donate=None, backend="aten", remat=Remat.of("none"), precision=None, sharded=self._sharded)
        return make(*args)

    def shard(self, state: Any, *, name: str = "state") -> Any:
        """What this process holds of a whole state that is equal on all processes; elsewhere the state itself.

        `name`: of the argument that the state is for.
        """
        if self._sharded is None:
            return state
        leaves, treedef = tree.flatten(state)
        return tree.unflatten(treedef, self._sharded.shard(argument_paths((state,), [name]), leaves))

    def abstract(self, state: Any, *, name: str = "state", device: torch.device | str = "cpu") -> Any:
        """What this process holds of a state on `device`, without memory, to restore a checkpoint into: DTensors on a
        mesh of processes, elsewhere the state itself. `state`: whole leaves, of shapes alone (meta tensors).
        """
        if self._sharded is None:
            return state
        leaves, treedef = tree.flatten(state)
        paths = argument_paths((state,), [name])
        return tree.unflatten(treedef, self._sharded.abstract(paths, leaves, torch.device(device).type))

    def whole(self, state: Any) -> Any:
        """The state with whole tensors on every process, gathered; elsewhere the state itself."""
        return tree.map(lambda leaf: leaf.full_tensor() if isinstance(leaf, DTensor) else leaf, state)

    def share(self, batch: Any) -> Any:
        """What this process is given of a whole mesh's batch (see `sharding.batch`); elsewhere the batch itself."""
        if self._sharded is None:
            return batch
        leaves, treedef = tree.flatten(batch)
        return tree.unflatten(treedef, self._sharded.share(tree.paths(batch), leaves))

    @property
    def traces(self) -> int:
        """How many traces of the function are held: one for each kind of arguments, 8 at most."""
        return len(self._compiled)

    @property
    def _sharded(self) -> ShardedStep | None:
        if self._undecided is not None:
            self._decide(None)
        return self._placed

    def _decide(self, args: tuple | None, *, whole: bool = False) -> None:
        """Have the plan chosen; `args`: those of a call, if there are any."""
        undecided = self._undecided
        assert undecided is not None
        wanted = Wanted(
            step=self._fn,
            specs=undecided.specs,
            batch=undecided.batch,
            names=tuple(self._parameters if args is None else self._parameters[: len(args)]),
            precision=self._precision,
            donates=self._donate is not None,
            arguments=args,
            whole=whole,
        )
        plan, remat = undecided.chooser.choose(wanted)
        if plan is not None:
            self._placed = ShardedStep(plan, specs=undecided.specs, batch=undecided.batch, overlap=undecided.overlap)
        if undecided.remat is None:
            self._remat = remat
        self._undecided = None

    def _bind(self, args: tuple, kwargs: dict) -> tuple:
        if not kwargs:
            return args
        unknown = set(kwargs) - set(self._parameters)
        if unknown:
            raise ValueError(f"{name_of(self._fn)} has no argument {', '.join(sorted(unknown))}")
        bound = inspect.signature(self._fn).bind(*args, **kwargs)
        given = 1 + max(self._parameters.index(n) for n in bound.arguments)
        bound.apply_defaults()
        return tuple(bound.arguments[n] for n in self._parameters[:given])

    def _find(self, args: tuple, leaves: list[Any], treedef: Any) -> Compiled:
        key = (treedef, tuple(signature_of(leaf) for leaf in leaves), ambient())
        found = self._compiled.get(key)
        if found is None:
            if self._compiled:
                self._explain(args, leaves)
            started = time.perf_counter()
            found = self._compile(args, leaves, treedef)
            found.seconds_to_compile = time.perf_counter() - started
            self._compiled[key] = found
            self._drop_oldest()
        return found

    def _drop_oldest(self) -> None:
        """Traces have an end: each holds a graph, and a program."""
        if len(self._compiled) <= _MOST_TRACES:
            return
        del self._compiled[next(iter(self._compiled))]
        if not self._dropped:
            self._dropped = True
            warnings.warn(
                f"{name_of(self._fn)} was traced for {_MOST_TRACES + 1} kinds of arguments; it holds {_MOST_TRACES} "
                "traces and drops the oldest from now on. Pack batches to one budget of tokens, and pass numbers that "
                "change as tensors",
                stacklevel=5,
            )

    def _compile(self, args: tuple, leaves: list[Any], treedef: Any) -> Compiled:
        fn, names = self._fn, self._parameters[: len(args)]
        sharded = self._sharded
        if sharded is not None:
            paths = argument_paths(args, names)
            fn = sharded.local_function(fn, paths)
            args = sharded.local_arguments(paths, leaves, treedef)
            names = [*names, COORDINATES]
        compiled = compile_step(
            fn,
            args,
            names,
            donate=self._donate,
            backend=self._backend,
            remat=self._remat,
            precision=self._precision,
            mesh=None if sharded is None else sharded.plan.mesh,
            settle=None if sharded is None else sharded.settle,
            link=Link() if sharded is None else sharded.plan.link,
            hide_communication=sharded is not None and sharded.overlap,
        )
        compiled.leaf_signatures[: len(leaves)] = map(signature_of, leaves)
        return compiled

    def _explain(self, args: tuple, leaves: list[Any]) -> None:
        if self._explained or self._latest is None:
            return
        self._explained = True
        now = dict(zip(argument_paths(args, self._parameters[: len(args)]), map(signature_of, leaves), strict=False))
        before = dict(zip(self._latest.leaf_paths, self._latest.leaf_signatures, strict=True))
        before.pop(COORDINATES, None)
        changes = [
            f"{p}: was {_show(before[p])}, is {_show(now[p])}" for p in now if p in before and before[p] != now[p]
        ]
        changes += [f"{p}: is new" for p in now if p not in before] + [f"{p}: is gone" for p in before if p not in now]
        around = zip(AMBIENT_NAMES, self._latest.ambient, ambient(), strict=True)
        changes += [f"{name} around the call" for name, before, now in around if before != now]
        more = f" (and {len(changes) - 4} more)" if len(changes) > 4 else ""
        warnings.warn(
            f"{name_of(self._fn)} is traced again because its arguments changed: {'; '.join(changes[:4])}{more}. Keep "
            "shapes fixed (pack batches to one budget); later retraces are not reported.",
            stacklevel=4,
        )

    def _refuse_donated(self, args: tuple, leaves: list[Any]) -> None:
        for leaf in leaves:
            if isinstance(leaf, DonatedTensor):
                raise ValueError(
                    f"leaf {path_of(leaf)!r} was donated to an earlier step, which wrote its new state over it: pass "
                    "the state that the step returned, or make the step with donate=None"
                )
        for path, leaf in zip(argument_paths(args, self._parameters[: len(args)]), leaves, strict=True):
            if not is_array(leaf) and not isinstance(leaf, int | float | str | bool | complex | torch.dtype):
                raise ValueError(
                    f"leaf {path!r} is {type(leaf).__module__}.{type(leaf).__name__}; a step takes trees of tensors, "
                    "numbers and strings: convert arrays with torch.as_tensor"
                )


def _require_plan(plan: Any) -> None:
    """ValueError for a plan that is a string and neither "auto" nor the file of one, or no plan at all."""
    spellings = (
        "give a sharding.Plan (sharding.Plan(sharding.Mesh(shard=8)) is FSDP), 'auto', or a file that "
        "`ftrain plan --apply` wrote"
    )
    if isinstance(plan, str | Path) and plan != "auto" and not Path(plan).is_file():
        raise ValueError(f"plan={str(plan)!r}: {plan}: there is no such plan; {spellings}")
    if plan is not None and not isinstance(plan, Plan | str | Path) and not hasattr(plan, "choose"):
        raise ValueError(f"plan={plan!r} is not a sharding.Plan: {spellings}")


def _show(signature: Any) -> str:
    return str(signature) if isinstance(signature, Aval) else repr(signature[1])


def _positional_names(fn: Callable) -> list[str]:
    kinds = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    parameters = inspect.signature(fn).parameters.values()
    names = [p.name for p in parameters if p.kind in kinds]
    if any(p.kind is inspect.Parameter.VAR_POSITIONAL for p in parameters):
        names += [f"arg{i}" for i in range(len(names), 32)]
    return names
