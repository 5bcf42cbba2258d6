"""A step that does not fit: what holds the memory, and which budgets would fit at which price."""

import re
import traceback

import torch
from torch import fx

from ftrain.analysis.cuda_allocator import allocator_state
from ftrain.analysis.liveness import MemoryPlan
from ftrain.analysis.op_times import OpTimes
from ftrain.graph.failing_node import failing_node
from ftrain.graph.text import op_name, short_source, show_bytes
from ftrain.remat.fit import ImpossibleBudget
from ftrain.remat.policy import Remat
from ftrain.report.step_data import Described, StepData

_CPU_REFUSAL = re.compile(r"can't allocate memory|not enough memory")
_SHARES = (0.95, 0.5, 0.1)  # budgets to offer, as shares of the way from the smallest possible one to what fitted
_SHOWN = 8


class OutOfMemory(RuntimeError):
    """An allocation of a step failed. The message is that of `explain_oom`."""


def is_out_of_memory(error: RuntimeError) -> bool:
    """True for an error of torch's allocators, on CUDA or on CPU."""
    return isinstance(error, torch.OutOfMemoryError) or _CPU_REFUSAL.search(str(error)) is not None


def explained(step: Described, error: RuntimeError, *, device: torch.device, running: fx.GraphModule) -> OutOfMemory:
    """The error to raise instead of the allocator's. The memory that the failed run held is released first.

    `running`: the graph whose generated code failed on `device`. If the explanation itself fails, the message says so
    after the first error, which is never lost.
    """
    lines = [f"{step.name or 'the step'} ran out of memory: {error}", allocator_state(device)]
    try:
        node = failing_node(running, error.__traceback__)
        traceback.clear_frames(error.__traceback__)
        lines.append(explain_oom(step, at=None if node is None else node.name))
    except Exception as second:
        lines.append(f"the explanation failed: {type(second).__name__}: {second}")
    return OutOfMemory("\n".join(line for line in lines if line))


def explain_oom(step: Described, *, at: str | None = None) -> str:
    """What holds a step's memory at its peak, and three budgets below what fitted, with the price of each, as text.

    - `step`: what `Step.lower` returns.
    - `at`: the node whose allocation failed. What the plan holds before this node did fit, so budgets are below that.
      Without it, budgets are below the plan's peak.

    A price is the recompute per step in milliseconds, from times measured on this device or a roofline. On one of
    several processes budgets are not tried: ranks agree on prices, and the others of a failed run wait in a collective.

    >>> import torch, ftrain
    >>> compiled = ftrain.jit(ftrain.grad(lambda w: (w @ w).relu().sum())).lower(torch.zeros(64, 64))
    >>> print(ftrain.explain_oom(compiled))
    The plan, before it runs:
    planned: ...
    """
    data = step.data()
    plan = data.memory
    live = [size for _, size in plan.timeline]
    names = [name for name, _ in plan.timeline]
    failed = names.index(at) if at in names else None
    held = plan.inputs + (max(live[:failed], default=0) if failed is not None else plan.peak)
    lines = [_where(data.executed, at, held) if failed is not None and at else "The plan, before it runs:"]
    lines.append(
        f"planned: {show_bytes(plan.total)} in all, {show_bytes(plan.inputs)} of it arguments{_reserved(plan)}; at the "
        f"peak ({plan.peak_node}) the largest are"
    )
    lines += [f"  {show_bytes(t.bytes):>10}  {t.node} {t.path} ({t.source}, {t.phase})" for t in plan.top[:_SHOWN]]
    if data.alone:
        lines.append("budgets that would fit:")
        lines += _offers(data, held)
    else:
        lines.append("recompute more: jit(remat=ftrain.Remat(budget=...)) with less than that")
    lines.append("a smaller batch, more micro-batches (ftrain.accumulate) or more ranks (Layout) need less, too")
    return "\n".join(lines)


def _reserved(plan: MemoryPlan) -> str:
    if plan.reserved == plan.total:
        return ""
    return f", for which about {show_bytes(plan.reserved)} will be reserved (an estimate)"


def _where(module: fx.GraphModule, at: str, held: int) -> str:
    node = next(n for n in module.graph.nodes if n.name == at)
    source, path = short_source(node.meta.get("source")), node.meta.get("path") or "no parameter"
    return f"It failed at {op_name(node)} ({at}, {path}, {source}), where up to {show_bytes(held)} had fitted."


def _offers(step: StepData, held: int) -> list[str]:
    """A line for each budget with its price; or why there is none."""
    try:
        times = OpTimes.on(step.device)
    except RuntimeError as second:
        if not is_out_of_memory(second):
            raise
        return [f"  unknown: the device is too full to measure what recompute costs ({second})"]
    before = _microseconds(step.graph, times)
    try:
        step.recompile(Remat(budget=1))
    except ImpossibleBudget as refusal:
        smallest, why = refusal.smallest, str(refusal)
    if smallest >= held:
        return [f"  none: {why}"]
    lines = []
    for share in _SHARES:
        budget = smallest + int(share * (held - smallest))
        more = _microseconds(step.recompile(Remat(budget=budget)).graph, times) - before
        lines.append(
            f"  Remat(budget={budget}) = {show_bytes(budget)}: {more / 1e3:+.1f} ms a step ({more / before:+.1%})"
        )
    return lines


def _microseconds(module: fx.GraphModule, times: OpTimes) -> float:
    return sum(times.microseconds(n) for n in module.graph.nodes)
