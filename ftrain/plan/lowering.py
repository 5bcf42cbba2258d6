"""The program that `ftrain.jit` would make of a step for a cluster's GPUs, without one: graph, schedule, donation.

`ftrain.jit` plans with the times of the device it runs on. Here the same passes run with the times of the cluster.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import fx

from ftrain import tree
from ftrain.analysis.cluster import Cluster
from ftrain.analysis.device_ops import DeviceTimes
from ftrain.analysis.op_times import OpTimes
from ftrain.analysis.pieces import Pieces
from ftrain.graph.collectives import groups_of
from ftrain.graph.loop import copy_graph
from ftrain.plan.cluster_links import simulate_on_cluster
from ftrain.plan.space import Candidate
from ftrain.plan.workload import WorkloadStep
from ftrain.runtime.execute import choose
from ftrain.sharding.batch import BatchRows, TokenIndices, share
from ftrain.sharding.mesh import Mesh
from ftrain.sharding.plan import Plan
from ftrain.step.donated import match_donated
from ftrain.step.mesh_arguments import COORDINATES, Argument, MeshArguments
from ftrain.step.pipeline import DONATED, EXECUTED, FUSED, HIDDEN, PREPARED, Pass, Setting, run_passes
from ftrain.step.sharded import ShardedStep
from ftrain.trace.spmd import Placements
from ftrain.trace.tracer import Aval, argument_paths, is_array, trace


@dataclass(frozen=True)
class Lowered:
    """One rank's program.

    - `ordered`: the graph in the order in which it runs, communication hidden behind compute; what the backend fuses is
      one node each.
    - `final`: the same with its writes in place. `plain`: that without communication hidden.
    - `times`: of ops on the cluster.

    What is alive in `plain` grows by the same bytes with each layer. How far ahead messages in `final` start depends on
    the number of layers.
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
    setting: Setting
    times: OpTimes
    cluster: Cluster

    def hide(self, *, spare: float | None) -> Lowered:
        """Hide communication, with `spare` bytes of memory for it; None: as much as `overlap` takes by default."""
        setting, times, mesh = self.setting, self.times, self.setting.mesh
        assert mesh is not None
        if not groups_of(self.module):
            return Lowered(_run(self.module, FUSED, setting), self.plain, self.plain, mesh, times)

        def within(module: fx.GraphModule) -> int | None:
            return None if spare is None else Pieces.of(module, donated=setting.donated).peak + int(spare)

        def score(candidate: fx.GraphModule) -> float:
            return simulate_on_cluster(candidate, mesh, times=times, cluster=self.cluster).step

        module = _run(self.module, HIDDEN, replace(setting, within=within, score=score))
        final = _run(module, (*DONATED, *EXECUTED), setting)
        return Lowered(_run(module, FUSED, setting), final, self.plain, mesh, times)


def lower(work: WorkloadStep, candidate: Candidate, cluster: Cluster, *, attention_share: float = 1.0) -> Lowered:
    """Trace the step `work` for one rank of the layout `candidate` on a cluster, and run the passes; nothing is
    allocated.

    `attention_share`: see `DeviceTimes`. ValueError, as `ftrain.jit` raises it, where the step does not fit the layout.
    """
    return draft(work, candidate, cluster, attention_share=attention_share).hide(spare=None)


def draft(work: WorkloadStep, candidate: Candidate, cluster: Cluster, *, attention_share: float = 1.0) -> Draft:
    """As `lower`, with the same arguments and errors, but communication is not hidden yet."""
    times = DeviceTimes(cluster, attention_share=attention_share)
    kind = cluster.device_type
    # a CPU has no number: "cpu:0" and "cpu" are two devices to a trace
    mesh, device = candidate.mesh(), torch.device(kind) if kind == "cpu" else torch.device(kind, 0)
    base = work.plan(candidate)
    plan = Plan(base.mesh, base.default, batch=base.batch, link=cluster.link(mesh), components=base.components)
    sharded = ShardedStep(plan, specs=work.specs, arguments=partial(FakeMeshArguments, device=device))
    leaves, treedef = tree.flatten((work.state, work.batch))
    paths = argument_paths((work.state, work.batch), ("state", "batch"))
    args = sharded.local_arguments(paths, leaves, treedef)
    traced = trace(
        sharded.local_function(work.step, paths), args, ("state", "batch", COORDINATES), precision=work.precision
    )
    sharded.settle(traced)
    donated = match_donated(traced, args[0], "state").by_name(traced.module) if work.donate else {}
    setting = Setting(
        leaves=dict(zip(traced.input_paths, traced.input_avals, strict=True)),
        state="state",
        donated=donated,
        device=device,
        backend=choose("auto", device),
        remat=candidate.recompute,
        times=lambda: times,
        mesh=mesh,
        link=plan.link,
    )
    module = run_passes(traced.module, PREPARED, setting)
    return Draft(module, _run(module, (*DONATED, *EXECUTED), setting), setting, times, cluster)


def _run(module: fx.GraphModule, passes: Sequence[Pass], setting: Setting) -> fx.GraphModule:
    """A copy after the passes."""
    return run_passes(copy_graph(module), passes, setting)


class FakeMeshArguments(MeshArguments):
    """The arguments of a step with a plan on a fake mesh, whose batch is shapes alone, however large it is.

    All of them stand for arguments on `device`, which need not exist on this machine; the rest is as in
    `MeshArguments`.
    """

    def __init__(self, plan: Plan, placements: Placements, batch: str, *, device: torch.device) -> None:
        super().__init__(plan, placements, batch)
        self._device = device

    def avals(self, paths: Sequence[str], leaves: Sequence[Any]) -> list[Any]:
        """A rank's arguments as abstract values, from `leaves` with their `paths`. ValueError for a leaf that does not
        divide.
        """
        arguments = [self.argument(path, leaf) for path, leaf in zip(paths, leaves, strict=True)]
        return [self._aval(a, leaf) for a, leaf in zip(arguments, leaves, strict=True)]

    def _aval(self, argument: Argument, leaf: Any) -> Any:
        if not is_array(leaf):
            return leaf
        if argument.placement is not None:
            return Aval(argument.placement.local_shape, leaf.dtype, self._device)
        # token indices are divided as rows are; the rest of their rule depends on values, which are not here
        rule = BatchRows() if isinstance(argument.rule, TokenIndices) else argument.rule
        assert rule is not None
        whole = torch.empty(tuple(leaf.shape), dtype=leaf.dtype, device="meta")
        plan = self.plan
        part = share(whole, rule, path=argument.path, tokens=0, order=plan.order, mesh=plan.mesh, rank=0)
        return Aval(tuple(part.shape), leaf.dtype, self._device)
