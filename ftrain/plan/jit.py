"""`ftrain.jit`: a pure step, traced once per kind of arguments into one graph, then run."""

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any, overload

import torch

from ftrain.plan.auto import AutoPlan, SavedPlan
from ftrain.remat.policy import Remat
from ftrain.sharding.plan import Plan
from ftrain.step.api import Step, make_step
from ftrain.step.plan_source import PlanSource
from ftrain.trace.precision import Precision


@overload
def jit(
    fn: Callable[..., Any],
    *,
    donate: str | None = ...,
    backend: str = ...,
    remat: Remat | str | None = ...,
    precision: Precision | str | torch.dtype | None = ...,
    plan: Plan | PlanSource | str | Path | None = ...,
    specs: Any = ...,
    batch: str = ...,
    overlap: bool = ...,
) -> Step: ...


@overload
def jit(
    fn: None = None,
    *,
    donate: str | None = ...,
    backend: str = ...,
    remat: Remat | str | None = ...,
    precision: Precision | str | torch.dtype | None = ...,
    plan: Plan | PlanSource | str | Path | None = ...,
    specs: Any = ...,
    batch: str = ...,
    overlap: bool = ...,
) -> Callable[[Callable[..., Any]], Step]: ...


def jit(
    fn: Callable[..., Any] | None = None,
    *,
    donate: str | None = None,
    backend: str = "auto",
    remat: Remat | str | None = None,
    precision: Precision | str | torch.dtype | None = None,
    plan: Plan | PlanSource | str | Path | None = None,
    specs: Any = None,
    batch: str = "batch",
    overlap: bool = True,
) -> Step | Callable[[Callable[..., Any]], Step]:
    """Make a step of a pure function of trees of tensors. Usable as a decorator, with or without options; returns a
    `ftrain.Step`.

    - `donate`: the name of an argument whose memory the step may write its new value into. The result, or one member of
      a tuple result, must have the argument's tree, shapes and dtypes. The old leaves are invalidated: using one
      afterwards is a ValueError that names it. What somebody else keeps of a leaf (a view, `detach()`, `numpy()`, a
      module's parameter) keeps its numbers: such a leaf is copied first, with one warning that names it. Memory that
      torch did not allocate (`torch.from_numpy`, a mapped file), and a leaf that is a view, are copied the first time.
      Bare addresses, and other libraries that use CUDA memory through `__cuda_array_interface__`, are not seen.
    - `backend`: "aten" (the graph as Python), "inductor", "cudagraph", or "auto": aten on CPU, inductor on CUDA.
    - `remat`: what the backward recomputes instead of keeping; see `Remat`. Default: nothing, or what a plan says that
      is given by name.
    - `precision`: the dtype in which losses see the parameters; see `Precision`. A name or a dtype is the compute
      dtype.
    - `plan`: the mesh that the step runs on, and how; see `ftrain.sharding.Plan`. Or a file that `ftrain plan --apply`
      wrote, or "auto", which searches at start-up (see `ftrain.SavedPlan`, `ftrain.AutoPlan`).
    - `specs`: the tree of `ParamSpec`s of the model, by whose paths leaves of the state are found. Not needed where the
      state comes from this step's `init`.
    - `batch`: the name of the argument that the ranks divide among them.
    - `overlap`: reorder the graph so that communication hides behind compute. Values do not change.

    Leaves that are not tensors (numbers, strings) are constants of the trace: another value causes another trace. So do
    other shapes, dtypes or devices, modes around the call (autocast, the default dtype and device), and what the
    function's Python reads beside its arguments (numbers in closures, globals and options, whether a module trains).
    The second trace warns about what changed, and how. A step holds at most 8 traces, and drops the oldest with a
    warning. Inside a transform of `torch.func`, another jitted function or a trace of another kind, a jitted function
    is the plain one.

    ValueError for an unknown backend, for `donate` that names no argument, for a `plan` that is none, and for a plan of
    several ranks where no argument is called `batch`. What a trace refuses is a ValueError of the first call.

    >>> import torch, ftrain
    >>> @ftrain.jit(donate="state")
    ... def step(state, batch):
    ...     loss, grads = ftrain.value_and_grad(lambda w: ((w - batch) ** 2).sum())(state)
    ...     return state - 0.5 * grads, loss
    >>> step(torch.zeros(2), torch.tensor([1.0, 3.0]))
    (tensor([1., 3.]), tensor(10.))
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
    return make_step(
        fn,
        donate=donate,
        backend=backend,
        remat=remat,
        precision=precision,
        plan=_found(plan),
        specs=specs,
        batch=batch,
        overlap=overlap,
    )


def _found(plan: Plan | PlanSource | str | Path | None) -> Plan | PlanSource | None:
    """The plan, or what chooses one, for the value of `plan`. ValueError for a string that is neither "auto" nor the
    file of a plan, and for what is no plan.
    """
    spellings = (
        "give a ftrain.Plan (ftrain.Plan(ftrain.Mesh(shard=8)) is FSDP), 'auto', or a file that `ftrain plan --apply` "
        "wrote"
    )
    if plan == "auto":
        return AutoPlan()
    if isinstance(plan, str | Path):
        if not Path(plan).is_file():
            raise ValueError(f"plan={str(plan)!r}: {plan}: there is no such plan; {spellings}")
        return SavedPlan(plan)
    if plan is not None and not isinstance(plan, Plan) and not hasattr(plan, "choose"):
        raise ValueError(f"plan={plan!r} is not a ftrain.Plan: {spellings}")
    return plan
