"""The program that `ftrain.jit` would make of a step for a cluster's GPUs, without one: graph, schedule, donation.

`ftrain.jit` plans by the times of the device at hand. Here the same passes run by the times of the cluster.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from ftrain import tree
from ftrain.compiled import Compiled, copy_graph, match_donated
from ftrain.execute import as_executed
from ftrain.jit import Step
from ftrain.liveness import plan_memory
from ftrain.lockstep import groups_of
from ftrain.op_times import OpTimes
from ftrain.passes.donate import donate
from ftrain.passes.order import update_early
from ftrain.remat import Remat
from ftrain.remat_fit import fit
from ftrain.schedule import overlap
from ftrain.search.cluster import Cluster
from ftrain.search.device_ops import DeviceTimes
from ftrain.search.layouts import Candidate
from ftrain.search.subject import Trial
from ftrain.sharded_step import Argument, ShardedStep
from ftrain.trace import Aval, is_array
from sharding.batch import Places, Rows, share
from sharding.link import Link
from sharding.mesh import Mesh
from sharding.plan import Plan


@dataclass(frozen=True)
class Lowered:
    """One rank's program. `ordered`: the graph in the order in which it runs, communication hidden behind compute.
    `final`: the same with its writes in place. `plain`: that without communication hidden.

    What is alive in `plain` grows by the same bytes with each layer; how far ahead `final` gets depends on the layers
    that there are.
    """

    ordered: fx.GraphModule
    final: fx.GraphModule
    plain: fx.GraphModule
    mesh: Mesh
    times: OpTimes


def lower(trial: Trial, candidate: Candidate, cluster: Cluster, *, attention_share: float = 1.0) -> Lowered:
    """Trace the step for one rank of a layout and run the passes; nothing is allocated.

    ValueError as `ftrain.jit` raises it, where the step does not fit the layout. `attention_share`: see `DeviceTimes`.
    """
    times = DeviceTimes(cluster, attention_share=attention_share)
    remat, mesh = candidate.recompute, candidate.mesh()
    link = cluster.link(mesh)
    compiled = _traced(trial, candidate, link, device=torch.device(cluster.device_type, 0))
    module, donated = compiled.graph, _donated(compiled, trial)
    update_early(module, donated)
    if remat.us_per_mb is not None:
        module = _recompute_by_price(module, donated, remat, times, mesh)
    plain = _in_place(module, donated)
    if not groups_of(module):
        return Lowered(module, plain, plain, mesh, times)
    overlap(module, mesh, times=times, link=link)
    return Lowered(module, _in_place(module, donated), plain, mesh, times)


def _in_place(module: fx.GraphModule, donated: dict[str, int]) -> fx.GraphModule:
    """A copy as it is executed: new state over old."""
    module = copy_graph(module)
    donate(module, donated)
    as_executed(module, "aten")
    return module


def _traced(trial: Trial, candidate: Candidate, link: Link, *, device: torch.device) -> Compiled:
    base, remat = trial.plan(candidate), candidate.recompute
    plan = Plan(base.mesh, base.default, batch=base.batch, link=link, **base.components)
    policy = Remat("none", gathered="keep") if remat.us_per_mb is not None else remat
    sharded = OnPaper(plan, specs=trial.specs, device=device)
    step = Step(trial.step, donate=None, backend="aten", remat=policy, precision=trial.precision, sharded=sharded)
    return step.lower(trial.state, trial.batch)


class OnPaper(ShardedStep):
    """A step on a fake mesh whose batch is shapes alone, however large it is.

    All arguments stand for arguments on `device`, which need not be here.
    """

    def __init__(self, plan: Plan, *, specs: Any, device: torch.device) -> None:
        super().__init__(plan, specs=specs, overlap=False)
        self._device = device

    def local_arguments(self, paths: Sequence[str], leaves: Sequence[Any], treedef: Any) -> tuple:
        """A rank's arguments as abstract values, its coordinates last."""
        arguments = [self.argument(path, leaf) for path, leaf in zip(paths, leaves, strict=True)]
        own = [self._aval(a, leaf) for a, leaf in zip(arguments, leaves, strict=True)]
        return (*tree.unflatten(treedef, own), Aval((3,), torch.int64, torch.device("cpu")))

    def _aval(self, argument: Argument, leaf: Any) -> Any:
        if not is_array(leaf):
            return leaf
        if argument.placement is not None:
            return Aval(argument.placement.local_shape, leaf.dtype, self._device)
        # places are divided as rows are; what else their rule asks for is a matter of their values
        rule = Rows() if isinstance(argument.rule, Places) else argument.rule
        assert rule is not None
        whole = torch.empty(tuple(leaf.shape), dtype=leaf.dtype, device="meta")
        plan = self.plan
        part = share(whole, rule, path=argument.path, tokens=0, order=plan.order, mesh=plan.mesh, rank=0)
        return Aval(tuple(part.shape), leaf.dtype, self._device)


def _donated(compiled: Compiled, trial: Trial) -> dict[str, int]:
    """Names of the placeholders that the new state is written over, with the positions of the outputs."""
    if not trial.donate:
        return {}
    inputs = [n.name for n in compiled.graph.graph.nodes if n.op == "placeholder"]
    matched = match_donated(compiled.traced, trial.state, "state")
    return {inputs[slot]: output for slot, output in matched.items()}


def _recompute_by_price(
    module: fx.GraphModule, donated: dict[str, int], remat: Remat, times: OpTimes, mesh: Mesh
) -> fx.GraphModule:
    def peak(trial: fx.GraphModule) -> int:
        donate(trial, donated)
        as_executed(trial, "aten")
        return plan_memory(trial, round_to=512).peak

    module, _ = fit(
        module,
        donated,
        remat,
        times=times,
        device=torch.device("cpu"),
        mesh=mesh,
        copy=copy_graph,
        finished_peak=peak,
    )
    return module
