"""The layout that a step runs with: the one of a plan file, or the best that a search at start-up finds."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

from ftrain.analysis.cluster import Cluster
from ftrain.graph.text import show_bytes
from ftrain.plan.file import PlanFile, load_plan
from ftrain.plan.local_machine import from_rank_zero, local_cluster, local_device, world_size
from ftrain.plan.search import Options, search
from ftrain.plan.space import Space, grouped
from ftrain.plan.step_workload import StepWorkload
from ftrain.plan.workload import Workload
from ftrain.remat.policy import parse_budget
from ftrain.sharding.batch import BatchRule
from ftrain.sharding.layout import Layout
from ftrain.sharding.mesh import Kind
from ftrain.step.plan_source import PlanChoice, PlanRequest

_START_UP = Options(traced=8, processes=1, space=Space(rings=False), memory=1.0, seconds=60.0)


@dataclass(frozen=True)
class SavedPlan:
    """The plan of a file that `ftrain plan --apply` wrote, for `ftrain.jit(plan=...)`.

    `kind`: of its mesh; "virtual" runs all its ranks in lockstep in this process.
    """

    file: str | Path
    kind: Kind = "process"

    def choose(self, request: PlanRequest) -> PlanChoice:
        """The file's plan. ValueError if there is no such file, if it is for another number of ranks than this run has,
        or for a model with other components.
        """
        found = load_plan(self.file)
        require_ranks(found, self.file, self.kind)
        return choice_of(found, self.kind, specs=request.specs, source=str(self.file))


@dataclass(frozen=True)
class AutoPlan:
    """A search at start-up, for the devices of this run, of the layout with which a step takes least time; for
    `ftrain.jit(plan=...)`.

    - `ranks`: default those of this run. `kind`: of the mesh.
    - `packs`: in a step's batch, the same number for each data rank; default one per rank.
    - `memory`: the most that a rank may hold at once: bytes, "60GiB" or "70%" of the device.
    - `batch`, `components`: as in `ftrain.sharding.Plan`.
    - `options`: of the search.

    Micro-batches are not searched: the step's own loss divides its batch.
    """

    ranks: int | None = None
    kind: Kind = "process"
    packs: int | None = None
    memory: int | str = "95%"
    batch: Mapping[str, BatchRule] = field(default_factory=lambda: MappingProxyType({}))
    components: Mapping[str, Layout] = field(default_factory=lambda: MappingProxyType({}))
    options: Options = _START_UP

    def choose(self, request: PlanRequest) -> PlanChoice:
        """Search for the plan. ValueError where the step's arguments are not known yet, where this run has another
        number of processes, and where no layout fits.
        """
        ranks = self.ranks or world_size()
        if self.kind == "process" and ranks != world_size():
            raise ValueError(f"AutoPlan(ranks={ranks}): this run has {world_size()} processes; start {ranks}")
        if request.arguments is None or (self.kind == "process" and ranks > 1 and not request.whole):
            raise ValueError(
                "plan='auto' is chosen by the shapes of a step's arguments: call step.choose(state, batch) before the "
                "step is used, with those of the whole mesh (ftrain.Aval or meta tensors will do)"
            )
        workload = StepWorkload(request, packs=self.packs or ranks, rules=self.batch, components=self.components)
        found = search_local_machine(workload, ranks, memory=self.memory, options=self.options)
        return choice_of(found, self.kind, specs=request.specs, source="plan='auto'")


def search_local_machine(
    workload: Workload, ranks: int, *, memory: int | str = "95%", options: Options = _START_UP
) -> PlanFile:
    """The best layout of a workload's step on the devices of this run; in a run of several processes all get rank 0's.

    `ranks`: how many; `memory`: the most that a rank may hold, as in `AutoPlan`. ValueError if no layout fits into it,
    and for a `memory` of another form.
    """
    budget = parse_budget(memory)
    if isinstance(budget, str):
        raise ValueError(f"memory={memory!r}: give bytes, '60GiB' or '70%'")
    machine = local_cluster(local_device(), memory=None if isinstance(budget, float) else float(budget))
    limited = replace(options, memory=budget if isinstance(budget, float) else 1.0)
    return from_rank_zero(lambda: _best(workload, ranks, machine, limited))


def require_ranks(found: PlanFile, file: str | Path, kind: Kind) -> None:
    """ValueError if the plan `found` is for a mesh of processes (`kind`) with another number of ranks than this run
    has. `file`: for the message.
    """
    world, ranks = world_size(), found.candidate.ranks
    if kind == "process" and ranks != world:
        raise ValueError(
            f"{file} is a plan for {ranks} ranks ({found.candidate}), and this run has {world}: start {ranks} with "
            f"torchrun, or make one with `ftrain plan ... --gpus {world} --apply {file}`"
        )


def choice_of(found: PlanFile, kind: Kind, *, specs: Any, source: str) -> PlanChoice:
    """The plan of a plan file for `ftrain.jit`, on a mesh of this kind. `source`: where it is from, for messages.

    ValueError if the plan names components that no parameter of `specs` belongs to, or if it has components and `specs`
    is None.
    """
    if found.candidate.ranks == 1:
        return PlanChoice(None, found.candidate.recompute)
    plan = found.plan(kind=kind)
    if specs is None and plan.components:
        raise ValueError(f"{source} has layouts of {', '.join(plan.components)}: give ftrain.jit the model's specs=...")
    try:
        plan.placements({} if specs is None else specs)
    except ValueError as error:
        raise ValueError(f"{source}, made for {found.workload!r}, does not fit this model: {error}") from None
    return PlanChoice(plan, found.candidate.recompute)


def _best(workload: Workload, ranks: int, machine: Cluster, options: Options) -> PlanFile:
    result = search(workload, ranks, machine, options)
    if result.prices:
        return PlanFile.of(result.prices[0], workload, machine)
    reasons = "; ".join(f"{r.number} x {r.reason}" for r in grouped(result.rejected))
    limit = show_bytes(int(options.memory * machine.memory))
    raise ValueError(f"no layout of {workload.name} on {ranks} ranks fits into {limit} of a rank: {reasons}")
