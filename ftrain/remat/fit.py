"""Make a step fit a budget, and list what that costs: which tensors are kept, which recomputed, and at which price."""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, fx

from ftrain.analysis.liveness import input_bytes, plan_memory
from ftrain.analysis.op_times import OpTimes
from ftrain.analysis.pieces import storages_of
from ftrain.graph.loop import carried_outputs, copy_graph, is_loop, loop_body, with_bodies
from ftrain.graph.text import op_name, short_source, show_bytes
from ftrain.remat.local_search import Choice
from ftrain.remat.offload import HostLink, host_link
from ftrain.remat.planner import OverBudget, Planner, budget_bytes, write_choice
from ftrain.remat.policy import Remat, is_forward
from ftrain.sharding.mesh import Mesh
from ftrain.sharding.processes import same_everywhere


class DecisionRow(NamedTuple):
    """A forward tensor that the backward needs, and what was decided about it.

    - `bytes`: of the tensor.
    - `microseconds`: to have it in the backward if it is not kept: recomputing it with all that it is made from and
      that is not kept, or the part of its copies from and to the host that does not hide behind compute.
    - `us_per_mb`: microseconds per MB freed.
    - `decision`: "keep", "recompute" or "offload".
    """

    path: str
    source: str
    op: str
    shape: tuple[int, ...]
    bytes: int
    microseconds: float
    us_per_mb: float
    decision: str


_TRIES = 4  # the simulated peak is near that of the finished graph, so two or three are enough


class Decision(NamedTuple):
    """`meta["decision"]` of a forward node: "keep", "recompute" or "offload", and the microseconds to have its value in
    the backward if it is not kept.
    """

    decision: str
    microseconds: float


class ImpossibleBudget(ValueError):
    """No plan fits the budget. `smallest`: a budget in bytes, arguments included, that fits."""

    def __init__(self, message: str, smallest: int) -> None:
        super().__init__(message)
        self.smallest = smallest


def fit(
    module: fx.GraphModule,
    donated: dict[str, int],
    remat: Remat,
    *,
    times: OpTimes,
    device: torch.device,
    mesh: Mesh | None,
    finished_peak: Callable[[fx.GraphModule], int],
) -> fx.GraphModule:
    """A copy of `module` in which the backward recomputes, or fetches from the host, what the budget, the exchange rate
    or the paths ask for. The decisions are on the nodes (see `decisions`).

    - `donated`: from the name of a placeholder to the output that is written over it.
    - `times`: of ops on `device`. `mesh`: whose ranks must all choose the same.
    - `finished_peak(graph)`: bytes beyond the arguments at the peak after all later passes; it may change the graph.
      The budget is checked on that, and where the simulation was too low the plan is made tighter.

    Raises ImpossibleBudget, a ValueError, with the smallest budget that fits and the op at its peak; ValueError where
    the later passes exceed the budget after several tries.
    """
    round_to = 512 if device.type == "cuda" else 1
    link = host_link(remat, device)
    if remat.budget is None:
        trial = copy_graph(module)
        _apply(trial, donated, remat, times, round_to, None, link)
        return trial
    inputs = input_bytes(module)
    budget = same_everywhere(budget_bytes(remat, device, inputs), mesh)

    def within(room: int) -> fx.GraphModule | OverBudget:
        """A copy whose peak beyond the arguments is at most `room` after all passes, or what is too much of it."""
        target = room
        for _ in range(_TRIES):
            trial = copy_graph(module)
            over = _apply(trial, donated, remat, times, round_to, target, link)
            if over is not None:
                return OverBudget(over.smallest + room - target, over.node, over.choice)
            excess = finished_peak(copy_graph(trial)) - room
            if excess <= 0:
                return trial
            target -= excess
        raise ValueError(
            f"Remat(budget={remat.budget!r}): {show_bytes(excess)} above it after all passes; raise the budget"
        )

    found = within(budget - inputs)
    if isinstance(found, OverBudget):
        raise _refusal(module, remat, budget, inputs, _smallest(found, within))
    return found


def _smallest(over: OverBudget, within: Callable[[int], fx.GraphModule | OverBudget]) -> OverBudget:
    """Check that the budget which is said to fit does fit: the finished body of a loop may take more than was
    simulated.
    """
    for _ in range(_TRIES):
        found = within(over.smallest)
        if not isinstance(found, OverBudget) or found.smallest <= over.smallest:
            return over
        over = found
    return over


def _apply(
    module: fx.GraphModule,
    donated: dict[str, int],
    remat: Remat,
    times: OpTimes,
    round_to: int,
    target: int | None,
    link: HostLink | None,
) -> OverBudget | None:
    """Choose for the graph and the bodies of its loops, and write the copies. `target`: bytes beyond the arguments,
    None without a budget.

    Where the target cannot be reached, the smallest choice is written, and what the whole graph then takes is returned.
    """
    over = []
    for loop in [n for n in module.graph.nodes if is_loop(n)]:
        inner, outside = None, 0
        if target is not None:
            plan = plan_memory(module, round_to=round_to)
            inside = plan_memory(loop_body(loop), round_to=round_to).peak
            outside = dict(plan.timeline)[loop.name] - inside
            inner = target - outside
        found = _apply(loop_body(loop), carried_outputs(loop), remat, times, round_to, inner, link)
        if found is not None:
            over.append(OverBudget(outside + found.smallest, found.node, found.choice))
    planner = Planner(module, donated, times, remat, round_to, link)
    if target is None:
        choice = planner.at_rate(remat.us_per_mb or 0.0)
    else:
        try:
            choice = planner.within(max([target, *(error.smallest for error in over)]))
        except OverBudget as error:
            over.append(error)
            choice = error.choice
    _tag(planner, choice)
    write_choice(planner, choice)
    return max(over, key=lambda error: error.smallest, default=None)


def _tag(planner: Planner, choice: Choice) -> None:
    """Put the decision on each tensor that the backward reads."""
    nodes, steps = planner.model.nodes, planner.model.steps
    recomputed, offloaded = planner.parts(choice)
    away = choice.table.microseconds if choice.table is not None else {}
    read = (
        {u for s in steps if not s.forward for u in s.reads}
        | {u for v in recomputed for u in steps[v].reads}
        | offloaded
    )
    for v in read:
        if is_forward(nodes[v]) and isinstance(nodes[v].meta.get("val"), Tensor):
            price = (
                away[v]
                if v in offloaded
                else sum(planner.choices.microseconds[u] for u in _chain(planner, recomputed, v))
            )
            decision = "offload" if v in offloaded else "recompute" if v in recomputed else "keep"
            nodes[v].meta["decision"] = Decision(decision, price)


def decisions(module: fx.GraphModule) -> list[DecisionRow]:
    """The decision for each tensor that the backward reads, most microseconds per MB first. For a graph that `fit`
    made, and the bodies of its loops.
    """
    tagged = (n for graph in with_bodies(module) for n in graph.graph.nodes if "decision" in n.meta and is_forward(n))
    return sorted(map(_row, tagged), key=lambda r: -r.us_per_mb)


def _row(node: fx.Node) -> DecisionRow:
    decision, price = node.meta["decision"]
    size = int(storages_of(node)[0][1])
    shape = tuple(int(n) if isinstance(n, int) else -1 for n in node.meta["val"].shape)
    path, source = node.meta.get("path") or "", short_source(node.meta.get("source"))
    return DecisionRow(path, source, op_name(node), shape, size, price, price / max(size / 1e6, 1e-9), decision)


def decision_table(rows: list[DecisionRow], limit: int = 200) -> str:
    """The decisions as text, at most `limit` rows, and their sums."""
    lines = [f"{'decision':10} {'us/MB':>10} {'MB':>9} {'us':>10}  tensor"]
    for r in rows[:limit]:
        lines.append(
            f"{r.decision:10} {r.us_per_mb:10.1f} {r.bytes / 1e6:9.3f} {r.microseconds:10.1f}  "
            f"{r.op}{list(r.shape)} {r.path} ({r.source})"
        )
    if len(rows) > limit:
        lines.append(f"... and {len(rows) - limit} more")
    for decision in ("keep", "recompute", "offload"):
        mine = [r for r in rows if r.decision == decision]
        if mine or decision != "offload":
            lines.append(f"{decision}: {len(mine)} tensors, {show_bytes(sum(r.bytes for r in mine))}")
    return "\n".join(lines)


def _chain(planner: Planner, recomputed: frozenset[int], v: int) -> set[int]:
    """What must run to recompute `v`, given what is kept."""
    found: set[int] = set()
    stack = [v]
    while stack:
        u = stack.pop()
        if u not in found:
            found.add(u)
            stack.extend(w for w in planner.model.steps[u].reads if w in recomputed)
    return {u for u in found if u in planner.choices.microseconds}


def _refusal(module: fx.GraphModule, remat: Remat, budget: int, inputs: int, error: OverBudget) -> ImpossibleBudget:
    meta = error.node.meta
    where = f"{op_name(error.node)} {meta.get('path') or ''} ({short_source(meta.get('source'))})"
    return ImpossibleBudget(
        f"Remat(budget={remat.budget!r}) is {show_bytes(budget)}, of which the arguments take {show_bytes(inputs)}; "
        f"with recompute the step needs at least {show_bytes(inputs + error.smallest)}, at {where}: "
        f"a budget of {inputs + error.smallest} bytes fits; fewer tokens per batch or more micro-batches need less",
        inputs + error.smallest,
    )
