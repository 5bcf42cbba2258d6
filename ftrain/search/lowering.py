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
from ftrain.execute import as_executed, choose
from ftrain.jit import Step
from ftrain.liveness import plan_memory
from ftrain.lockstep import groups_of
from ftrain.loop import is_loop, loop_body
from ftrain.op_times import OpTimes
from ftrain.passes.donate import donate
from ftrain.passes.fuse import fuse_runs
from ftrain.passes.order import update_early
from ftrain.remat import Remat
from ftrain.remat_fit import fit
from ftrain.schedule import overlap
from ftrain.search.cluster import Cluster
from ftrain.search.device_ops import DeviceTimes
from ftrain.search.layouts import Candidate
from ftrain.search.subject import Trial
from ftrain.search.two_streams import run_on_paper
from ftrain.sharded_step import Argument, ShardedStep
from ftrain.trace import Aval, is_array
from sharding.batch import Places, Rows, share
from sharding.link import Link
from sharding.mesh import Mesh
from sharding.plan import Plan


@dataclass(frozen=True)
class Lowered:
    """One rank's program. `ordered`: the graph in the order in which it runs, communication hidden behind compute; what
    the backend fuses is one node each. `final`: the same with its writes in place. `plain`: that without communication
    hidden.

    What is alive in `plain` grows by the same bytes with each layer; how far ahead `final` gets depends on the layers
    that there are.
    """

    ordered: fx.GraphModule
    final: fx.GraphModule
    plain: fx.GraphModule
    mesh: Mesh
    times: OpTimes


@dataclass(frozen=True)
class Draft:
    """A rank's program before its communication is hidden: `module`, and `plain` as in `Lowered`."""

    module: fx.GraphModule
    plain: fx.GraphModule
    donated: dict[str, int]
    backend: str
    mesh: Mesh
    times: OpTimes
    cluster: Cluster

    def hide(self, *, spare: float | None) -> Lowered:
        """Hide communication with so many bytes to spare (None: as `overlap` takes them by default)."""
        mesh, times = self.mesh, self.times
        if not groups_of(self.module):
            return Lowered(_fused(self.module, self.backend), self.plain, self.plain, mesh, times)
        module = copy_graph(self.module)
        within = None if spare is None else plan_memory(module).peak + int(spare)

        def score(trial: fx.GraphModule) -> float:
            return run_on_paper(trial, mesh, times=times, cluster=self.cluster).step

        overlap(module, mesh, times=times, link=self.cluster.link(mesh), within=within, score=score)
        return Lowered(
            _fused(module, self.backend), _in_place(module, self.donated, self.backend), self.plain, mesh, times
        )


def lower(trial: Trial, candidate: Candidate, cluster: Cluster, *, attention_share: float = 1.0) -> Lowered:
    """Trace the step for one rank of a layout and run the passes; nothing is allocated.

    ValueError as `ftrain.jit` raises it, where the step does not fit the layout. `attention_share`: see `DeviceTimes`.
    """
    return draft(trial, candidate, cluster, attention_share=attention_share).hide(spare=None)


def draft(trial: Trial, candidate: Candidate, cluster: Cluster, *, attention_share: float = 1.0) -> Draft:
    """As `lower`, but for communication, which is not hidden yet."""
    times = DeviceTimes(cluster, attention_share=attention_share)
    remat, mesh = candidate.recompute, candidate.mesh()
    device = torch.device(cluster.device_type, 0)
    backend = choose("auto", device)
    compiled = _traced(trial, candidate, cluster.link(mesh), device=device)
    module, donated = compiled.graph, _donated(compiled, trial)
    update_early(module, donated)
    if remat.us_per_mb is not None:
        module = _recompute_by_price(module, donated, remat, times, mesh, backend)
    return Draft(module, _in_place(module, donated, backend), donated, backend, mesh, times, cluster)


def _in_place(module: fx.GraphModule, donated: dict[str, int], backend: str) -> fx.GraphModule:
    """A copy as it is executed: new state over old."""
    module = copy_graph(module)
    donate(module, donated)
    as_executed(module, backend)
    return module


def _fused(module: fx.GraphModule, backend: str) -> fx.GraphModule:
    """A copy in which each run of ops that the backend compiles to one kernel is one node, in loops' bodies too."""
    module = copy_graph(module)
    if backend != "aten":
        for each in [module, *(loop_body(n) for n in module.graph.nodes if is_loop(n))]:
            fuse_runs(each)
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
    module: fx.GraphModule, donated: dict[str, int], remat: Remat, times: OpTimes, mesh: Mesh, backend: str
) -> fx.GraphModule:
    def peak(trial: fx.GraphModule) -> int:
        donate(trial, donated)
        as_executed(trial, backend)
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
